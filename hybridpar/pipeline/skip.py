"""Skip connections over stage boundaries (Kim et al. 2020, torchgpipe, arXiv:2004.09910, section 3.2).

    Sequential(a, skip.stash, b, c, skip.pop, d)         the output of `a` is joined to that of `c`

In one process a stashed tensor waits in a box that the two ends share. In a pipeline it travels with the activation
through the stages between, and its gradient travels back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Skip:
    """A named connection: put `stash` where the tensor is made and `pop` where it is used.

    `join(x, stashed)` combines them; addition by default.

    Example:
        >>> skip = Skip("residual")
        >>> model = nn.Sequential(nn.Linear(4, 4), skip.stash, nn.Tanh(), skip.pop)
        >>> model(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, name: str, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        box: dict[str, Tensor] = {}
        self.stash, self.pop = Stash(name, box), Pop(name, box, join)


class Stash(nn.Module):
    """Keeps what passes for its `Pop`."""

    def __init__(self, name: str, box: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.box = name, box

    def forward(self, x: Tensor) -> Tensor:
        self.box[self.name] = x
        return x


class Pop(nn.Module):
    """Joins what its `Stash` kept to what passes."""

    def __init__(self, name: str, box: dict[str, Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.box, self.join = name, box, join

    def forward(self, x: Tensor) -> Tensor:
        if self.name not in self.box:
            raise ValueError(
                f"skip {self.name!r} was popped before anything was stashed: put its stash "
                "earlier, and give each Skip a name of its own"
            )
        return self.join(x, self.box.pop(self.name))


def boxes(module: nn.Module) -> list[dict[str, Tensor]]:
    """The boxes of all skips that begin or end in `module`, each once."""
    found = {id(m.box): m.box for m in module.modules() if isinstance(m, Stash | Pop)}
    return list(found.values())
