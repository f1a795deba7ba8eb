"""Weights in bf16 whose steps are rounded by chance: right on average, alike where they must be, kept and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hybridpar as hp
from tests.models import gpt, layers, mine, numbers, tokens
from tests.ranks import ranks


def wrapped(mesh: Any, module: nn.Module, zero: int = 0, rounding: str | None = "stochastic", lr: float = 1e-2) -> Any:
    model = hp.parallelize(module, mesh, hp.CrossEntropy() if hasattr(module, "embed") else F.mse_loss)
    adam = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, hp.DistributedOptimizer(adam, model, zero=zero, rounding=rounding)


def steps(model: Any, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        model.train_step(tuple(mine(x, model.world.data) for x in tokens(step)), 2)
        optimizer.step()
        optimizer.zero_grad()


@ranks(1)
def test_small_steps_are_taken_on_average_which_the_nearest_numbers_would_lose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hybridpar.optim import rounding

    monkeypatch.setattr(rounding, "_AT_ONCE", 5000)  # weight and bias go one after the other
    mesh = hp.init(seed=3)
    moved = {}
    for how in (None, "stochastic"):
        model = hp.parallelize(nn.Linear(100, 100).bfloat16(), mesh, F.mse_loss)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = hp.DistributedOptimizer(sgd, model, rounding=how)
        rate, seen = torch.optim.lr_scheduler.StepLR(sgd, 100), []
        sgd.register_step_pre_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        for _ in range(10):
            model._draw.step += 1
            for p in model.parameters():
                p.grad = torch.full_like(p, -1e-3)
            optimizer.step()
            rate.step()
        moved[how] = {name: float(p.detach().float().mean()) - 1 for name, p in model.named_parameters()}
        assert len(seen) == 10, "hooks see each step once"
    mesh.close()
    assert moved[None] == {"weight": 0.0, "bias": 0.0}
    assert moved["stochastic"]["weight"] == pytest.approx(1e-2, rel=0.05)
    assert moved["stochastic"]["bias"] == pytest.approx(1e-2, rel=0.5)


@ranks(4)
@pytest.mark.parametrize("zero", [0, 3])
def test_ranks_that_hold_the_same_weights_round_them_alike_and_a_checkpoint_goes_on(zero: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    mesh = hp.init(seed=3, tensor=2)
    model, optimizer = wrapped(mesh, gpt(kv_heads=4, dtype=torch.bfloat16), zero)
    with hp.Watch(model, optimizer, progress=False, drift=1, strict=True) as watch:
        for step in range(3):
            steps(model, optimizer, range(step, step + 1))
            watch.step(0.0)
    assert all(x.dtype is torch.bfloat16 for s in optimizer.state.values() for x in s.values() if x.dim())
    hp.save(tmp_path / "kept", model, optimizer)
    steps(model, optimizer, range(3, 5))
    wanted = model.full_state_dict()
    again = wrapped(mesh, gpt(kv_heads=4, dtype=torch.bfloat16), zero)
    hp.load(tmp_path / "kept", *again)
    steps(*again, range(3, 5))
    assert all(torch.equal(x, wanted[name]) for name, x in again[0].full_state_dict().items())
    mesh.close()


@ranks(2)
def test_heads_that_two_ranks_hold_are_rounded_alike_on_both() -> None:
    mesh = hp.init(seed=3, tensor=2)
    model, optimizer = wrapped(mesh, gpt(kv_heads=1, dtype=torch.bfloat16))
    steps(model, optimizer, range(2))
    shared = [(p, spec) for (name, p), spec in zip(model.named_parameters(), model.specs().values()) if spec.overlaps]
    assert shared
    for p, spec in shared:
        told = mesh.tensor.objects({(a, b): p.narrow(spec.dim, s, b - a).tolist() for (a, b), s in starts(spec, mesh)})
        assert told[0][next(iter(set(told[0]) & set(told[1])))] == told[1][next(iter(set(told[0]) & set(told[1])))]
    mesh.close()


def starts(spec: Any, mesh: Any) -> list[tuple[tuple[int, int], int]]:
    """The ranges that this rank holds, and where each begins in its shard."""
    found, start = [], 0
    for first, last in spec.held(mesh.tensor.index):
        found.append(((first, last), start))
        start += last - first
    return found


@ranks(1)
def test_what_is_not_finite_stays_so_and_other_weights_are_refused() -> None:
    mesh = hp.init(seed=3)
    model, optimizer = wrapped(mesh, layers(4, 2, dtype=torch.bfloat16))
    model.train_step((numbers(2, 4).bfloat16(), numbers(2, 2).bfloat16()))
    p = next(model.parameters())
    p.grad.view(-1)[0], p.grad.view(-1)[1] = torch.nan, -0.0
    optimizer.step()
    assert p.isnan().sum() == 1 and p.view(-1)[0].isnan()
    with pytest.raises(ValueError, match="is for weights in bf16, and these are torch.float32"):
        wrapped(mesh, layers(4, 2, dtype=torch.float32))
    with pytest.raises(ValueError, match="rounding='up': choose"):
        wrapped(mesh, layers(4, 2, dtype=torch.bfloat16), rounding="up")
    mesh.close()
