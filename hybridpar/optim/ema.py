"""The moving average of a model's weights, each rank its shards: no rank ever holds the whole.

    average = decay * average + (1 - decay) * weight         after each step (Polyak & Juditsky 1992)

Averages of 16-bit weights are kept in fp32: a thousandth of a difference is lost in bf16, and they would never move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hybridpar.optim.model import Parallel
from hybridpar.optim.zero.piece import put, value


class EMA:
    """The average of `model`'s parameters with `decay`, which begins with the parameters as they are.

    Call `update()` after `optimizer.step()`; within `applied()` the model has the averages in the place of its weights.
    Buffers (running statistics) stay the model's own. `hp.save` and `hp.load` take it beside the model.

    Raises ValueError for a decay that is none, and in `update` within `applied()` or under a sync policy that lets
    replicas differ.

    Example:
        >>> ema = hp.EMA(model, decay=0.999)                # doctest: +SKIP
        >>> optimizer.step(); ema.update()                  # doctest: +SKIP
        >>> with ema.applied():                             # doctest: +SKIP
        ...     loss = model.eval_step(batch)
    """

    def __init__(self, model: Parallel, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: what is kept of the average at each update is at least 0 and less than 1")
        self.decay, self.updates, self.is_applied = decay, 0, False
        self._model = model
        self.averages: dict[str, Tensor] = {
            name: value(p).to(_wide(p.dtype), copy=True)
            for chunk in model.chunks()
            for name, p in chunk
            if p.is_floating_point()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        self.check_apart("update()")
        if self._model.on_their_own:
            raise ValueError(
                "replicas train for themselves under this sync policy, so their averages would differ: average what "
                'hp.save keeps after optimizer.meet(), or use sync="allreduce"'
            )
        for name, p in self._weights():
            self.averages[name].lerp_(value(p).to(self.averages[name].dtype), 1 - self.decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model's weights are the averages: for evaluation, predictions, `full_state_dict`."""
        self.check_apart("applied()")
        own = self._exchange({})
        self.is_applied = True
        try:
            yield
        finally:
            self.is_applied = False
            self._exchange(own)

    def check_apart(self, what: str) -> None:
        """Raises ValueError, naming `what` was called, if the model has the averages in the place of its weights."""
        if self.is_applied:
            raise ValueError(f"{what} in ema.applied(), where weights and averages have changed places: call it later")

    @torch.no_grad()
    def _exchange(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights and averages change places; returns the weights whose averages are wider, and so keep their place,
        and takes them back as `own`."""
        aside: dict[str, Tensor] = {}
        for name, p in self._weights():
            kept = value(p).clone()
            put(p, own.get(name, self.averages[name]))
            if p.dtype == self.averages[name].dtype:
                self.averages[name].copy_(kept)
            else:
                aside[name] = kept
        return aside

    def _weights(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for chunk in self._model.chunks() for name, p in chunk if name in self.averages]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
