"""A training with everything on stops at some step and goes on on another mesh, as if it had never stopped.

Everything: parameter groups, a schedule of rates and momenta, clipping, dropout, recomputation, an average of weights,
a sampler of the user's, ZeRO, mixed precision. The step and the meshes are drawn by a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, WeightedRandomSampler

import hybridpar as hp
from tests.models import TOKENS, VOCABULARY, gpt
from tests.ranks import ranks

SAMPLES, STEPS = 43, 5  # an epoch has three batches, the last one of 9


class Text(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Any:
        text = torch.randint(VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(i))
        return text[:-1], text[1:]


def endless(loader: hp.DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def trained(
    folder: Path, degrees: dict[str, int], first: int, last: int, zero: int = 0, comm: Any = None, **how: Any
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], Any]:
    """Steps `first` to `last`: their losses, the weights, the averages, and what else a checkpoint has."""
    mesh = hp.init(seed=3, comm=comm, **degrees)
    dtype = torch.float32 if "precision" in how else torch.float64
    module = gpt(depth=2, kv_heads=4, dropout=0.1, tied="precision" not in how, dtype=dtype)
    model = hp.parallelize(module, mesh, hp.CrossEntropy(), recompute="full", **how)
    kinds = [[p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False)]
    groups = [{"params": kinds[0]}, {"params": kinds[1], "weight_decay": 0.0}]
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(groups, lr=1e-2, eps=1e-6), model, clip=1.0, zero=zero)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=STEPS + 1)
    order = WeightedRandomSampler([1.0 + i % 3 for i in range(SAMPLES)], SAMPLES)
    loader, ema = hp.DataLoader(Text(), mesh, 17, sampler=order), hp.EMA(model, 0.9)
    parts = model, optimizer, rate, loader, ema
    if first:
        hp.load(folder, *parts)
    losses = []
    for step, batch in zip(range(first, last), endless(loader)):
        losses.append(model.train_step(batch, 2))
        if step == 1 and model.scaling is not None:
            optimizer.synchronize()
            next(model.parameters()).grad.fill_(torch.inf)  # an overflow: the step is skipped, the scale is halved
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        ema.update()
    if last < STEPS:
        hp.save(folder, *parts)
    with ema.applied():
        averages = model.full_state_dict()
    rest = rate.state_dict(), loader.state_dict(), model.scaling and model.scaling.state_dict()
    found = losses, model.full_state_dict(), averages, rest
    mesh.close()
    return found


def alike(found: Any, wanted: Any, most: float) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=most)
    for here, there in zip(found[1:3], wanted[1:3]):
        assert here.keys() == there.keys()
        for name, x in here.items():
            torch.testing.assert_close(x, there[name], rtol=0, atol=most)
    assert str(found[3]) == str(wanted[3])


@ranks(4, timeout=120)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_with_everything_on_goes_on_on_another_mesh(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    torch.set_num_threads(1)
    before, after = draw.sample([{"pipeline": 2}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}, {"data": 4}], 2)
    stop, zeros = draw.randint(1, STEPS - 1), [draw.randint(0, 3) for _ in range(2)]
    wanted = trained(tmp_path / "none", before, 0, STEPS, zeros[0])
    first = trained(tmp_path / "kept", before, 0, stop, zeros[0])
    rest = trained(tmp_path / "kept", after, stop, STEPS, zeros[1])
    alike((first[0] + rest[0], *rest[1:]), wanted, 1e-10)


@ranks(2)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_goes_on_on_another_pipeline_to_the_same_bits(precision: str, tmp_path: Path) -> None:
    from mpi4py import MPI

    stop = random.Random(precision).randint(2, STEPS - 1)
    torch.set_num_threads(1)
    wanted = trained(tmp_path / "none", {}, 0, STEPS, comm=MPI.COMM_SELF, precision=precision)
    first = trained(tmp_path / "kept", {"pipeline": 2}, 0, stop, precision=precision)
    rest = trained(tmp_path / "kept", {}, stop, STEPS, comm=MPI.COMM_SELF, precision=precision)
    alike((first[0] + rest[0], *rest[1:]), wanted, 0)
    assert precision == "bf16" or wanted[3][2] == {"scale": 2.0**15, "sound": STEPS - 2, "skipped": 1}
