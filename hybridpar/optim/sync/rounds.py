"""Rounds: each replica trains for itself, then an outer optimizer steps by what all moved on average.

    step            1 ... k  |  k+1 ... k+delay  ...  2k |
    replica 0       w0 --> a |                           |      moved = mean of (anchor - a), (anchor - b), ...
    replica 1       w0 --> b |                           |      anchor <- Nesterov(anchor, moved)
    on its way               |- moved ---->              |      each: weights <- anchor, and what it did meanwhile

    local_sgd   Stich 2018, Local SGD Converges Fast and Communicates Little, https://arxiv.org/abs/1805.09767: the
                outer optimizer is a plain step of lr 1, so the anchor becomes the mean of the weights; McMahan et al.
                2016, https://arxiv.org/abs/1602.05629
    diloco      Douillard et al. 2023, DiLoCo, https://arxiv.org/abs/2311.08105, algorithm 1: Nesterov, lr 0.7,
                momentum 0.9; the inner optimizer and its state are each replica's own
    delay       Douillard et al. 2025, Streaming DiLoCo with overlapping communication,
                https://arxiv.org/abs/2501.18512, section 3.2; here what a replica did meanwhile is kept whole
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.compression import Wire
from hybridpar.optim.model import Parallel
from hybridpar.optim.sync.weights import Weights
from hybridpar.optim.sync.wish import DiLoCo
from hybridpar.wires.axis import Axis, Handle


class Rounds:
    """The outer optimizer of the replicas along `between`; gradients are averaged in every step along `company`.

    Example:
        >>> DistributedOptimizer(adamw, model, sync="diloco(64, delay=8)")      # doctest: +SKIP
    """

    own_states = True

    def __init__(self, model: Parallel, company: Axis, between: Axis, wish: DiLoCo, wire: Wire) -> None:
        self.company, self._between, self._wish, self._wire = company, between, wish, wire
        self._weights = Weights(model)
        self._anchor: Tensor | None = None  # [count], alike on all replicas
        self._momentum: Tensor | None = None  # [count]
        self._left: Tensor | None = None  # [count], this replica's weights when what is on its way left
        self._under_way: Handle | None = None
        self._done = 0

    @property
    def axes(self) -> Sequence[Axis]:
        """Those on which replicas send each other gradients or weights."""
        return (self.company, self._between)

    @property
    def apart(self) -> str | None:
        """Why replicas may hold different weights now, or None."""
        if not self._done and self._under_way is None:
            return None
        return f"this is step {self._done} of a round of {self._wish.steps}"

    def before(self) -> None:
        """The user's optimizer is about to step."""
        if self._anchor is None:
            self._anchor = self._weights.read()

    def after(self) -> None:
        """It has stepped."""
        self._done += 1
        if self._under_way is not None:
            self._under_way.done()
            if self._done == self._wish.delay:
                self._finish()
        if self._done == self._wish.steps:
            self._begin()
            if not self._wish.delay:
                self._finish()

    def meet(self) -> None:
        """End the round now, so that all replicas hold the same weights; all call it together."""
        if self._under_way is not None:
            self._finish()
            self._left = None
        if self.apart:
            self._begin()
            self._left = None  # nothing is done meanwhile
            self._finish()

    def state(self) -> dict[Parameter, dict[str, Tensor]]:
        """What a checkpoint keeps beside the weights, which are the anchor when replicas are not apart."""
        kept: dict[Parameter, dict[str, Tensor]] = {p: {} for p in self._weights.parameters}
        if self._momentum is not None:
            for p, piece in self._weights.of(self._momentum).items():
                kept[p]["momentum"] = piece
        if self._anchor is not None:
            for p, piece in self._weights.of(self._anchor).items():
                if p.dtype != piece.dtype:  # it holds more than the weights do
                    kept[p]["anchor"] = piece
        return kept

    def restore(self, kept: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Go on from the weights as they are now, with what was kept."""
        self._anchor, self._momentum, self._left, self._under_way, self._done = None, None, None, None, 0
        if any("momentum" in one for one in kept.values()):
            self._momentum = torch.zeros_like(self._weights.read())
            self._take(self._momentum, "momentum", kept)
        if any("anchor" in one for one in kept.values()):
            self._anchor = self._weights.read()
            self._take(self._anchor, "anchor", kept)

    def _take(self, flat: Tensor, key: str, kept: Mapping[Parameter, Mapping[str, Any]]) -> None:
        for p, piece in self._weights.of(flat).items():
            if key in kept.get(p, {}):
                piece.copy_(kept[p][key])

    @torch.no_grad()
    def _begin(self) -> None:
        assert self._anchor is not None, "after() comes after before()"
        self._left = self._weights.read()
        self._under_way = self._wire.start(self._between, self._anchor - self._left, "moved")
        self._done = 0

    @torch.no_grad()
    def _finish(self) -> None:
        assert self._anchor is not None and self._under_way is not None
        moved = self._under_way.wait()
        self._under_way = None
        self._anchor.sub_(self._outer(moved), alpha=self._wish.lr)
        if self._wish.delay and self._left is not None:
            self._weights.write(self._weights.read().sub_(self._left).add_(self._anchor))
        else:
            self._weights.write(self._anchor)
        self._left = None

    def _outer(self, moved: Tensor) -> Tensor:
        """The direction of torch.optim.SGD(momentum=..., nesterov=True) for the gradient `moved`."""
        momentum = self._wish.momentum
        if not momentum:
            return moved
        self._momentum = moved.clone() if self._momentum is None else self._momentum.mul_(momentum).add_(moved)
        return moved.add(self._momentum, alpha=momentum)
