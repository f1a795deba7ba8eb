"""Elastic averaging: replicas explore around a centre that pulls them and that they pull.

Every k steps, with pull = beta and D replicas, for each replica i at once:

    weights_i <- weights_i - beta / D * (weights_i - centre)
    centre    <- centre + beta / D * sum over i of (weights_i - centre)

Zhang, Choromanska, LeCun 2015, Deep learning with Elastic Averaging SGD, https://arxiv.org/abs/1412.6651: equations
(5) and (6) in the synchronous form, with a period. The centre is the model; `meet` makes it that of all replicas.
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
from hybridpar.optim.sync.wish import Easgd
from hybridpar.wires.axis import Alone, Axis


class Elastic:
    """The centre of the replicas along `between`, a copy on each.

    Example:
        >>> DistributedOptimizer(sgd, model, sync="easgd(8)")       # doctest: +SKIP
    """

    own_states = True

    def __init__(self, model: Parallel, between: Axis, wish: Easgd, wire: Wire) -> None:
        self.company: Axis = Alone("company", model.world.rank)
        self._between, self._wish, self._wire = between, wish, wire
        self._weights = Weights(model)
        self._centre: Tensor | None = None  # [count], alike on all replicas
        self._done, self._explored = 0, False

    @property
    def axes(self) -> Sequence[Axis]:
        """Those on which replicas send each other gradients or weights."""
        return (self._between,)

    @property
    def apart(self) -> str | None:
        """Why replicas may hold different weights now, or None."""
        return "each replica has its own place around the centre" if self._explored else None

    def before(self) -> None:
        """The user's optimizer is about to step."""
        if self._centre is None:
            self._centre = self._weights.read()

    def after(self) -> None:
        """It has stepped."""
        self._done, self._explored = self._done + 1, True
        if self._done == self._wish.steps:
            self._pull()

    def meet(self) -> None:
        """Give all replicas the weights of the centre; all call it together."""
        if self._done:
            self._pull()
        if self._explored:
            assert self._centre is not None
            self._weights.write(self._centre)
            self._explored = False

    def state(self) -> dict[Parameter, dict[str, Tensor]]:
        """What a checkpoint keeps beside the weights, which are the centre when replicas are not apart."""
        kept: dict[Parameter, dict[str, Tensor]] = {p: {} for p in self._weights.parameters}
        if self._centre is not None:
            for p, piece in self._weights.of(self._centre).items():
                if p.dtype != piece.dtype:  # it holds more than the weights do
                    kept[p]["centre"] = piece
        return kept

    def restore(self, kept: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Go on from the weights as they are now, with what was kept."""
        self._centre, self._done, self._explored = None, 0, False
        if any("centre" in one for one in kept.values()):
            self._centre = self._weights.read()
            for p, piece in self._weights.of(self._centre).items():
                if "centre" in kept.get(p, {}):
                    piece.copy_(kept[p]["centre"])

    @torch.no_grad()
    def _pull(self) -> None:
        assert self._centre is not None
        weights = self._weights.read()
        away = weights - self._centre
        weights.sub_(away, alpha=self._wish.pull / self._between.size)
        self._weights.write(weights)
        self._centre.add_(self._wire.start(self._between, away, "away").wait(), alpha=self._wish.pull)
        self._done = 0
