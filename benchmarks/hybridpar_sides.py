"""The candidates that use hybridpar, through the same calls as any user's script."""

from __future__ import annotations

from torch import Tensor

import hybridpar as hp
from benchmarks.side import Seat, Side
from benchmarks.work import Work, optimizer


def data(work: Work, seat: Seat) -> Side:
    """Two replicas; Horovod reduces the gradients."""
    return _side(work)


def zero1(work: Work, seat: Seat) -> Side:
    """Two replicas, the optimizer's state cut."""
    return _side(work, zero=1)


def zero2(work: Work, seat: Seat) -> Side:
    """Two replicas, gradients cut too."""
    return _side(work, zero=2)


def zero3(work: Work, seat: Seat) -> Side:
    """Two replicas, weights cut too."""
    return _side(work, zero=3)


def tensor(work: Work, seat: Seat) -> Side:
    """Every layer cut in two."""
    return _side(work, tensor=seat.ranks)


def pipeline(work: Work, seat: Seat) -> Side:
    """Two stages, 1F1B."""
    return _side(work, pipeline=seat.ranks)


def interleaved(work: Work, seat: Seat) -> Side:
    """Two stages on each rank, which halves the bubble."""
    return _side(work, "interleaved", pipeline=seat.ranks)


def _side(work: Work, schedule: str = "1f1b", zero: int = 0, **degrees: int) -> Side:
    world = hp.init(**degrees)
    model = hp.parallelize(work.model(), world, loss=hp.CrossEntropy(), schedule=schedule)
    adam = hp.DistributedOptimizer(optimizer(model.parameters()), model, zero=zero)
    replicas = world.mesh.data

    def step(ids: Tensor, targets: Tensor) -> float:
        mine = tuple(whole.chunk(replicas)[world.place.data] for whole in (ids, targets))
        loss = model.train_step(mine, microbatches=work.microbatches // replicas)
        adam.step()
        adam.zero_grad()
        return float(loss)

    return Side(world.rank, step, world.everyone.barrier)
