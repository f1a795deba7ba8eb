"""The replicas that take a training step together: what their batch weighs, and its loss.

    all of them       their average of gradients is that of one process
    some, or one      under the sync policies of optim/sync: the loss is then that of these alone
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridpar.support import unsynced
from hybridpar.wires.axis import Axis
from hybridpar.wires.world import World


class Company:
    """The replicas along `axis`, which is world.data or a part of it; `in_step` if a module of theirs makes them meet.

    Raises ValueError where such a module needs replicas that are not of the company.

    Example:
        >>> Company(world, world.data).count(samples=8, micros=2, weight=8.0)       # doctest: +SKIP
        (0, 16.0)
    """

    def __init__(self, world: World, axis: Axis, in_step: bool = False) -> None:
        refused = unsynced(world.peers.size, axis.size) if in_step else None
        if refused is not None:
            raise ValueError(refused)
        self._world, self._in_step = world, in_step
        self._whole = axis.size == world.peers.size
        self._axis = world.peers if self._whole else axis  # a count must not wait for a Horovod cycle
        self.size = axis.size

    def count(self, samples: int, micros: int, weight: float) -> tuple[int, float]:
        """(samples of the replicas before this one, the weight of all batches) of a step.

        Raises ValueError where replicas that must meet have different numbers of microbatches.
        """
        axis = self._axis
        counts = torch.zeros(axis.size + 2, dtype=torch.float64)
        counts[axis.index], counts[-2], counts[-1] = samples, micros, weight
        axis.allreduce(counts)
        if self._in_step and counts[-2] != micros * axis.size:
            raise ValueError(
                f"the {axis.size} replicas cut their batches into {counts[-2]:.0f} microbatches, this one into "
                f"{micros}, and a SyncBatchNorm, zero=2 or zero=3 needs the same number from each: use fewer, or "
                "drop_last=True"
            )
        # Companies do not ask each other: their samples are told apart, for dropout, as if all had as many.
        earlier = self._world.mesh.place(axis.ranks[0]).data * samples
        return earlier + int(counts[: axis.index].sum()), float(counts[-1])

    def total(self, value: Tensor) -> Tensor:
        """The sum of all ranks' `value` (changed in place)."""
        if self._whole:
            return self._world.everyone.allreduce(value)
        return self._axis.allreduce(self._world.replica.allreduce(value))
