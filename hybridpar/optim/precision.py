"""Mixed precision: half precision where torch's autocast wants it, fp32 weights, and the scale of fp16's losses.

    weights fp32 -> a copy in bf16 or fp16 for each product -> activations, messages in that type -> gradients fp32

fp16 ends at 6e-8 below: losses are multiplied by a scale, and gradients divided by it before anyone looks at them. A
gradient that is not finite on any rank skips the step on all of them and halves the scale; after enough sound steps the
scale doubles (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2). Scales are powers of two, so
nothing is rounded by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hybridpar.support import Combination, check
from hybridpar.wires.axis import Axis

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST, _LEAST, _MOST = 2.0**16, 2.0**-14, 2.0**40

Casting = Callable[[], AbstractContextManager[Any]]


def casting(precision: str | None, module: nn.Module, device: torch.device) -> Casting:
    """What to run forwards of `module` in: autocast to `precision`, "bf16" or "fp16", or for None nothing.

    Raises ValueError for another word, and for a module whose weights are not fp32.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with casting("bf16", layer, torch.device("cpu"))():
        ...     layer(torch.ones(1, 2)).dtype
        torch.bfloat16
    """
    check(Combination(precision=precision))
    if precision is None:
        return nullcontext
    for name, p in module.named_parameters():
        if p.is_floating_point() and p.dtype is not torch.float32:
            raise ValueError(
                f'{name} is {p.dtype} and precision="{precision}" computes with copies of fp32 weights: build the '
                "module in fp32, or leave out precision"
            )
    return lambda: torch.autocast(device.type, _DTYPES[precision])


class Scaling:
    """The scale of fp16's losses, alike on all ranks. `interval` sound steps double it.

    Example:
        >>> p = torch.tensor([1.0])
        >>> scaling = Scaling(first=4.0)
        >>> scaling.watch(lambda: [p])
        >>> _ = p.zero_().add_(scaling.begin())     # a gradient of 1, by a scaled loss
        >>> scaling.unscale(); p.item()
        1.0
    """

    def __init__(self, first: float = _FIRST, interval: int = 2000) -> None:
        self.scale, self.interval = first, interval
        self.sound, self.skipped = 0, 0  # steps since the scale changed; steps skipped in all
        self._gradients: Callable[[], Iterable[Tensor]] | None = None
        self._scaled = False

    def watch(self, gradients: Callable[[], Iterable[Tensor]]) -> None:
        """`gradients()` are those to be divided: an optimizer says so that knows of the scale."""
        self._gradients = gradients

    @torch.no_grad()
    def begin(self) -> float:
        """A training step begins: the scale of its losses, and of the gradients that are there already.

        Raises ValueError where no hp.DistributedOptimizer will divide by it.
        """
        if self._gradients is None:
            raise ValueError(
                'precision="fp16" scales gradients, which hp.DistributedOptimizer alone undoes: wrap the optimizer in '
                'it before train_step, or use precision="bf16"'
            )
        if not self._scaled:
            for gradient in self._gradients():
                gradient.mul_(self.scale)
        self._scaled = True
        return self.scale

    @torch.no_grad()
    def unscale(self) -> None:
        """Divide the gradients by the scale, once in a step; they must be complete."""
        if self._scaled and self._gradients is not None:
            for gradient in self._gradients():
                gradient.div_(self.scale)
        self._scaled = False

    @torch.no_grad()
    def agree(self, everyone: Axis) -> bool:
        """Whether the gradients are finite on all ranks, which call it together; moves the scale."""
        assert self._gradients is not None and not self._scaled
        finite = [gradient.isfinite().all() for gradient in self._gradients()]
        bad = torch.tensor([0.0 if all(map(bool, finite)) else 1.0])
        if everyone.notes.allreduce(bad, "max")[0]:
            self.scale, self.sound = max(self.scale / 2, _LEAST), 0
            self.skipped += 1
            return False
        self.sound += 1
        if self.sound == self.interval:
            self.scale, self.sound = min(self.scale * 2, _MOST), 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counts."""
        return {"scale": self.scale, "sound": self.sound, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.scale, self.sound, self.skipped = float(state["scale"]), int(state["sound"]), int(state["skipped"])
