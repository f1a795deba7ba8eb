"""The proof: training on any mesh, by any schedule, equals a loop in plain PyTorch.

Tolerances. All ranks add the same terms as one process does, in another order. One sum of some thousand terms of size
1 then differs by some 1e-15 in fp64. AdamW divides a gradient by its own size plus eps, so where the true gradient is
zero (the biases of keys: a softmax does not see what is added to all of its scores) it steps by noise * lr / eps. With
noise of 1e-16 and torch's eps of 1e-8 that is 1e-10 at lr=1e-2, the tolerance itself; with eps=1e-6 there are two
digits to spare. fp32 has noise of 1e-9 beside gradients of 1e-2 and less; eps=1e-4 keeps its steps within 1e-5. Losses
are numbers of size 4, gradients and weights of size 1 and less, so differences are absolute.
Seen at most: losses 1e-15, gradients 1e-15 and weights 2e-14 apart in fp64; 4e-7, 6e-8 and 2e-7 in fp32.

With dropout the plain loop would draw other masks. There the reference is one rank under hybridpar, which equals plain
PyTorch where nothing is dropped, and every mask of every rank is compared bit by bit with the masks of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.batches import Batches
from hybridpar.global_view import take
from hybridpar.mesh import Mesh
from tests.models import IGNORED, TOKENS, VOCABULARY, gpt, mine, tokens
from tests.ranks import ranks

STEPS = 5
SEED = 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
EPS = {torch.float64: 1e-6, torch.float32: 1e-4}
CLIP = 0.2  # below the norm of every step here, which `plain` asserts


@dataclass(frozen=True)
class Case:
    """What one process and a mesh both do."""

    depth: int = 2
    tied: bool = True
    clip: bool = False
    kv_heads: int = 12
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    optimizer: str = "adamw"

    def model(self) -> nn.Module:
        return gpt(self.depth, self.tied, self.kv_heads, self.dropout, self.dtype)

    def stepper(self, parameters: Any) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
        return torch.optim.AdamW(parameters, lr=1e-2, eps=EPS[self.dtype], weight_decay=0.1)


@dataclass(frozen=True)
class How:
    """How a mesh does it; one process knows nothing of this."""

    schedule: str = "1f1b"
    sequence: bool = False
    microbatches: int = 4
    horovods: bool = False  # its own optimizer instead of ours


Mask = tuple[Tensor, int | None, tuple[Any, ...]]  # one sample's, which dim of it is cut, and which part is here


@dataclass
class Told:
    """What training told: the loss of each step, gradients and weights by name after each; then the evaluation."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    evaluation: float = 0.0
    masks: dict[tuple[str, int, int], Mask] = field(default_factory=dict)  # by site, step and sample


# ---- one process


def plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@lru_cache(maxsize=64)
def plain(case: Case) -> Told:
    """`case` in one process, without hybridpar: the batch as a whole, torch's own loss, clipping and optimizer."""
    model, told = case.model(), Told()
    stepper = case.stepper(model.parameters())
    for step in range(STEPS):
        stepper.zero_grad()
        loss = plain_loss(model, tokens(step))
        loss.backward()
        told.losses.append(loss.item())
        told.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        if case.clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        stepper.step()
        told.weights.append({name: x.clone() for name, x in model.state_dict().items()})
    with torch.no_grad():
        told.evaluation = plain_loss(model.eval(), tokens(STEPS)).item()
    return told


@lru_cache(maxsize=64)
def alone(case: Case) -> Told:
    """`case` under hybridpar on a mesh of one rank, the batch as a whole. No other mesh may be open."""
    from mpi4py import MPI

    mesh, told = hp.init(comm=MPI.COMM_SELF, seed=SEED), Told()
    model = hp.parallelize(case.model(), mesh, loss=hp.CrossEntropy())
    told.masks = watched(model)
    stepper = optimizer(model, case, How())
    for step in range(STEPS):
        told.losses.append(model.train_step(tokens(step)))
        told.gradients.append({name: x.clone() for name, x in model.full_gradients().items()})
        stepper.step()
        stepper.zero_grad()
        told.weights.append({name: x.clone() for name, x in model.full_state_dict().items()})
    told.evaluation = model.eval_step(tokens(STEPS))
    mesh.close()
    assert len(told.masks) == STEPS * len(tokens(0)[0]) * (1 + 3 * case.depth), "each dropout, each time"
    return told


# ---- a mesh


def check(mesh: Any, case: Case, how: How, reference: Told) -> None:
    """Train `case` on `mesh` and hold every number against `reference`.

    After each step each rank looks at what it holds, after the last one at the whole as well: the two together say
    that the parts are right and that they are put together rightly.
    """
    close = Close(TOLERANCE[case.dtype], f"{mesh.mesh}, {case}, {how}")
    chunks = 2 if how.schedule == "interleaved" else None
    model = hp.parallelize(
        case.model(), mesh, hp.CrossEntropy(), schedule=how.schedule, chunks=chunks, sequence=how.sequence
    )
    begun = case.model().state_dict()
    for name, x in model.full_state_dict().items():
        assert torch.equal(x, begun[name]), f"{close.where}: {name} begins with other bits"
    masks = watched(model)
    stepper = optimizer(model, case, how)
    for step in range(STEPS):
        loss = model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), how.microbatches)
        close.numbers(f"loss of step {step}", loss, reference.losses[step])
        stepper.synchronize()
        grads = {name: p.grad for name, p in model.named_parameters()}
        close.shards(f"gradient {step}", model, grads, reference.gradients[step])
        if step == STEPS - 1:
            close.wholes("gradient", model.full_gradients(), reference.gradients[step])
        stepped(stepper, how)
        close.shards(f"weight {step}", model, dict(model.named_parameters()), reference.weights[step])
    close.wholes("weight", model.full_state_dict(), reference.weights[-1])
    value = model.eval_step(tuple(mine(x, mesh.data) for x in tokens(STEPS)), how.microbatches)
    close.numbers("evaluation", value, reference.evaluation)
    for what, mask in masks.items():
        assert torch.equal(mask[0], part(reference.masks[what], mask)), f"{close.where}: other mask bits in {what}"
    drawn = set().union(*mesh.everyone.objects(set(masks)))
    assert drawn == reference.masks.keys(), f"{close.where}: all ranks together draw each mask"


class Close:
    """Asserts that numbers differ by no more than `most`."""

    def __init__(self, most: float, where: str) -> None:
        self.most, self.where = most, where

    def numbers(self, what: str, found: float, wanted: float) -> None:
        assert abs(found - wanted) <= self.most, f"{self.where}: {what} is off by {abs(found - wanted):.1e}"

    def tensors(self, what: str, found: Tensor, wanted: Tensor) -> None:
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, f"{self.where}: {what} is {found}"
        self.numbers(what, float((found.detach() - wanted).abs().max()) if found.numel() else 0.0, 0.0)

    def shards(self, what: str, model: Any, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        specs = model.specs()
        for name, shard in found.items():
            self.tensors(f"{what} of {name}", shard, take(wanted[name], specs[name], model.world.tensor.index))

    def wholes(self, what: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        assert found.keys() == wanted.keys(), self.where
        for name, x in found.items():
            self.tensors(f"whole {what} of {name}", x, wanted[name])


def watched(model: Any) -> dict[tuple[str, int, int], Mask]:
    """Every mask that `model` will draw on this rank."""
    draw, masks = model._draw, {}
    keep: Callable[..., Tensor] = draw.keep

    def kept(site: str, shape: Any, p: float, dim: int | None = None, parts: Any = (), device: Any = None) -> Tensor:
        mask = keep(site, shape, p, dim, parts, device)
        for sample, row in zip(draw.samples.tolist(), mask):
            masks[site, draw.step, sample] = (row, None if dim is None else dim - 1, tuple(parts))
        return mask

    draw.keep = kept
    return masks


def part(whole: Mask, like: Mask) -> Tensor:
    """The part of the one rank's mask that a rank of the mesh must have drawn."""
    _, dim, parts = like
    return whole[0] if dim is None else torch.cat([whole[0].narrow(dim, a, b - a) for a, b in parts], dim)


def optimizer(model: Any, case: Case, how: How) -> Any:
    stepper = case.stepper(model.parameters())
    if not how.horovods:
        return hp.DistributedOptimizer(stepper, model, clip=CLIP if case.clip else None)
    import horovod.torch as hvd

    named = list(model.named_parameters())
    return hvd.DistributedOptimizer(stepper, named_parameters=named, backward_passes_per_step=how.microbatches)


def stepped(stepper: Any, how: How) -> None:
    if how.horovods:
        with stepper.skip_synchronize():
            stepper.step()
    else:
        stepper.step()
    stepper.zero_grad()


# ---- every mesh, every schedule


def meshes(size: int) -> list[Mesh]:
    """All ways to lay `size` ranks out."""
    degrees = product(*[[n for n in (1, 2, 4, 8) if size % n == 0]] * 3)
    return [Mesh(*three) for three in degrees if three[0] * three[1] * three[2] == size]


def opened(degrees: Mesh, **options: Any) -> Any:
    """The mesh, ready. A test closes it at its end, not in `finally`: a rank that failed must not wait for others."""
    return hp.init(data=degrees.data, pipeline=degrees.pipeline, tensor=degrees.tensor, seed=SEED, **options)


def wave(degree: int, microbatches: int, folder: Path, rank: int) -> str:
    """A schedule of nobody's making: stages go down the ranks and up again, backwards take the last samples first.

    The last rank holds two stages that follow one another, and messages travel both ways.
    """
    rows = []
    for p in range(degree):
        down, up = p, 2 * degree - 1 - p
        forwards = [f"{stage}F{m}" for stage in (down, up) for m in range(microbatches)]
        rows.append(forwards + [f"{stage}B{m}" for stage in (up, down) for m in reversed(range(microbatches))])
    path = folder / f"wave-{rank}.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    return str(path)


def ways(degrees: Mesh, folder: Path, rank: int) -> Iterator[tuple[Case, How]]:
    """Every schedule with tied and untied weights, clipped and not, and with dropout; all else varies along with them.

    1f1b in fp32 as well.
    """
    micros = 2 if degrees.data == 8 else 4  # some replica of 8 has two samples only
    schedules = ["1f1b"]
    if degrees.pipeline > 1:
        schedules += ["gpipe", "interleaved", wave(degrees.pipeline, micros, folder, rank)]
    for i, schedule in enumerate(schedules):
        stages = degrees.pipeline * (1 if schedule in ("1f1b", "gpipe") else 2)
        depth = max(2, stages - 2)  # embed and head are parts too
        sequence, plainly = (How(schedule, degrees.tensor > 1 and cut, micros) for cut in (True, False))
        yield Case(depth, tied=True, clip=True, kv_heads=(12, 4)[i % 2]), (sequence, plainly)[i % 2]
        yield Case(depth, tied=False, clip=False, kv_heads=(4, 2)[i % 2]), (sequence, plainly)[i % 2]
        yield Case(depth, tied=True, clip=False, kv_heads=(2, 12)[i % 2]), (plainly, sequence)[i % 2]
        yield Case(depth, tied=False, clip=True, kv_heads=(12, 2)[i % 2]), (plainly, sequence)[i % 2]
        yield Case(depth, dropout=0.1, kv_heads=4), (sequence, plainly)[i % 2]
    yield Case(max(2, degrees.pipeline - 2), clip=True, kv_heads=4, dtype=torch.float32), How("1f1b", False, micros)


def proved(degrees: Mesh, folder: Path) -> None:
    from mpi4py import MPI

    todo = list(ways(degrees, folder, MPI.COMM_WORLD.rank))
    references = [alone(case) if case.dropout else plain(case) for case, _ in todo]  # before the mesh is open
    mesh = opened(degrees)
    for (case, how), reference in zip(todo, references):
        check(mesh, case, how, reference)
    mesh.close()


@ranks(1, timeout=300)
def test_one_rank_trains_as_plain_pytorch(tmp_path: Path) -> None:
    proved(Mesh(), tmp_path)


@ranks(2, timeout=300)
@pytest.mark.parametrize("degrees", meshes(2), ids=str)
def test_every_mesh_of_2_ranks_and_every_schedule_train_as_one_process(degrees: Mesh, tmp_path: Path) -> None:
    proved(degrees, tmp_path)


@ranks(4, timeout=300)
@pytest.mark.parametrize("degrees", meshes(4), ids=str)
def test_every_mesh_of_4_ranks_and_every_schedule_train_as_one_process(degrees: Mesh, tmp_path: Path) -> None:
    proved(degrees, tmp_path)


@ranks(8, timeout=600)
@pytest.mark.parametrize("degrees", meshes(8), ids=str)
def test_every_mesh_of_8_ranks_and_every_schedule_train_as_one_process(degrees: Mesh, tmp_path: Path) -> None:
    proved(degrees, tmp_path)


def test_all_20_meshes_of_1_2_4_and_8_ranks_are_among_them() -> None:
    assert [len(meshes(size)) for size in (1, 2, 4, 8)] == [1, 3, 6, 10]


# ---- other ways to train, on some meshes

SOME = [Mesh(2, 2, 1), Mesh(2, 1, 2), Mesh(1, 2, 2)]


@ranks(4, timeout=120)
@pytest.mark.parametrize("degrees", [Mesh(4, 1, 1), *SOME], ids=str)
def test_horovods_own_optimizer_trains_as_one_process(degrees: Mesh) -> None:
    mesh = opened(degrees)
    for optimizer_name, sequence in (("adamw", False), ("sgd", degrees.tensor > 1)):
        case = Case(optimizer=optimizer_name, kv_heads=4)
        check(mesh, case, How(sequence=sequence, horovods=True), plain(case))
    mesh.close()


@ranks(4, timeout=120)
@pytest.mark.parametrize("degrees", SOME, ids=str)
def test_momentum_trains_as_one_process(degrees: Mesh) -> None:
    mesh = opened(degrees)
    for clip in (True, False):
        case = Case(optimizer="sgd", clip=clip)
        check(mesh, case, How("gpipe", degrees.tensor > 1), plain(case))
    mesh.close()


@ranks(4, timeout=120)
@pytest.mark.parametrize("degrees", [*SOME, Mesh(1, 4, 1), Mesh(1, 1, 4)], ids=str)
def test_another_carrier_trains_as_one_process(degrees: Mesh, tmp_path: Path) -> None:
    mesh = opened(degrees, carrier="gloo")
    for schedule in ("1f1b", "interleaved", wave(degrees.pipeline, 4, tmp_path, mesh.rank)):
        stages = degrees.pipeline * (1 if schedule == "1f1b" else 2)
        case = Case(max(2, stages - 2), kv_heads=4, clip=True)
        check(mesh, case, How(schedule, degrees.tensor > 1), plain(case))
    mesh.close()


class Texts(torch.utils.data.Dataset):
    """41 texts: batches of 16 leave a last one of 9."""

    def __len__(self) -> int:
        return 41

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(1000 + i))
        return text[:-1], text[1:]


@ranks(1, 4, timeout=120)
def test_training_from_a_loader_equals_one_process_that_is_fed_the_same_batches(rank_count: int) -> None:
    case, order, texts = Case(clip=True), Batches(41, 16, seed=SEED), Texts()

    def whole(samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids, targets = zip(*(texts[i] for i in samples))
        return torch.stack(ids), torch.stack(targets)

    for degrees in meshes(rank_count):
        mesh = opened(degrees)
        close = Close(TOLERANCE[case.dtype], str(degrees))
        plain_model, model = case.model(), hp.parallelize(case.model(), mesh, loss=hp.CrossEntropy())
        plain_stepper, stepper = case.stepper(plain_model.parameters()), optimizer(model, case, How())
        loader = hp.DataLoader(texts, mesh, batch_size=16)
        for epoch in range(2):
            for k, batch in enumerate(loader):
                value = model.train_step(batch, microbatches=4)
                plain_value = plain_loss(plain_model, whole(order.of(epoch, k)))
                plain_value.backward()
                close.numbers(f"loss of batch {k}", value, plain_value.item())
                nn.utils.clip_grad_norm_(plain_model.parameters(), CLIP)
                for one in (stepper, plain_stepper):
                    one.step()
                    one.zero_grad()
            assert k == 2
        close.wholes("weight", model.full_state_dict(), plain_model.state_dict())
        mesh.close()
