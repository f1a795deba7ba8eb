"""PowerSGD on several replicas: gradients of low rank arrive whole, what is missed arrives later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hybridpar as hp
from hybridpar.mesh import Mesh
from tests.models import gpt, layers, mine, numbers, tokens
from tests.ranks import ranks
from tests.test_equality import opened

CLOSE = {"rtol": 1e-10, "atol": 1e-11}  # fp64; products of matrices in another order


@ranks(2)
def test_gradients_of_no_higher_rank_train_as_one_process_does(rank_count: int) -> None:
    mesh = opened(Mesh(data=2))
    torch.manual_seed(1)
    model = hp.parallelize(layers(24, 32, 8).double(), mesh, nn.MSELoss())
    torch.manual_seed(1)
    plain = layers(24, 32, 8).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Two samples make gradients of rank 2; of [8, 32] and [32, 24] they are 80 of 256 and 112 of 768 numbers.
    optimizer = hp.DistributedOptimizer(sgd, model, compression=hp.Compression.power_sgd(2))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x, y = numbers(2, 24, seed=step), numbers(2, 8, seed=step + 50)
        model.train_step((mine(x, mesh.data), mine(y, mesh.data)))
        optimizer.step()
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        reference.step()
        reference.zero_grad()
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, **CLOSE)
    mesh.close()


@ranks(2)
def test_what_a_step_misses_arrives_later(rank_count: int) -> None:
    """The gradient is the same in each step: the mean of what has arrived must come to it."""
    mesh = opened(Mesh(data=2))
    torch.manual_seed(1)
    model = hp.parallelize(nn.Linear(24, 32, bias=False).double(), mesh, lambda out, y: (out * y).sum(1).mean())
    first = next(iter(model.parameters())).detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hp.DistributedOptimizer(sgd, model, compression=hp.Compression.power_sgd(1))
    x, y = numbers(8, 24, seed=1), numbers(8, 32, seed=2)
    whole, missed = y.T @ x / 8, []
    for step in range(1, 33):
        model.train_step((mine(x, mesh.data), mine(y, mesh.data)))
        optimizer.step()
        optimizer.zero_grad()
        arrived = first - next(iter(model.parameters())).detach()
        missed.append(((arrived / step - whole).norm() / whole.norm()).item())
    assert missed[0] > 0.5 and missed[-1] < 0.25, missed  # rank 1 of 8, and the mean of what arrived
    mesh.close()


@ranks(2)
def test_a_checkpoint_keeps_what_was_not_sent(rank_count: int, tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))

    def training() -> tuple[hp.ParallelModel, hp.DistributedOptimizer]:
        torch.manual_seed(1)
        model = hp.parallelize(nn.Linear(24, 32, bias=False).double(), mesh, nn.MSELoss())
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, hp.DistributedOptimizer(sgd, model, compression=hp.Compression.power_sgd(1))

    x, y = numbers(8, 24, seed=1), numbers(8, 32, seed=2)
    model, optimizer = training()
    for _ in range(3):
        model.train_step((mine(x, mesh.data), mine(y, mesh.data)))
        optimizer.step()
        optimizer.zero_grad()
    hp.save(tmp_path / "saved", model, optimizer)
    owed = next(iter(optimizer.policy.state().values()))["missed"]
    assert owed.norm() > 0.01
    other, resumed = training()
    hp.load(tmp_path / "saved", other, resumed)
    torch.testing.assert_close(next(iter(resumed.policy.state().values()))["missed"], owed, **CLOSE)
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [Mesh(2, 1, 2), Mesh(2, 2, 1)], ids=str)
def test_shards_are_compressed_as_they_lie_and_replicas_stay_alike(degrees: Mesh) -> None:
    mesh = opened(degrees)
    torch.manual_seed(1)
    model = hp.parallelize(gpt(), mesh, hp.CrossEntropy())
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = hp.DistributedOptimizer(adam, model, compression=hp.Compression.power_sgd(2), clip=1.0)
    losses = []
    for _ in range(6):
        losses.append(model.train_step(tuple(mine(x, mesh.data) for x in tokens(0)), microbatches=2))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    specs = model.specs()
    for name, p in model.named_parameters():
        for axis in (mesh.peers, *([mesh.tensor] if specs[name].dim is None else [])):
            several = axis.allgather(p.detach().reshape(1, -1))
            assert all(torch.equal(one, several[0]) for one in several), name
    mesh.close()


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"power_sgd\(0\): the rank is a whole number of at least 1"):
        hp.Compression.power_sgd(0)
