"""Mixed precision: as torch's autocast does it in one process, whatever the mesh; steps that overflow.

In bf16 a product is right to 2^-8 of its size. Cut over ranks, its terms are rounded in other places: losses of size 3
are held to 2e-2, and weights, which a few steps of AdamW move by 1e-2 each, to 2e-2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hybridpar as hp
from tests.models import IGNORED, gpt, mine, tokens
from tests.ranks import ranks

NEAR = 2e-2
STEPS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def built(tied: bool = True) -> nn.Module:
    return gpt(depth=2, tied=tied, kv_heads=4, dtype=torch.float32)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def plain(precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """torch's own autocast and GradScaler in one process: losses and weights."""
    model = built()
    optimizer = adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    losses = []
    for step in range(STEPS):
        ids, targets = tokens(step)
        with torch.autocast("cpu", DTYPES[precision]):
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def trained(
    mesh: Any, precision: str, microbatches: int = 2, tied: bool = True, **how: Any
) -> tuple[list[float], Any, Any]:
    model = hp.parallelize(built(tied), mesh, hp.CrossEntropy(), precision=precision, **how)
    optimizer = hp.DistributedOptimizer(adam(model.parameters()), model)
    losses = []
    for step in range(STEPS):
        losses.append(model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), microbatches))
        optimizer.step()
        optimizer.zero_grad()
    return losses, model, optimizer


def near(found: tuple[list[float], Any, Any], wanted: tuple[list[float], dict[str, torch.Tensor]], most: float) -> None:
    losses, model, _ = found
    torch.testing.assert_close(losses, wanted[0], rtol=0, atol=most)
    for name, x in model.full_state_dict().items():
        assert x.dtype is torch.float32
        torch.testing.assert_close(x, wanted[1][name], rtol=0, atol=most, msg=lambda told, name=name: f"{name}: {told}")


@ranks(1)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_one_rank_trains_as_torchs_autocast(precision: str) -> None:
    wanted = plain(precision)
    mesh = hp.init(seed=3)
    found = trained(mesh, precision, microbatches=1)
    assert found[0][0] == pytest.approx(wanted[0][0], abs=1e-6)
    near(found, wanted, 2e-3)  # gradients are rounded times another factor: ours are of a sum
    kept = trained(mesh, precision)
    again = trained(mesh, precision, recompute="full")
    assert kept[0] == again[0]
    for name, x in kept[1].full_state_dict().items():
        assert torch.equal(x, again[1].full_state_dict()[name]), name
    assert kept[1].predict(tokens(0)[0]).dtype is DTYPES[precision]
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [{"pipeline": 2, "tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_4_ranks_train_as_one_process_within_the_roundings(degrees: dict[str, int], precision: str) -> None:
    wanted = plain(precision)
    mesh = hp.init(seed=3, **degrees)
    near(trained(mesh, precision, sequence=True, recompute="full"), wanted, NEAR)
    mesh.close()


@ranks(2)
def test_stages_pass_half_precision_on_and_come_to_the_same_bits_as_one_rank() -> None:
    from mpi4py import MPI

    alone = hp.init(comm=MPI.COMM_SELF, seed=3)
    losses, model, _ = trained(alone, "bf16", tied=False)
    wanted = model.full_state_dict()
    alone.close()
    mesh = hp.init(seed=3, pipeline=2)
    found, model, _ = trained(mesh, "bf16", tied=False)
    assert found == losses
    for name, x in model.full_state_dict().items():
        assert torch.equal(x, wanted[name]), name
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [{"pipeline": 2, "tensor": 2}, {"data": 2, "pipeline": 2}], ids=str)
def test_an_overflow_on_one_rank_skips_the_step_on_all(degrees: dict[str, int], tmp_path: Path) -> None:
    mesh = hp.init(seed=3, **degrees)
    _, model, optimizer = trained(mesh, "fp16")
    before, scale = {name: p.detach().clone() for name, p in model.named_parameters()}, model.scaling.scale
    model.train_step(tuple(mine(x, mesh.data) for x in tokens(4)), 2)
    optimizer.synchronize()
    if mesh.rank == 3:
        next(model.parameters()).grad.view(-1)[0] = torch.inf
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(mesh.everyone.objects((model.scaling.scale, model.scaling.skipped))) == {(scale / 2, 1)}
    hp.save(tmp_path / "kept", model, optimizer)
    other = hp.parallelize(built(), mesh, hp.CrossEntropy(), precision="fp16")
    hp.load(tmp_path / "kept", other)
    assert other.scaling.state_dict() == model.scaling.state_dict()
    mesh.close()


@ranks(2)
def test_norms_are_of_gradients_without_the_scale_and_a_scale_too_large_is_found() -> None:
    mesh = hp.init(seed=3, tensor=2)
    norms = {}
    for precision in ("bf16", "fp16"):
        model = hp.parallelize(built(), mesh, hp.CrossEntropy(), precision=precision)
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        model.train_step(tokens(0), 2)
        norms[precision] = float(hp.clip_grad_norm_(model, 1.0))
    assert norms["fp16"] == pytest.approx(norms["bf16"], rel=NEAR)
    before = model.full_state_dict()
    model.scaling.scale = 2.0**40
    for _ in range(3):
        optimizer.zero_grad()
        model.train_step(tokens(0), 2)
        optimizer.step()
    assert (model.scaling.scale, model.scaling.skipped) == (2.0**37, 3)
    assert all(torch.equal(x, before[name]) for name, x in model.full_state_dict().items())
    mesh.close()


@ranks(2)
@pytest.mark.parametrize("zero", [1, 2])
def test_the_scale_reaches_gradients_that_lie_in_pieces(zero: int) -> None:
    mesh = hp.init(seed=3, data=2)
    found = []
    for cut in (0, zero):
        model = hp.parallelize(built(), mesh, hp.CrossEntropy(), precision="fp16")
        optimizer = hp.DistributedOptimizer(adam(model.parameters()), model, clip=0.5, zero=cut)
        for step in range(STEPS):
            model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), 2)
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.full_state_dict())
        model.scaling.scale = 2.0**40
        model.train_step(tuple(mine(x, mesh.data) for x in tokens(0)), 2)
        optimizer.step()
        assert (model.scaling.scale, model.scaling.skipped) == (2.0**39, 1)
        assert all(torch.equal(x, found[-1][name]) for name, x in model.full_state_dict().items())
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], rtol=0, atol=1e-3)  # other sums, in fp32, then fp16
    mesh.close()


@ranks(1)
def test_sound_steps_double_the_scale_and_gradients_add_up_over_train_steps() -> None:
    mesh = hp.init(seed=3)
    found = {}
    for precision in ("bf16", "fp16"):
        model = hp.parallelize(built(), mesh, hp.CrossEntropy(), precision=precision)
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model)
        for _ in range(2):
            model.train_step(tokens(0))
            optimizer.step()
        found[precision] = next(model.parameters()).grad
    assert (found["fp16"] - found["bf16"]).norm() < 3e-2 * found["bf16"].norm()
    model.scaling.interval = 4
    for _ in range(2):
        optimizer.zero_grad()
        model.train_step(tokens(0))
        optimizer.step()
    assert (model.scaling.scale, model.scaling.sound) == (2.0**17, 0)
    mesh.close()


@ranks(1)
def test_what_precision_cannot_do_is_refused() -> None:
    mesh = hp.init(seed=3)
    with pytest.raises(ValueError, match='precision=.fp8.: choose "bf16", "fp16", or None'):
        hp.parallelize(built(), mesh, precision="fp8")
    with pytest.raises(ValueError, match='embed.token.weight is torch.float64 and precision="bf16"'):
        hp.parallelize(gpt(), mesh, precision="bf16")
    model = hp.parallelize(built(), mesh, hp.CrossEntropy(), precision="fp16")
    with pytest.raises(ValueError, match="hp.DistributedOptimizer alone undoes: wrap the optimizer in"):
        model.train_step(tokens(0))
    with pytest.raises(ValueError, match='use precision="bf16", or sync="allreduce"'):
        hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sync="local_sgd(2)")
    mesh.close()
