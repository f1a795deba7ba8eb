"""The loss of a batch from its microbatches: the same as the user's function of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.loss import WeightedLoss
from hybridpar.wires.axis import Alone

CLASSES = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)

LOSSES = {
    "cross entropy": F.cross_entropy,
    "a partial one": partial(F.cross_entropy, ignore_index=0, label_smoothing=0.1),
    "weighted classes": nn.CrossEntropyLoss(weight=CLASSES, ignore_index=1),
    "weighted and smoothed": nn.CrossEntropyLoss(weight=CLASSES, label_smoothing=0.2),
    "negative log likelihood": nn.NLLLoss(ignore_index=0),
    "its function": F.nll_loss,
    "its function with weights": partial(F.nll_loss, weight=CLASSES),
}


def batch(*places: int) -> tuple[Tensor, Tensor]:
    """Logits [b, v, *places] of 3 classes and targets [b, *places]; the first samples have class 0 only."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(3, (11, *places), generator=generator)
    targets[:2] = 0
    return torch.randn(11, 3, *places, generator=generator, dtype=torch.float64), targets


# Three places for three classes: only torch's layout tells which dim is which.
@pytest.mark.parametrize("places", [(), (3,), (5,), (4, 3)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_torchs_losses_of_classes_are_the_same_over_unequal_microbatches(name: str, places: tuple[int, ...]) -> None:
    logits, targets = batch(*places)
    loss = WeightedLoss(LOSSES[name], Alone("tensor"), lambda: None)
    pieces = [(x, y, loss.weight(y, len(y))) for x, y in zip(logits.split([2, 3, 6]), targets.split([2, 3, 6]))]
    total = sum(loss.total(x, y, weight) for x, y, weight in pieces) / sum(weight for *_, weight in pieces)
    torch.testing.assert_close(total, LOSSES[name](logits, targets))


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_torchs_cross_entropy_also_takes_classes_in_the_last_dim(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, targets = batch(5)
    ours = WeightedLoss(loss, Alone("tensor"), lambda: None)
    total = ours.total(logits.movedim(1, -1), targets, ours.weight(targets, len(targets)))
    torch.testing.assert_close(total / targets.numel(), F.cross_entropy(logits, targets))
