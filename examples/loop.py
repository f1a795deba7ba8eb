"""What the training loops of the examples share: batches for ever, and a learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

import hybridpar as hp


def steps(loader: hp.DataLoader, count: int) -> Iterator[Any]:
    """`count` batches, epoch after epoch."""
    for _, batch in zip(range(count), _endless(loader)):
        yield batch


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
