"""The ranks that step together: all of them, or those of the replicas that a sync policy leaves to themselves.

A report asks nobody else, so that no replica waits for another one that its policy does not wait for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridpar.engine import ParallelModel


class Together:
    """`replicas` is the axis through those that step with this one, `size` the number of all their ranks.

    Example:
        >>> Together(model).allreduce(x, "max")         # doctest: +SKIP
    """

    def __init__(self, model: ParallelModel) -> None:
        world, company = model.world, model._company
        self.replicas, self.size = company._axis, company.size * world.replica.size
        self._axes = [world.everyone] if self.size == world.everyone.size else [world.replica, self.replicas]

    def allreduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Combine `x` (changed in place) over all of them."""
        for axis in self._axes:
            x = axis.allreduce(x, op)
        return x

    def objects(self, value: Any) -> list[Any]:
        """Each one's small value."""
        values = [value]
        for axis in self._axes:
            values = [one for several in axis.objects(values) for one in several]
        return values

    def barrier(self) -> None:
        """Return when all of them have come here."""
        for axis in self._axes:
            axis.barrier()
