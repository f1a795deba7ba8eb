"""Dropout whose masks are the same in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridpar.seeds import Draw
from hybridpar.shard import Range


class Cut(Protocol):
    """Which dim of a tensor is cut, and which global indices of it are here; `sequence.Sequence` is one."""

    dim: int

    def ranges(self, held: int) -> Sequence[Range]:
        """The global indices of the `held` local ones."""


_FORWARD = -1  # torch's number of the backward pass that is under way, where there is none


@dataclass(frozen=True)
class Held:
    """A dim that is always cut the same way, such as the heads."""

    dim: int
    parts: tuple[Range, ...]

    def ranges(self, held: int) -> tuple[Range, ...]:
        return self.parts


class Dropout(nn.Module):
    """nn.Dropout with a mask that depends on (seed, site, step, sample, global element) only.

    `site` is the module's global name; `cut` says which part of a whole tensor the input is (None: all of it). With
    `channels` whole channels are dropped, as nn.Dropout1d, 2d and 3d do: dims after the second share an element's fate.
    In eval mode, and with p = 0, the input is returned.

    A module that is called several times by its parent draws a new mask each time. Calls are counted from the parent's
    entry (`restart`), so a forward that is recomputed for its backward draws the same masks again.

    Example:
        >>> dropout = Dropout(0.5, "blocks.0.dropout", Draw(seed=0, samples=torch.arange(4)))
        >>> dropout(torch.ones(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(self, p: float, site: str, draw: Draw, cut: Cut | None = None, channels: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"{site}: p={p} is not a probability")
        self.p, self.site, self.cut, self.channels = p, site, cut, channels
        self._draw, self._calls, self._turn = draw, 0, draw.turn
        self._most, self._restarted = 0, _FORWARD  # calls in a forward; the backward in which they were last restarted

    def forward(self, x: Tensor) -> Tensor:  # [b, ...] -> [b, ...]
        if not self.training or self.p == 0:
            return x
        if self._turn != self._draw.turn:
            self._calls, self._turn = 0, self._draw.turn
        backward = torch._C._current_graph_task_id()
        if backward == _FORWARD:
            self._most = max(self._most, self._calls + 1)
        elif self._restarted != backward:
            self._calls = self._recomputed()
        site = f"{self.site}:{self._calls}"
        self._calls += 1
        shape = x.shape[:2] if self.channels else x.shape
        dim = None if self.cut is None else self.cut.dim % x.dim()
        parts = () if self.cut is None else self.cut.ranges(x.shape[dim])
        keep = self._draw.keep(site, shape, self.p, dim, parts, x.device)
        keep = keep.view(*shape, *(1,) * (x.dim() - len(shape)))
        return (x * keep).mul_(0.0 if self.p == 1 else 1 / (1 - self.p))

    def restart(self) -> None:
        """Count calls from here."""
        self._calls, self._turn, self._restarted = 0, self._draw.turn, torch._C._current_graph_task_id()

    def _recomputed(self) -> int:
        """Which call a checkpoint recomputes that is around this module and not around its parent."""
        if self._most > 1:
            raise ValueError(
                f"{self.site} is called {self._most} times in a forward, and a checkpoint recomputes one of these "
                "calls without the module around: which mask it had is not known; checkpoint the module that holds it"
            )
        return 0

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site!r}, cut={self.cut}"


def restart(parent: nn.Module, inputs: Any) -> None:
    """A forward pre-hook for the parents of Dropout modules."""
    for child in parent.children():
        if isinstance(child, Dropout):
            child.restart()
