"""The gradient's norm, caught between its averages and the optimizer's step, and what the optimizer tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridpar.optim.clip import grad_norm
from hybridpar.optim.distributed import DistributedOptimizer
from hybridpar.optim.model import Parallel
from hybridpar.wires.axis import Axis


class Norm:
    """The norm of the whole model's gradient when the optimizer steps, before clipping, in steps in which `due()`.

    Example:
        >>> norm = Norm(model, optimizer, due=lambda: True)     # doctest: +SKIP
        >>> optimizer.step(); norm.take()                       # doctest: +SKIP
        1.25
    """

    def __init__(self, model: Parallel, optimizer: torch.optim.Optimizer | None, due: Callable[[], bool]) -> None:
        self._model, self._optimizer, self._due = model, optimizer, due
        self._norm: Tensor | None = None
        inner = optimizer.inner if isinstance(optimizer, DistributedOptimizer) else optimizer
        # Horovod's own optimizer calls such hooks before its averages have come.
        watched = inner is not None and not horovods(inner)
        self._hook = inner.register_step_pre_hook(self._look) if watched else None

    def take(self) -> float | None:
        """The norm, once; None if no step was made."""
        norm, self._norm = self._norm, None
        return None if norm is None else float(norm)

    def close(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, *_: Any) -> None:
        if self._due():
            known = getattr(self._optimizer, "norm", None)  # from before clipping
            self._norm = known if known is not None else grad_norm(self._model)


def lags(optimizer: torch.optim.Optimizer | None) -> tuple[int, int]:
    """Under bounded staleness the steps so far, and by how many steps the slowest replica was behind in all of them.

    Example:
        >>> lags(None)
        (0, 0)
    """
    counted = getattr(getattr(optimizer, "policy", None), "lags", {})
    return sum(counted.values()), sum(behind * steps for behind, steps in counted.items())


def between(optimizer: torch.optim.Optimizer | None) -> Sequence[Axis]:
    """The axes on which the optimizer's sync policy sends.

    Example:
        >>> between(None)
        ()
    """
    return optimizer.policy.axes if isinstance(optimizer, DistributedOptimizer) else ()


def why(optimizer: torch.optim.Optimizer | None) -> str:
    """What the optimizer has to do with replicas that differ, to go on with after "they differ"; empty if nothing."""
    if optimizer is None or isinstance(optimizer, DistributedOptimizer) or horovods(optimizer):
        return ""
    name = type(optimizer).__name__
    return f"; the optimizer is a plain {name}, which averages no gradients: use hp.DistributedOptimizer({name}, model)"


def horovods(optimizer: torch.optim.Optimizer) -> bool:
    """Whether Horovod has wrapped it (in a class made on the spot, which has nothing else to be known by)."""
    return hasattr(optimizer, "skip_synchronize") and not isinstance(optimizer, DistributedOptimizer)
