"""A replica's batch of one step in microbatches, alike on all of its ranks, those included that do not look at it.

first stage, last stage      have the batch and tell its size and weight; where they have different ones they say so
stages between               may have `Elsewhere` in its place, and are told by the others
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hybridpar.microbatch import Elsewhere, fingerprint, split_batch
from hybridpar.shard import balanced
from hybridpar.wires.axis import Axis


@dataclass(frozen=True)
class Portion:
    """`parts` are what each microbatch has (None where it is elsewhere), `sizes` their samples, `weights` what each
    counts (empty where it is elsewhere), `weight` what all count."""

    parts: list[Any]
    sizes: list[int]
    weights: list[float]
    weight: float


def portion(
    batch: Any, microbatches: int, replica: Axis, largest: int = 0, weigh: Callable[[Any, int], float] | None = None
) -> Portion:
    """Cut `batch` as `split_batch` does; all ranks of `replica` call it together.

    Raises ValueError where the ranks were given different batches.

    Example:
        >>> from hybridpar.wires.axis import Alone
        >>> portion(torch.arange(5), 2, Alone("replica")).sizes
        [3, 2]
    """
    away = isinstance(batch, Elsewhere)
    cut = [] if away else split_batch(batch, microbatches, largest)
    parts, sizes = [part for part, _ in cut], [n for _, n in cut]
    weights = [weigh(part, n) for part, n in cut] if weigh is not None else []
    mine = [-math.inf] * 3 if away else [float(sum(sizes)), float(len(cut)), float(fingerprint(batch))]
    other = [-math.inf] * 3 if away else [-value for value in mine]
    told = torch.tensor([*mine, *other, -math.inf if away else sum(weights)], dtype=torch.float64)
    *numbers, weight = replica.allreduce(told, "max").tolist()
    samples, count = numbers[:2]
    if numbers[:3] != [-value for value in numbers[3:]]:
        own = "elsewhere" if away else f"{mine[0]:.0f} samples, microbatches={mine[1]:.0f}"
        raise ValueError(
            f"the {replica.size} ranks of one replica were given different batches (this one: {own}): choose samples "
            "by hvd.rank() or mesh.place.data, not by mesh.rank, and seed alike what is drawn at random in the data set"
        )
    if math.isinf(samples):
        raise ValueError("no rank of this replica was given a batch: make the hp.DataLoader with the model= it is for")
    if away:
        batch.samples = int(samples)
        sizes = [stop - start for start, stop in balanced(int(samples), int(count))]
        parts = [None] * len(sizes)
    return Portion(parts, sizes, weights, weight)
