"""What the training loops of the examples share: batches for ever beside a line of progress, and a learning rate."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

import hybridpar as hp


def steps(loader: hp.DataLoader, count: int, mesh: Any) -> Iterator[tuple[Any, tqdm]]:
    """`count` batches, epoch after epoch, and with each the line of progress that the first rank shows."""
    often = 1 if sys.stderr.isatty() else 5
    with tqdm(total=count, disable=mesh.rank != 0, mininterval=often, unit="step", ncols=110) as line:
        for _, batch in zip(range(count), _endless(loader)):
            yield batch, line
            line.update()


def _endless(loader: hp.DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def warm_then_falling(optimizer: torch.optim.Optimizer, count: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of the steps up to the optimizer's rate, then down to a twentieth of it, as a cosine falls."""
    warm = count // 10 + 1

    def rate(step: int) -> float:
        fallen = min(1.0, max(0, step - warm) / max(1, count - warm))
        return min((step + 1) / warm, 0.05 + 0.475 * (1 + math.cos(math.pi * fallen)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
