"""Every family trains and evaluates on every mesh as plain PyTorch does in one process.

    family          batch norm?    what is special
    bert            no             loss of masked tokens only, tied decoder with a bias, post-norm and pre-norm
    resnet          both           strided stages, shortcuts
    unet            both           skips that cross stages, transposed convolutions; by channels and by space
    speech          no             tuples (x, lengths) between stages, packed sequences

In fp64, for three steps of AdamW: losses, gradients, updated weights, buffers, and the loss of an evaluation, to 1e-10
(`tests.test_equality` says why that is what rounding allows). Group norms see one sample and are compared on every mesh
in several microbatches. Batch norms see the samples of one microbatch of one replica: one process has these together
only with data=1 and microbatches=1, so that is where they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.mesh import Mesh
from hybridpar.microbatch import mapped
from hybridpar.models.bert import BERT
from hybridpar.models.resnet import ResNet
from hybridpar.models.speech import SpeechRecogniser
from hybridpar.models.unet import UNet
from tests.models import mine
from tests.ranks import ranks
from tests.test_equality import Close, Told, meshes, opened

STEPS = 3
SAMPLES = 13  # no degree divides it
TOLERANCE = 1e-10
Batch = tuple[Any, Tensor]


@dataclass(frozen=True, eq=False)
class Family:
    """A model, the batch of a step, and the mean loss, the same for one process and for a mesh."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_norm: bool = False
    plan: Mapping[str, str] | None = None  # the module's own
    pipeline: bool = True  # the plan leaves parts that can be cut into stages
    sequence: bool = False  # may lie in pieces of its tokens between the layers that are cut

    def model(self) -> nn.Module:
        """The same weights at each call; none is 0, where a wrong factor would not show."""
        torch.manual_seed(1)
        model = self.make().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        return model

    def at(self, step: int) -> Batch:
        return self.batch(torch.Generator().manual_seed(step))


def masked_text(generator: torch.Generator) -> Batch:
    ids = torch.randint(37, (SAMPLES, 10), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.3
    masked[:2] = False  # a microbatch without any
    return ids.masked_fill(masked, 36), ids.masked_fill(~masked, -100)


def images(generator: torch.Generator) -> Batch:
    pixels = torch.randn(SAMPLES, 2, 8, 8, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(5, (SAMPLES,), generator=generator)


def volumes(generator: torch.Generator, depth: int = 4) -> Batch:
    voxels = torch.randn(SAMPLES, 1, 8, 8, depth, generator=generator, dtype=torch.float64)
    return voxels, (torch.rand(voxels.shape, generator=generator) < 0.3).double()


def utterances(generator: torch.Generator) -> Batch:
    spectra = torch.randn(SAMPLES, 9, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 10, (SAMPLES,), generator=generator)
    return (spectra, lengths), torch.randint(5, (SAMPLES,), generator=generator)


def words(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def bert(depth: int = 2, **options: Any) -> BERT:
    return BERT(vocabulary=37, width=24, depth=depth, heads=12, context=10, **options)


def unet(**options: Any) -> UNet:
    return UNet(1, 1, (8, 8, 16), **options)


def voxels(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets)


FAMILIES = [
    Family("bert", bert, masked_text, words, sequence=True),
    Family("bert, pre-norm, not tied", lambda: bert(pre_norm=True, tied=False), masked_text, words, sequence=True),
    Family("resnet", lambda: ResNet(2, 5, (8, 16), depth=1, norm="group"), images, words),
    Family("resnet with batch norm", lambda: ResNet(2, 5, (8, 16), depth=1), images, words, batch_norm=True),
    Family("unet", unet, volumes, voxels),
    Family("unet with batch norm", lambda: unet(norm="batch"), volumes, voxels, batch_norm=True),
    Family("unet by space", unet, volumes, voxels, plan=UNet.space_plan),
    Family("unet by space at once", unet, volumes, voxels, plan={"": "space"}, pipeline=False),
    Family("speech", lambda: SpeechRecogniser(bands=6, words=5, width=20, depth=2), utterances, words),
]


LONG = [  # the same with as many parts as 8 stages need
    Family("bert of 6 blocks", lambda: bert(6), masked_text, words, sequence=True),
    Family("resnet of 6 blocks", lambda: ResNet(2, 5, (8, 16), depth=3, norm="group"), images, words),
    Family("unet of 3 levels", lambda: UNet(1, 1, (8, 8, 8, 16)), lambda g: volumes(g, 8), voxels),
    Family("speech of 6 layers", lambda: SpeechRecogniser(bands=6, words=5, width=20, depth=6), utterances, words),
]


def stepper(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)


@lru_cache
def plain(family: Family) -> Told:
    """`family` in one process, without hybridpar, the batch as a whole."""
    model, told = family.model(), Told()
    adam = stepper(model.parameters())

    def loss_of(batch: Batch) -> Tensor:
        inputs, targets = batch
        return family.loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)

    for step in range(STEPS):
        adam.zero_grad()
        loss = loss_of(family.at(step))
        loss.backward()
        told.losses.append(loss.item())
        told.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        adam.step()
        told.weights.append({name: x.clone() for name, x in model.state_dict().items()})
    model.eval()
    with torch.no_grad():
        told.evaluation = loss_of(family.at(STEPS)).item()
    return told


def check(mesh: Any, family: Family, microbatches: int, sequence: bool) -> None:
    """Train `family` on `mesh` and hold every number against one process."""
    close = Close(TOLERANCE, f"{mesh.mesh}, {family.name}, microbatches={microbatches}, sequence={sequence}")
    told = plain(family)
    loss = hp.CrossEntropy() if family.sequence else family.loss
    model = hp.parallelize(family.model(), mesh, loss, plan=family.plan, sequence=sequence)
    optimizer = hp.DistributedOptimizer(stepper(model.parameters()), model)

    def part(step: int) -> Batch:
        return mapped(family.at(step), lambda x: mine(x, mesh.data))

    for step in range(STEPS):
        close.numbers(f"loss of step {step}", model.train_step(part(step), microbatches), told.losses[step])
        optimizer.synchronize()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        close.shards(f"gradient {step}", model, gradients, told.gradients[step])
        optimizer.step()
        optimizer.zero_grad()
    close.wholes("weight or buffer", model.full_state_dict(), told.weights[-1])
    close.numbers("evaluation", model.eval_step(part(STEPS), microbatches), told.evaluation)


def proved(degrees: Mesh) -> None:
    mesh = opened(degrees)
    torch.set_num_threads(1)
    for i, family in enumerate(FAMILIES if degrees.pipeline < 8 else LONG):
        if degrees.data > 1 and family.batch_norm or degrees.pipeline > 1 and not family.pipeline:
            continue
        microbatches = 1 if family.batch_norm or i % 2 else min(3, SAMPLES // degrees.data)
        check(mesh, family, microbatches, sequence=family.sequence and degrees.tensor > 1 and i % 2 == 0)
    mesh.close()


@ranks(1, timeout=120)
def test_every_family_trains_on_one_rank_as_plain_pytorch() -> None:
    proved(Mesh())


@ranks(2, timeout=120)
@pytest.mark.parametrize("degrees", meshes(2), ids=str)
def test_every_family_trains_on_every_mesh_of_2_ranks_as_one_process(degrees: Mesh) -> None:
    proved(degrees)


@ranks(4, timeout=240)
@pytest.mark.parametrize("degrees", meshes(4), ids=str)
def test_every_family_trains_on_every_mesh_of_4_ranks_as_one_process(degrees: Mesh) -> None:
    proved(degrees)


@ranks(8, timeout=480)
@pytest.mark.parametrize("degrees", meshes(8), ids=str)
def test_every_family_trains_on_every_mesh_of_8_ranks_as_one_process(degrees: Mesh) -> None:
    proved(degrees)
