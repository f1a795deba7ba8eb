"""Workers and servers on several ranks: what they computed, replayed in one process; who waits for whom."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.mesh import Mesh
from tests.jobs import run
from tests.models import gpt, layers, mine, numbers, tokens
from tests.ranks import ranks
from tests.test_equality import opened
from tests.test_sync import CLOSE, Simulated, adamw, go_on, opened_training, parts, plain_loss, same

_STEPS = 6


def batches(step: int) -> tuple[Tensor, Tensor]:
    return numbers(8, 6, seed=step), numbers(8, 3, seed=step + 50)


@ranks(2, 4)
def test_what_workers_took_replays_in_one_process_to_the_same_weights(rank_count: int) -> None:
    mesh = opened(Mesh(data=rank_count))
    model, optimizer = opened_training(mesh, "async_ps(2)", 1)
    seen = []
    for step in range(_STEPS):
        model.train_step(tuple(mine(x, mesh.data) for x in batches(step)))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer.policy.seen)
        clocks = [clocks for clocks in optimizer.policy.seen]
        assert all(one[mesh.rank] == step + 1 and min(one) >= step - 1 for one in clocks)
    last = torch.cat([p.detach().flatten() for p in model.parameters()])
    replayed = replay(rank_count, mesh.everyone.objects(seen))
    torch.testing.assert_close(last, replayed[mesh.rank], **CLOSE)
    assert sum(optimizer.policy.lags.values()) == _STEPS and max(optimizer.policy.lags) <= 2
    mesh.close()


def replay(workers: int, seen: list[list[list[list[int]]]]) -> list[Tensor]:
    """Every worker's last weights, from the clocks [worker, step, server, worker] that it saw."""
    torch.manual_seed(1)
    simulated = Simulated(layers(6, 8, 3).double(), workers)
    flats = [torch.cat([p.detach().flatten() for p in one.parameters()]) for one in simulated.modules]
    first, moved = flats[0].clone(), [[] for _ in range(workers)]
    sizes = [p.numel() for p in simulated.modules[0].parameters()]
    pieces = [len(piece) for piece in first.tensor_split(workers)]
    while any(len(one) < _STEPS for one in moved):
        for w, done in enumerate(moved):
            needed = seen[w][len(done) - 1] if 0 < len(done) < _STEPS else []
            ready = all(clock <= len(moved[other]) for clocks in needed for other, clock in enumerate(clocks))
            if len(done) == _STEPS or not ready:
                continue
            flats[w] = summed(first, moved, seen[w][len(done) - 1], pieces) if done else first.clone()
            one = simulated.modules[w]
            shapes = [p.shape for p in one.parameters()]
            values = [piece.view(shape) for piece, shape in zip(flats[w].split(sizes), shapes)]
            with torch.no_grad():
                for p, value in zip(one.parameters(), values):
                    p.copy_(value)
            one.zero_grad()
            plain_loss(one, parts(batches(len(done)), workers)[w]).backward()
            simulated.optimizers[w].step()
            now = torch.cat([p.detach().flatten() for p in one.parameters()])
            done.append((now - flats[w]) / workers)
    return [summed(first, moved, seen[w][-1], pieces) for w in range(workers)]


def summed(first: Tensor, moved: list[list[Tensor]], seen: list[list[int]], pieces: list[int]) -> Tensor:
    """`first` and what had moved by the clocks of each server."""
    totals = []
    for server, clocks in enumerate(seen):
        total = first + sum(step for worker, clock in enumerate(clocks) for step in moved[worker][:clock])
        totals.append(total.split(pieces)[server])
    return torch.cat(totals)


@ranks(2)
def test_a_slow_replica_holds_the_other_back_by_the_bound_only(tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))
    model, optimizer = opened_training(mesh, "async_ps(3)", 1)
    go_on(model, optimizer, 1)  # the servers are there
    reached = tmp_path / "reached"
    if mesh.rank == 1:
        while not reached.exists():  # this replica takes no step until the other has gone as far as it may
            threading.Event().wait(0.01)
        assert reached.read_text() == "3"
    for step in range(4):
        if mesh.rank == 0 and step == 3:
            assert max(optimizer.policy.lags) == 3  # three steps ahead, without a step of the other
            (tmp_path / "writing").write_text("3")
            (tmp_path / "writing").rename(reached)
        go_on(model, optimizer, 1)
    assert max(optimizer.policy.lags) <= 3
    optimizer.meet()
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [Mesh(2, 1, 2), Mesh(2, 2, 1)], ids=str)
def test_ranks_of_one_replica_hold_one_model_and_meetings_make_all_alike(degrees: Mesh, tmp_path: Path) -> None:
    mesh = opened(degrees)

    def training(seed: int) -> tuple[hp.ParallelModel, hp.DistributedOptimizer]:
        torch.manual_seed(seed)
        model = hp.parallelize(gpt(), mesh, hp.CrossEntropy())
        return model, hp.DistributedOptimizer(adamw(model.parameters(), lr=1e-2), model, sync="async_ps(1)")

    def steps(model: hp.ParallelModel, optimizer: hp.DistributedOptimizer, count: int) -> None:
        for step in range(count):
            model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), microbatches=2)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = training(1)
    specs = model.specs()
    for _ in range(3):
        steps(model, optimizer, 1)
        for name, p in model.named_parameters():
            if specs[name].dim is None:
                several = mesh.tensor.allgather(p.detach().reshape(1, -1))
                assert all(torch.equal(one, several[0]) for one in several), name
    with pytest.raises(ValueError, match="different weights now, since replicas are up to 1 steps apart"):
        hp.save(tmp_path / "x", model, optimizer)
    optimizer.meet()
    for p in model.parameters():
        both = mesh.peers.allgather(p.detach().reshape(1, -1))
        assert torch.equal(both[0], both[1])
    hp.save(tmp_path / "x", model, optimizer)
    other = training(2)
    hp.load(tmp_path / "x", *other)
    for p, q in zip(model.parameters(), other[0].parameters()):
        assert torch.equal(p, q)
    steps(*other, 2)
    mesh.close()


@ranks(2)
def test_without_staleness_plain_sgd_steps_by_the_average(rank_count: int) -> None:
    mesh = opened(Mesh(data=2))
    torch.manual_seed(1)
    model = hp.parallelize(layers(6, 8, 3).double(), mesh, nn.MSELoss())
    torch.manual_seed(1)
    plain = layers(6, 8, 3).double()
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sync="async_ps(0)")
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        model.train_step(tuple(mine(x, mesh.data) for x in batches(step)))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.meet()
        nn.functional.mse_loss(plain(batches(step)[0]), batches(step)[1]).backward()
        reference.step()
        reference.zero_grad()
        same(model, plain)
    mesh.close()


def test_a_replica_with_fewer_steps_holds_nobody_back_and_the_job_ends(tmp_path: Path) -> None:
    job = run(tmp_path, """
mesh = hp.init()
torch.manual_seed(0)
model = hp.parallelize(torch.nn.Linear(4, 1), mesh, torch.nn.MSELoss())
optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sync="async_ps(1)")
for _ in range(3 if mesh.rank else 12):
    model.train_step((torch.ones(2, 4), torch.ones(2, 1)))
    optimizer.step()
    optimizer.zero_grad()
print("done", mesh.rank)
""", ranks=2)
    assert job.code == 0 and "done 0" in job.out and "done 1" in job.out and job.left == ()
