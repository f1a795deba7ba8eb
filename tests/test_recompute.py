"""Activation checkpoints in the user's own code: what is recomputed has the masks that it had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridpar.seeds import Draw
from hybridpar.tensor.plan import apply
from hybridpar.wires.axis import Alone
from tests.against_one import CLOSE, made, numbers


class Around(nn.Module):
    """Calls each of `parts` some times, through a checkpoint or not."""

    def __init__(self, parts: Callable[[], list[nn.Module]], calls: int, kept: bool) -> None:
        super().__init__()
        self.parts, self.calls, self.kept = nn.ModuleList(parts()), calls, kept

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            for _ in range(self.calls):
                y = part(x) if self.kept else checkpoint(part, x, use_reentrant=False)
                x = y[0] if isinstance(y, tuple) else y
        return x


class Twice(nn.Module):
    """A block that calls its dropout twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(self.dropout(x)).tanh())


def gradients(parts: Callable[[], list[nn.Module]], calls: int, kept: bool) -> list[Tensor]:
    model, draw = made(lambda: Around(parts, calls, kept)), Draw(3)
    plan = {f"parts.{i}": "recurrent" for i, part in enumerate(model.parts) if isinstance(part, nn.LSTM)}
    apply(model, plan, Alone("tensor"), draw)
    x = numbers(3, 5, 4).requires_grad_()
    found = []
    for step in range(2):
        draw.step = step
        outputs = []
        for samples in (torch.arange(3), torch.arange(3, 6)):  # two forwards, then two backwards
            draw.samples = samples
            outputs.append((samples, model(x)))
        for samples, output in outputs:
            draw.samples = samples
            found += torch.autograd.grad(output.pow(2).sum(), [x, *model.parameters()])
    return found


def lstm() -> nn.Module:
    return nn.LSTM(4, 4, num_layers=3, dropout=0.5, batch_first=True)


@pytest.mark.parametrize(
    ("parts", "calls"),
    [
        (lambda: [nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5)], 1),
        (lambda: [Twice(), Twice()], 1),
        (lambda: [Twice()], 3),
        (lambda: [lstm()], 1),
        (lambda: [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))], 2),
    ],
)
def test_gradients_do_not_depend_on_whether_activations_are_kept(
    parts: Callable[[], list[nn.Module]], calls: int
) -> None:
    torch.testing.assert_close(gradients(parts, calls, kept=False), gradients(parts, calls, kept=True), **CLOSE)


@pytest.mark.parametrize("part", [lambda: nn.Dropout(0.5), lstm])
def test_one_of_several_calls_recomputed_by_itself_is_refused(part: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"is called 2 times in a forward, and a checkpoint recomputes one of these"):
        gradients(lambda: [part()], 2, kept=False)
