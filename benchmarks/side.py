"""One rank of one candidate, and the gradient accumulation that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from benchmarks.work import Work, cross_entropy, optimizer

Step = Callable[[Tensor, Tensor], float | None]  # global batch (ids, targets), both [b, l] -> the loss as known here


@dataclass(frozen=True)
class Seat:
    """What a rank is told when it starts. A launcher with ranks of its own (mpirun) tells later: rank is then -1."""

    rank: int
    ranks: int
    meeting: Path  # a file through which torch's ranks find each other


@dataclass(frozen=True)
class Side:
    """`step` trains on a global batch, `barrier` returns when all ranks have come to it."""

    rank: int
    step: Step
    barrier: Callable[[], object]


def accumulating(
    work: Work,
    model: nn.Module,
    index: int = 0,
    replicas: int = 1,
    quiet: Callable[[], AbstractContextManager] = nullcontext,
    around_loss: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """A step on piece `index` of `replicas` of the batch: backward after each microbatch, then the optimizer.

    All backwards but the last run under `quiet()`, losses and backwards under `around_loss()`.
    """
    adam = optimizer(model.parameters())
    count = work.microbatches // replicas

    def step(ids: Tensor, targets: Tensor) -> float:
        micros = list(zip(*(whole.chunk(replicas)[index].chunk(count) for whole in (ids, targets))))
        total = 0.0
        for place, (x, y) in enumerate(micros):
            with quiet() if place < count - 1 else nullcontext():
                logits = model(x)
                with around_loss():
                    loss = cross_entropy(logits, y) / count
                    loss.backward()
            total += loss.item()
        adam.step()
        adam.zero_grad()
        return total

    return step


def nobody() -> None:
    """The barrier of a rank that meets no other."""
