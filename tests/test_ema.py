"""Optimizers under a mesh, held against a plain loop in fp64: averages of weights, groups, freezing, matrix optimizers.

Tolerances are those of test_equality: the same sums in another order, 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from tests.models import IGNORED, gpt, layers, mine, numbers, tokens
from tests.ranks import ranks

CLOSE = {"rtol": 0.0, "atol": 1e-10}
STEPS = 4
DECAY = 0.8
Named = Iterable[tuple[str, nn.Parameter]]


def built() -> nn.Module:
    return gpt(depth=2, kv_heads=4)


def groups(named: Named) -> torch.optim.Optimizer:
    """AdamW whose decay leaves out biases and norms, with another rate for the embedding."""
    named = list(named)
    embed = [p for name, p in named if name.startswith("embed")]
    small = [p for name, p in named if p.dim() < 2]
    rest = [p for name, p in named if p.dim() > 1 and not name.startswith("embed")]
    kinds = [{"params": rest}, {"params": small, "weight_decay": 0.0}, {"params": embed, "lr": 1e-3}]
    return torch.optim.AdamW(kinds, lr=1e-2, eps=1e-6, weight_decay=0.1)


def frozen(named: Named, step: int) -> None:
    """The embedding, tied to the head, and the first block's attention are frozen in steps 1 and 2."""
    for name, p in named:
        if name.startswith(("embed.token", "blocks.0.attention")):
            p.requires_grad_(step not in (1, 2))


def plain(freezing: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One process: the weights, and torch's own average of them."""
    model = built()
    optimizer = groups(model.named_parameters())
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )
    average.update_parameters(model)  # the first one copies
    for step in range(STEPS):
        if freezing:
            frozen(model.named_parameters(), step)
        ids, targets = tokens(step)
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        average.update_parameters(model)
    return model.state_dict(), average.module.state_dict()


def trained(mesh: Any, steps: Iterable[int], freezing: bool = False, load: Path | None = None) -> tuple[Any, Any, Any]:
    model = hp.parallelize(built(), mesh, hp.CrossEntropy())
    optimizer = hp.DistributedOptimizer(groups(model.named_parameters()), model)
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    ema = hp.EMA(model, DECAY)
    if load is not None:
        hp.load(load, model, optimizer, rate, ema)
    for step in steps:
        if freezing:
            frozen(model.named_parameters(), step)
        model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), 2)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        ema.update()
    return model, (model, optimizer, rate, ema), ema


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[name], **CLOSE, msg=lambda told, name=name: f"{name}: {told}")


@ranks(4)
def test_groups_rates_and_averages_are_those_of_one_process_and_move_to_another_mesh(tmp_path: Path) -> None:
    weights, averages = plain()
    mesh = hp.init(seed=3, tensor=2, pipeline=2)
    _, parts, _ = trained(mesh, range(2))
    hp.save(tmp_path / "half", *parts)
    mesh.close()
    mesh = hp.init(seed=3, data=2, tensor=2)
    model, _, ema = trained(mesh, range(2, STEPS), load=tmp_path / "half")
    close(model.full_state_dict(), weights)
    with ema.applied():
        close(model.full_state_dict(), averages)
    close(model.full_state_dict(), weights)
    assert ema.updates == STEPS
    mesh.close()


@ranks(2)
@pytest.mark.parametrize("degrees", [{"pipeline": 2}, {"tensor": 2}, {"data": 2}], ids=str)
def test_parameters_frozen_for_some_steps_train_as_in_one_process(degrees: dict[str, int]) -> None:
    weights, averages = plain(freezing=True)
    mesh = hp.init(seed=3, **degrees)
    model, _, ema = trained(mesh, range(STEPS), freezing=True)
    close(model.full_state_dict(), weights)
    with ema.applied():
        close(model.full_state_dict(), averages)
    mesh.close()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@ranks(2)
def test_muon_trains_whole_matrices_and_is_refused_where_they_are_cut() -> None:
    def build() -> nn.Module:
        return layers(6, 10, 4)

    def muon(parameters: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
        several = list(parameters)
        matrices = torch.optim.Muon([p for p in several if p.dim() == 2], lr=1e-2)
        return [matrices, torch.optim.SGD([p for p in several if p.dim() != 2], lr=1e-2)]

    x, y = numbers(8, 6), numbers(8, 4, seed=1)
    model = build()
    optimizers = muon(model.parameters())
    F.mse_loss(model(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    wanted = model.state_dict()

    mesh = hp.init(seed=3, pipeline=2)
    cut = hp.parallelize(build(), mesh, F.mse_loss)
    optimizers = muon(cut.parameters())
    cut.train_step((x, y))
    for optimizer in optimizers:
        optimizer.step()
    close(cut.full_state_dict(), wanted)
    mesh.close()

    mesh = hp.init(seed=3, tensor=2)
    plan = {"0": "column", "2": "row"}
    makers: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [torch.optim.Adafactor, torch.optim.Adadelta]
    cut = hp.parallelize(build(), mesh, F.mse_loss, plan=plan)
    with pytest.raises(ValueError, match=r"Adafactor does not step each element by itself, and 0.weight .* tensor=2"):
        hp.DistributedOptimizer(makers[0](list(cut.parameters())), cut)
    hp.DistributedOptimizer(makers[1](list(cut.parameters())), cut)
    matrices = [p for p in cut.parameters() if p.dim() == 2]
    for p in cut.parameters():
        p.requires_grad_(p.dim() == 2)
    with pytest.raises(ValueError, match="Muon does not step each element by itself"):
        hp.DistributedOptimizer(torch.optim.Muon(matrices, lr=1e-2), cut)
    mesh.close()


@ranks(1)
def test_averages_that_cannot_be_are_refused(tmp_path: Path) -> None:
    mesh = hp.init(seed=3)
    model = hp.parallelize(layers(4, 2), mesh, F.mse_loss)
    with pytest.raises(ValueError, match="decay=1.0: what is kept"):
        hp.EMA(model, 1.0)
    hp.save(tmp_path / "kept", model)
    ema = hp.EMA(model)
    with ema.applied():
        for call in (ema.update, lambda: hp.save(tmp_path / "swapped", model, ema), ema.applied().__enter__):
            with pytest.raises(ValueError, match="where weights and averages have changed places"):
                call()
    ema.update()
    with pytest.raises(ValueError, match="was saved without a ema"):
        hp.load(tmp_path / "kept", model, hp.EMA(model))
    mesh.close()


@ranks(1)
def test_averages_of_weights_in_bf16_are_kept_in_fp32_and_move(tmp_path: Path) -> None:
    mesh = hp.init(seed=3)
    model = hp.parallelize(layers(4, 2, dtype=torch.bfloat16), mesh, F.mse_loss)
    ema = hp.EMA(model, 0.999)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {name: p.float() for name, p in weights.items()}
    for step in range(50):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name] + 1 + step % 2)
                wanted[name] = 0.999 * wanted[name] + 0.001 * p.float()
        ema.update()
    now = model.full_state_dict()
    with ema.applied():
        for name, x in model.full_state_dict().items():
            assert torch.equal(x, wanted[name].bfloat16()) and not torch.equal(x, weights[name])
    close(model.full_state_dict(), now)
    hp.save(tmp_path / "kept", model, ema)
    other = hp.EMA(model, 0.999)
    hp.load(tmp_path / "kept", model, other)
    for name, x in other.averages.items():
        assert x.dtype is torch.float32
        torch.testing.assert_close(x, wanted[name], rtol=1e-5, atol=0)
        assert torch.equal(x, ema.averages[name])
    mesh.close()
