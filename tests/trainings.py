"""Whole trainings as scripts have them, for `hp.verify`: each function makes one that it can call several times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.models.gpt import GPT
from tests.models import IGNORED, mine

VOCABULARY = 23
TOKENS = 6
SAMPLES = 7  # replicas and microbatches are unequal


class Norms(nn.Module):
    """An MLP that is cut over the tensor axis, then a batch norm and a layer."""

    tensor_plan = {"mlp.up": "column", "mlp.down": "row"}
    chain = ("mlp", "norm", "out")

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        for name, part in (("up", nn.Linear(6, 10)), ("act", nn.Tanh()), ("down", nn.Linear(10, 8))):
            self.mlp.add_module(name, part)
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.mlp(x)))


def gpt(tied: bool = True, dropout: float = 0.0, kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(1)
    return GPT(VOCABULARY, 16, 2, 4, TOKENS, kv_heads, dropout, tied).to(dtype)


def tokens(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets) [b, l]; the first sample's targets are mostly ignored, so microbatches count unequally."""
    text = torch.randint(VOCABULARY, (SAMPLES, TOKENS + 1), generator=torch.Generator().manual_seed(step))
    targets = text[:, 1:].clone()
    targets[0, 1:] = IGNORED
    return text[:, :-1], targets


def numbers(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) [b, 6] and [b, 3]."""
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].sin()


Stepper = Callable[[Any], Any]


def adam(model: Any) -> Any:
    return hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, clip=0.5)


def plain_adam(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def horovods(model: Any) -> Any:
    import horovod.torch as hvd

    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(sgd, named_parameters=list(model.named_parameters()))


def changing(change: Callable[[Any], None], stepper: Stepper = adam) -> Stepper:
    """`change(model)` after each step of the optimizer."""

    def wrapped(model: Any) -> Any:
        optimizer = stepper(model)
        zero = optimizer.zero_grad

        def after() -> None:
            change(model)
            zero()

        optimizer.zero_grad = after
        return optimizer

    return wrapped


def training(
    build: Callable[[], nn.Module] = gpt,
    stepper: Stepper = adam,
    batches: Callable[[int], Any] = tokens,
    loss: Any = None,
    microbatches: int = 2,
    before_step: Callable[[Any, int], None] | None = None,
    prepared: Callable[[Any], None] | None = None,
    init: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[[], None]:
    """A training of four steps. `before_step(model, step)` is called before the optimizer steps."""

    def train() -> None:
        mesh = hp.init(seed=3, **(init or {}))
        model = hp.parallelize(build(), mesh, loss=loss or hp.CrossEntropy(), **options)
        if prepared is not None:
            prepared(model)
        optimizer = stepper(model)
        for step in range(4):
            batch = tuple(mine(x, mesh.data) for x in batches(step))
            model.train_step(batch, microbatches=microbatches)
            if before_step is not None:
                before_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        mesh.close()

    return train


def norms(**options: Any) -> Callable[[], None]:
    """Trains `Norms` on numbers."""

    def build() -> Norms:
        torch.manual_seed(2)
        return Norms()

    return training(build, batches=numbers, loss=F.mse_loss, **options)
