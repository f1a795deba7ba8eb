"""The support matrix: each combination that it calls supported is trained, each other one is refused as it says.

Every policy is held against one process that sees all samples. Replicas meet after each step of plain SGD:

    allreduce, local_sgd(1), async_ps(0)    SGD
    diloco(1, lr, momentum)                 SGD with Nesterov's momentum, at lr times the inner rate
    easgd(1, pull)                          SGD at pull times the rate: so far moves the centre

Tolerances. fp64 differs by the order of sums: 1e-10. In bf16, on their way or in products, numbers are right to 2^-8,
in fp16 to 2^-11; the weights, which move by 5e-2 and more, are held to 1e-2.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import groupby, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.global_view import take
from hybridpar.mesh import Mesh
from hybridpar.optim.compression import Wire
from hybridpar.optim.precision import _DTYPES
from hybridpar.optim.sync.wish import called, parse
from hybridpar.optim.zero.piece import put
from hybridpar.support import COMPRESSION, PRECISIONS, Combination, combinations, refusal, rows, table
from hybridpar.tensor.recompute import kind
from tests.models import mine, numbers
from tests.ranks import ranks
from tests.ranks.launch import CHECKOUT
from tests.test_cli import said
from tests.test_equality import opened

RATE, STEPS = 1.5, 2
PLAN = {"*.0": "column", "*.2": "row"}
RECOMPUTE = {"none": None, "selective": ["1"], "full": "full"}
SYNC = {
    "allreduce": "allreduce",
    "local_sgd": "local_sgd(1)",
    "diloco": "diloco(1, lr=0.7, momentum=0.9)",
    "easgd": "easgd(1, pull=0.8)",
    "async_ps": "async_ps(0)",
}
PLAINLY = {"diloco": {"lr": 0.7 * RATE, "momentum": 0.9, "nesterov": True}, "easgd": {"lr": 0.8 * RATE}}


# ---- the matrix itself


def test_every_combination_is_supported_or_has_one_sentence_with_a_way_out() -> None:
    for one in combinations():
        told = refusal(one)
        assert told is None or re.fullmatch(r"[^:]+: (use|leave out) [^:]+[^.]", told), one
    plain = [one for one in combinations() if one.sync == "allreduce" and one.compression is None]
    assert all(refusal(one) is None for one in plain), "averaged gradients go with everything else"


def test_its_words_are_those_of_whom_it_speaks_for() -> None:
    assert set(PRECISIONS) == {None, *_DTYPES}
    named = {wire.name for wire in vars(hp.Compression).values() if isinstance(wire, Wire)}
    assert set(COMPRESSION) == named | {hp.Compression.power_sgd(1).name}
    assert {called(parse(wish)): wish for wish in SYNC.values()} == SYNC
    assert {kind(wish): wish for wish in RECOMPUTE.values()} == RECOMPUTE
    held = {field: {row[field] for row in rows()} for field in asdict(Combination())}
    assert held["sync"] == set(SYNC) and held["recompute"] == set(RECOMPUTE)


def test_the_page_shows_the_matrix() -> None:
    assert f"\n{table()}\n" in (CHECKOUT / "docs" / "support.md").read_text()


def test_the_command_prints_it() -> None:
    assert said("support") == (0, f"{table()}\n")
    code, text = said("support", "--json")
    assert (code, json.loads(text)) == (0, rows())
    assert "hybridpar support --json" in said("support", "--help")[1]


# ---- that it is true


def blocks(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2))).to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return numbers(8, 4, seed=step, dtype=dtype), numbers(8, 4, seed=step + 50, dtype=dtype)


@lru_cache(maxsize=64)
def plainly(precision: str | None, sync: str) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses and weights of one process after each step, without hybridpar."""
    dtype = torch.float64 if precision is None else torch.float32
    model = blocks(dtype)
    begun = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), **PLAINLY.get(sync, {"lr": RATE}))
    losses, weights = [], []
    for step in range(STEPS):
        x, y = batch(step, dtype)
        with torch.autocast("cpu", _DTYPES[precision]) if precision else nullcontext():
            loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append({name: x.clone() for name, x in model.state_dict().items()})
    assert all((x - begun[name]).abs().max() > 0.05 for name, x in weights[-1].items() if name.endswith("weight"))
    return losses, weights


def trained(model: Any, begun: list[Tensor], one: Combination) -> None:
    """Train `model`, which has been used before, from the weights `begun`, as `one` says."""
    for p, x in zip(model.parameters(), begun):
        put(p, x)
    optimizer = wrapped(model, one)
    losses, weights = plainly(one.precision, one.sync)
    dtype = torch.float64 if one.precision is None else torch.float32
    most = 1e-10 if one.precision is None and one.compression is None else 1e-2
    specs, index = model.specs(), model.world.tensor.index
    for step in range(STEPS):
        loss = model.train_step(tuple(mine(x, model.world.data) for x in batch(step, dtype)), microbatches=2)
        assert one.sync != "allreduce" or abs(loss - losses[step]) <= most, one
        optimizer.step()
        optimizer.zero_grad()
        optimizer.meet()
        for name, weight in model.state_dict().items():
            apart = (weight - take(weights[step][name], specs[name], index)).abs().max()
            assert apart <= most, f"{name} is {apart:.1e} off after step {step}: {one}"
    assert model.scaling is None or model.scaling.skipped == 0


def wrapped(model: Any, one: Combination) -> hp.DistributedOptimizer:
    wire = getattr(hp.Compression, one.compression or "none")
    return hp.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE), model, sync=SYNC[one.sync], zero=one.zero,
        compression=wire if isinstance(wire, Wire) else wire(4),  # the full rank of these matrices
    )  # fmt: skip


def kinds(size: int) -> list[Mesh]:
    """The meshes of `size` ranks with degrees 1 and 2."""
    return [Mesh(*degrees) for degrees in product((1, 2), repeat=3) if Mesh(*degrees).size == size]


@ranks(1, 2, 4, 8, timeout=300)
def test_what_is_supported_trains_as_one_process_and_the_rest_is_refused_on_all_ranks(rank_count: int) -> None:
    for degrees in kinds(rank_count):
        mesh = opened(degrees)
        here = [one for one in combinations() if Mesh(one.data, one.pipeline, one.tensor) == degrees]
        key = lambda one: (str(one.precision), one.recompute)  # noqa: E731
        for _, several in groupby(sorted(here, key=key), key):
            several = list(several)
            precision, recompute = several[0].precision, several[0].recompute
            module = blocks(torch.float64 if precision is None else torch.float32)
            model = hp.parallelize(
                module, mesh, nn.MSELoss(), plan=PLAN, precision=precision, recompute=RECOMPUTE[recompute]
            )
            assert model.asked == replace(several[0], sync="allreduce", zero=0, compression=None)
            begun = [p.detach().clone() for p in model.parameters()]
            for one in several:
                told = refusal(one)
                if told is not None:
                    with pytest.raises(ValueError, match=re.escape(told)):
                        wrapped(model, one)
                elif one.compression is None or recompute == "none":  # it never sees that a forward was done twice
                    trained(model, begun, one)
        mesh.everyone.barrier()
        mesh.close()
