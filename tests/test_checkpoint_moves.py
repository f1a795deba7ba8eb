"""One training that changes its mesh after every step, through a checkpoint, goes on as if it never had.

The reference is a loop in plain PyTorch, in fp64, that never stops. Order of the meshes, their schedules and whether
the save is asynchronous are mixed by a seed; every mesh of 1, 2, 4 and 8 ranks writes one checkpoint and reads one that
another has written. Since each number of the rest of the training depends on all that went before, a tensor, a moment,
a learning rate or a batch that got lost would show in all losses after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import hybridpar as hp
from hybridpar.batches import Batches
from hybridpar.mesh import Mesh
from hybridpar.models.resnet import ResNet
from hybridpar.models.speech import SpeechRecogniser
from tests import models
from tests.ranks import ranks
from tests.test_equality import SEED, meshes

SAMPLES, BATCH = 43, 17  # three batches in an epoch, the last one of 9; no degree divides them
TOLERANCE = 1e-10  # see tests.test_equality; seen at most: 3e-14


@dataclass(frozen=True)
class Family:
    """A model of 8 parts, its samples, and the mean loss."""

    make: Callable[[], nn.Module]
    sample: Callable[[int], tuple[Any, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    sequence: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make().double()


def text(i: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(models.VOCABULARY, (models.TOKENS + 1,), generator=torch.Generator().manual_seed(i))
    return ids[:-1], ids[1:]


def image(i: int) -> tuple[Tensor, Tensor]:
    return models.numbers(2, 8, 8, seed=i), torch.tensor(i % 5)


def utterance(i: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (models.numbers(9, 6, seed=i), torch.tensor(1 + i % 9)), torch.tensor(i % 5)


def words(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


FAMILIES = {
    "gpt": Family(lambda: models.gpt(depth=6), text, words, sequence=True),
    "cnn": Family(lambda: ResNet(2, 5, (8, 16), depth=3, norm="group"), image, words),
    "lstm": Family(lambda: SpeechRecogniser(bands=6, words=5, width=20, depth=6), utterance, words),
}


class Samples(Dataset[Any]):
    def __init__(self, family: Family) -> None:
        self._family = family

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Any:
        return self._family.sample(i)


def stepper(parameters: Any) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with a rate that changes at each step."""
    adam = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)
    return adam, torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(adam, 7)


def plain(family: Family, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of one process without hybridpar."""
    model, samples = family.model(), Samples(family)
    adam, rate = stepper(model.parameters())
    batches, losses = Batches(SAMPLES, BATCH, True, SEED, False), []
    for step in range(steps):
        epoch, batch = divmod(step, batches.count)
        inputs, targets = torch.utils.data.default_collate([samples[i] for i in batches.of(epoch, batch, 0, 1)])
        loss = family.loss(model(*inputs) if isinstance(inputs, list) else model(inputs), targets)
        loss.backward()
        adam.step()
        adam.zero_grad()
        rate.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def journey(sizes: list[int]) -> list[tuple[Mesh, dict[str, Any]]]:
    """All meshes of these sizes in a mixed order, each with a way to lay out its stages."""
    draw = random.Random(4)
    all_meshes = [mesh for size in sizes for mesh in meshes(size)]
    draw.shuffle(all_meshes)
    ways = [{"schedule": "gpipe"}, {"schedule": "1f1b"}, {"schedule": "interleaved", "chunks": 2}]
    return [(mesh, draw.choice(ways if 1 < mesh.pipeline < 8 else ways[:2])) for mesh in all_meshes]


def on_part(mesh: Mesh) -> Any:
    """A communicator of as many of the test's ranks as `mesh` has, None on the others."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Split(0 if MPI.COMM_WORLD.rank < mesh.size else MPI.UNDEFINED)
    return None if comm == MPI.COMM_NULL else comm


def stage_of_the_way(family: Family, degrees: Mesh, how: dict[str, Any], folder: Path, step: int, comm: Any) -> float:
    """Take the training up, do one step, and leave it behind; returns the loss."""
    mesh = hp.init(degrees.tensor, degrees.pipeline, degrees.data, seed=SEED, comm=comm)
    torch.set_num_threads(1)
    sequence = family.sequence and degrees.tensor > 1 and step % 2 == 0
    loss = hp.CrossEntropy() if family.sequence else family.loss
    model = hp.parallelize(family.model(), mesh, loss, sequence=sequence, **how)
    adam, rate = stepper(model.parameters())
    parts = (model, hp.DistributedOptimizer(adam, model), hp.DataLoader(Samples(family), mesh, BATCH), rate)
    checkpoints = hp.Checkpoints(folder, keep=2, asynchronous=step % 3 == 0)
    found = checkpoints.load(*parts)
    assert (found.step if found else 0) == step
    value = model.train_step(next(endless(parts[2])), microbatches=1 if degrees.data == 8 else 2)
    parts[1].step()
    parts[1].zero_grad()
    rate.step()
    checkpoints.save(*parts).wait()
    mesh.everyone.barrier()
    mesh.close()
    return value


def endless(loader: hp.DataLoader) -> Iterator[Any]:
    while True:
        yield from loader  # nothing, where the checkpoint was written at the end of an epoch


def moved(family: Family, sizes: list[int], folder: Path) -> None:
    from mpi4py import MPI

    way = journey(sizes)
    losses, weights = plain(family, len(way))
    for step, (degrees, how) in enumerate(way):
        comm = on_part(degrees)
        if comm is not None:
            loss = stage_of_the_way(family, degrees, how, folder, step, comm)
            assert abs(loss - losses[step]) <= TOLERANCE, f"step {step}, {degrees}: {loss} for {losses[step]}"
            comm.Free()
        MPI.COMM_WORLD.Barrier()
    found = final(folder)
    for name, x in found.items():
        torch.testing.assert_close(x, weights[name], rtol=0, atol=TOLERANCE)
    assert set(weights) - set(found) <= {"head.project.weight"}, "only the tied one goes by another name"


def final(folder: Path) -> dict[str, Tensor]:
    """The model of the newest checkpoint, as plain safetensors read it."""
    from safetensors.torch import load_file

    newest = max(folder.glob("step-*"))
    return {name: x for file in newest.glob("model-*.safetensors") for name, x in load_file(file).items()}


@ranks(8, timeout=400)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_checkpoint_moves_from_any_mesh_to_any_mesh(name: str, tmp_path: Path) -> None:
    moved(FAMILIES[name], [1, 2, 4, 8], tmp_path)


@ranks(2, timeout=120)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_checkpoint_moves_between_all_meshes_of_one_and_two_ranks(name: str, tmp_path: Path) -> None:
    moved(FAMILIES[name], [1, 2], tmp_path)
