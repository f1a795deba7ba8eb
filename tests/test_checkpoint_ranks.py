"""Checkpoints on several ranks: what replicas have of their own, what is refused on all ranks alike."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

import hybridpar as hp
from hybridpar.checkpoint import look, manifest
from hybridpar.mesh import Mesh
from tests.jobs import run
from tests.models import gpt, layers, mine, numbers, tokens
from tests.ranks import ranks
from tests.test_equality import opened


def batch(step: int, mesh: hp.World) -> tuple[torch.Tensor, torch.Tensor]:
    return mine(numbers(8, 6, seed=step), mesh.data), mine(numbers(8, 3, seed=step + 50), mesh.data)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@ranks(2)
def test_each_replica_goes_on_with_its_own_statistics_and_generators(tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))
    torch.manual_seed(1)
    model = hp.parallelize(Normed().double(), mesh, nn.MSELoss())
    for step in range(2):
        model.train_step(batch(step, mesh))
    torch.manual_seed(mesh.rank)
    random.seed(mesh.rank)
    hp.save(tmp_path / "x", model)
    means = {name: x.clone() for name, x in model._kept().items()}
    expected = model.eval_step(batch(9, mesh)), torch.rand(1).item(), random.random()
    torch.manual_seed(1)
    other = hp.parallelize(Normed().double(), mesh, nn.MSELoss())
    hp.load(tmp_path / "x", other)
    assert all(torch.equal(x, means[name]) for name, x in other._kept().items())
    assert (other.eval_step(batch(9, mesh)), torch.rand(1).item(), random.random()) == expected
    assert set(manifest.read(tmp_path / "x").tensors["replica.1"]) == {"1.running_mean", "1.running_var"}
    mesh.close()
    mesh = opened(Mesh(pipeline=2))
    whole = hp.parallelize(Normed().double(), mesh, nn.MSELoss())
    hp.load(tmp_path / "x", whole)  # one replica now: it goes on with those of the first
    told = manifest.read(tmp_path / "x")
    assert torch.equal(
        whole.full_state_dict()["1.running_mean"], look.tensor(tmp_path / "x", told, "model", "1.running_mean")
    )
    mesh.close()


@ranks(2)
def test_what_only_one_rank_has_wrong_is_refused_on_all(tmp_path: Path) -> None:
    mesh = opened(Mesh(tensor=2))
    model = hp.parallelize(gpt(), mesh, hp.CrossEntropy())
    with pytest.raises(ValueError, match="rank 1 saves to .*/1 and rank 0 to .*/0: give all the same path"):
        hp.save(tmp_path / str(mesh.rank), model)
    with pytest.raises(ValueError, match="extra.*is a set"):
        hp.save(tmp_path / "x", model, extra={"a": {1}})
    factor = torch.optim.Adafactor(model.parameters(), lr=0.01)
    model.train_step(tokens(0))
    factor.step()
    with pytest.raises(ValueError, match="row_var of Adafactor has shape .* and its parameter's shard"):
        hp.save(tmp_path / "x", model, factor)
    assert list(tmp_path.iterdir()) == []
    hp.save(tmp_path / "x", model)
    mesh.everyone.barrier()
    if mesh.rank == 0:
        next((tmp_path / "x").glob("model-00002*")).unlink()
    mesh.everyone.barrier()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is lost"):
        hp.load(tmp_path / "x", model)
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [Mesh(2, 1, 2), Mesh(1, 2, 2)], ids=str)
def test_the_bytes_are_spread_and_horovods_own_optimizer_is_kept(degrees: Mesh, tmp_path: Path) -> None:
    import horovod.torch as hvd

    mesh = opened(degrees)

    def training(seed: int) -> tuple[hp.ParallelModel, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = hp.parallelize(gpt(), mesh, hp.CrossEntropy())
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        named = list(model.named_parameters())
        return model, hvd.DistributedOptimizer(sgd, named_parameters=named, backward_passes_per_step=2)

    def steps(model: hp.ParallelModel, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(2):
            losses.append(model.train_step(tuple(mine(x, mesh.data) for x in tokens(model.steps)), microbatches=2))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    one, other = training(1), training(2)
    steps(*one)
    hp.save(tmp_path / "x", *one)
    told = manifest.read(tmp_path / "x")
    sizes = [file.size for name, file in told.files.items() if name.startswith(("model-", "optimizer-"))]
    assert len(sizes) == 8 and max(sizes) < 0.45 * sum(sizes)
    hp.load(tmp_path / "x", *other)
    assert steps(*other) == steps(*one)
    mesh.close()


@ranks(2)
def test_a_mesh_without_the_folder_of_the_first_rank_is_refused(tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))
    model = hp.parallelize(layers(6, 8, 3), mesh, nn.MSELoss())
    hp.save(tmp_path / "x", model)
    with pytest.raises(ValueError, match="there is no checkpoint .*y on this host"):
        hp.load(tmp_path / "y", model)
    mesh.close()


APART = """
import ctypes, tempfile
from pathlib import Path
from torch import nn

folder = Path(sys.argv[0]).parent / "shared"
mesh = hp.init()
if mesh.rank == 1:  # a host of its own, as far as this folder goes
    c = ctypes.CDLL(None, use_errno=True)
    private = 1 << 14 | 1 << 18  # MS_REC | MS_PRIVATE
    if c.unshare(0x20000) or c.mount(b"none", b"/", None, private, None) or c.mount(
        b"tmpfs", str(folder).encode(), b"tmpfs", 0, None
    ):
        print("CANNOT", os.strerror(ctypes.get_errno()))
mesh.everyone.barrier()
hp.save(folder / "x", hp.parallelize(nn.Linear(2, 2), mesh))
"""


def test_hosts_that_do_not_share_the_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    job = run(tmp_path, APART, ranks=2)
    if "CANNOT" in job.out:
        pytest.skip(f"a process cannot have a file system of its own here: {job.out.strip()}")
    assert job.code == 2 and len(job.lines("save to a folder that all hosts share")) == 1, job.said
    assert list((tmp_path / "shared").iterdir()) == [], "nothing is left"
