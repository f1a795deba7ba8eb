"""Batch norms over replicas: SyncBatchNorm on any mesh equals a batch norm of the whole batch in one process."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.microbatch import split_batch
from tests.against_one import CLOSE
from tests.ranks import ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 3), nn.BatchNorm1d(3),
    ).double()  # fmt: skip


def batches(samples: int, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(8)
    draw = [torch.randn(steps, samples, *shape, generator=drawn, dtype=torch.float64) for shape in ((1, 6, 6), (3,))]
    return list(zip(*draw))


def alone(model: nn.Module, data: list[tuple[Tensor, Tensor]], replicas: int, micros: int) -> list[float]:
    """Microbatch m of all replicas goes through the plain model together."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for x, wanted in data:
        optimizer.zero_grad()
        total, pieces = 0.0, zip(x.tensor_split(replicas), wanted.tensor_split(replicas))
        for together in zip(*(split_batch(piece, micros) for piece in pieces)):
            pair = [torch.cat(tensors) for tensors in zip(*(part for part, _ in together))]
            loss = nn.functional.mse_loss(model(pair[0]), pair[1]) * len(pair[0]) / len(x)
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
    return losses


@ranks(1, 2, 4)
@pytest.mark.parametrize(("samples", "micros"), [(12, 1), (11, 1), (12, 3)])
def test_statistics_are_those_of_all_replicas(rank_count: int, samples: int, micros: int) -> None:
    for pipeline in (1, 2) if rank_count > 1 else (1,):
        mesh = hp.init(pipeline=pipeline)
        plain, data = network(None), batches(samples)
        model = hp.parallelize(
            nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(plain)), mesh, loss=nn.MSELoss(), schedule="gpipe"
        )
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        mine = [tuple(t.tensor_split(mesh.data.size)[mesh.data.index] for t in batch) for batch in data]
        losses = []
        for batch in mine:
            losses.append(model.train_step(batch, microbatches=micros))
            optimizer.step()
            optimizer.zero_grad()
        wanted = alone(plain, data, mesh.data.size, micros)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), **CLOSE)
        torch.testing.assert_close(model.full_state_dict(), dict(plain.state_dict()), **CLOSE)
        plain.eval()
        torch.testing.assert_close(model.predict(mine[0][0]), plain(mine[0][0]).detach(), **CLOSE)
        mesh.close()


@ranks(2)
def test_replicas_with_other_numbers_of_microbatches_are_refused() -> None:
    mesh = hp.init()
    model = hp.parallelize(nn.SyncBatchNorm.convert_sync_batchnorm(network()), mesh, loss=nn.MSELoss())
    (x, wanted), *_ = batches(8)
    model.train_step((x[:4], wanted[:4]), microbatches=4)
    few = 4 - mesh.data.index  # the last batch of an epoch: 4 samples and 3
    with pytest.raises(ValueError, match="2 replicas cut their batches into 7 microbatches, this one into [34]"):
        model.train_step((x[:few], wanted[:few]), microbatches=4)
    mesh.close()
