"""The probe of bucket sizes and Horovod's cycle time, on real ranks."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import hybridpar as hp
from hybridpar.mesh import Mesh
from hybridpar.optim.probe import CYCLES, SIZES, probe
from tests.models import layers, mine, numbers
from tests.ranks import ranks
from tests.test_equality import opened


@ranks(2)
def test_a_probe_chooses_alike_on_all_ranks_and_training_goes_on_after_it(rank_count: int) -> None:
    mesh = opened(Mesh(data=2))
    choice = probe(mesh, 3 << 20)
    assert len(set(mesh.everyone.objects(choice))) == 1
    told = re.match(r"buckets of .* and a Horovod cycle of (\d+) ms: \d+ ms for 3 MiB", choice.why)
    slow = re.match(r"one pass of", choice.why)  # on a machine that is very busy
    assert slow or (told and float(told[1]) in CYCLES and choice.bucket_bytes in SIZES), choice
    torch.manual_seed(1)
    model = hp.parallelize(layers(6, 8, 3).double(), mesh, nn.MSELoss())
    torch.manual_seed(1)
    plain = layers(6, 8, 3).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hp.DistributedOptimizer(sgd, model, bucket_bytes="probe")
    assert len(set(mesh.everyone.objects(optimizer.probed))) == 1 and optimizer.probed
    x, y = numbers(8, 6, seed=1), numbers(8, 3, seed=2)
    model.train_step((mine(x, mesh.data), mine(y, mesh.data)))
    optimizer.step()
    nn.functional.mse_loss(plain(x), y).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    mesh.close()


@ranks(2)
def test_a_cycle_time_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "2")
    mesh = opened(Mesh(data=2))
    assert re.search(r"cycle of 2 ms|one pass of", probe(mesh, 1 << 19).why)
    mesh.close()
