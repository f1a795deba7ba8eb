"""Which gradients are not finite, on which rank, before they are averaged and clipped.

A gradient that one replica gets wrong is wrong on all of them once it is averaged. So each parameter's is looked at as
autograd hands it over: its sum s is finite if all of it is, and s - s is then 0, else NaN. That is one pass over the
gradient, and nothing is waited for until somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Finite:
    """Looks at the gradients of `parameters` from now until `close`.

    Example:
        >>> w = nn.Parameter(torch.ones(2)); finite = Finite([("w", w)])
        >>> (w * torch.tensor([1.0, torch.nan])).sum().backward()
        >>> finite.wrong(), finite.wrong()                      # asking forgets
        (['w'], [])
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._parameters = list(parameters)
        self._marks: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self.renew()

    def renew(self) -> None:
        """Also look at parameters that have been unfrozen since."""
        for name, p in self._parameters:
            if p.requires_grad and name not in self._marks:
                self._marks[name] = torch.zeros((), device=p.device)
                self._hooks.append(p.register_hook(_look(self._marks[name])))

    def wrong(self) -> list[str]:
        """The names of the parameters with a gradient that was not finite since the last call, in the model's order."""
        names = [name for name, _ in self._parameters if name in self._marks]
        if not names:
            return []
        marks = torch.stack([self._marks[name].cpu() for name in names]).isnan().tolist()
        for name, bad in zip(names, marks):
            if bad:
                self._marks[name].zero_()
        return [name for name, bad in zip(names, marks) if bad]

    def close(self) -> None:
        """Look no more."""
        while self._hooks:
            self._hooks.pop().remove()


def _look(mark: Tensor) -> Callable[[Tensor], None]:
    def look(gradient: Tensor) -> None:
        x = gradient.detach()
        x = x.coalesce().values() if x.is_sparse else x
        total = x.abs().sum() if x.is_complex() else x.sum(dtype=torch.float32 if x.element_size() <= 2 else None)
        mark.add_((total - total).to(mark.dtype))

    return look
