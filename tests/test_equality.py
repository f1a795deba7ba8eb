"""The proof: training on any mesh, by any schedule, equals a loop in plain PyTorch.

Tolerances. All ranks add the same terms as one process does, in another order. One sum of some thousand terms of size
1 then differs by some 1e-15 in fp64. AdamW divides a gradient by its own size plus eps, so where the true gradient is
zero (the biases of keys: a softmax does not see what is added to all of its scores) it steps by noise * lr / eps. With
noise of 1e-16 and torch's eps of 1e-8 that is 1e-10 at lr=1e-2, the tolerance itself; with eps=1e-6 there are two
digits to spare. fp32 has noise of 1e-9 beside gradients of 1e-2 and less; eps=1e-4 keeps its steps within 1e-5. Losses
are numbers of size 4, gradients and weights of size 1 and less, so differences are absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.global_view import take
from hybridpar.mesh import Mesh
from tests.models import IGNORED, gpt, mine, tokens
from tests.ranks import ranks

STEPS = 5
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


@dataclass
class Told:
    """What training told: the loss of each step, and gradients and weights by name after each; then the evaluation."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]
    evaluation: float


@lru_cache(maxsize=64)
def plain(case: Case) -> Told:
    """`case` in one process, without hybridpar: the batch as a whole, torch's own loss, clipping and optimizer."""
    model = case.model()
    stepper = case.stepper(model.parameters())
    told = Told([], [], [], 0.0)
    for step in range(STEPS):
        ids, targets = tokens(step)
        stepper.zero_grad()
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        told.losses.append(loss.item())
        told.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        if case.clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        stepper.step()
        told.weights.append({name: x.clone() for name, x in model.state_dict().items()})
    model.eval()
    ids, targets = tokens(STEPS)
    with torch.no_grad():
        told.evaluation = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED).item()
    return told


def check(mesh: Any, case: Case, how: How, reference: Told) -> None:
    """Train `case` on `mesh` and hold every number against `reference`.

    After each step each rank looks at what it holds, after the last one at the whole as well: the two together say that
    the parts are right and that they are put together rightly.
    """
    close = Close(TOLERANCE[case.dtype], f"{mesh.mesh}, {case}, {how}")
    plain_model = case.model()
    model = hp.parallelize(
        case.model(), mesh, loss=hp.CrossEntropy(), schedule=how.schedule, chunks=chunks(how), sequence=how.sequence
    )
    for name, x in model.full_state_dict().items():
        assert torch.equal(x, plain_model.state_dict()[name]), f"{close.where}: {name} begins with other bits"
    stepper = optimizer(model, case, how)
    for step in range(STEPS):
        batch = tuple(mine(x, mesh.data) for x in tokens(step))
        close(f"loss of step {step}", torch.tensor(model.train_step(batch, how.microbatches)), reference.losses[step])
        stepper.synchronize()
        grads = {name: p.grad for name, p in model.named_parameters()}
        held(close, f"gradient {step}", model, grads, reference.gradients[step])
        if step == STEPS - 1:
            whole(close, "gradient", model.full_gradients(), reference.gradients[-1])
        after_synchronize(stepper, how)
        held(close, f"weight {step}", model, dict(model.named_parameters()), reference.weights[step])
    whole(close, "weight", model.full_state_dict(), reference.weights[-1])
    batch = tuple(mine(x, mesh.data) for x in tokens(STEPS))
    close("evaluation", torch.tensor(model.eval_step(batch, how.microbatches)), reference.evaluation)


class Close:
    """Asserts that two tensors differ by no more than `most` anywhere."""

    def __init__(self, most: float, where: str) -> None:
        self.most, self.where = most, where

    def __call__(self, what: str, found: Tensor, wanted: Tensor | float) -> None:
        wanted = torch.as_tensor(wanted)
        assert found.shape == wanted.shape, f"{self.where}: {what} has shape {found.shape}, not {wanted.shape}"
        worst = float((found.detach() - wanted).abs().max()) if found.numel() else 0.0
        assert worst <= self.most, f"{self.where}: {what} is off by {worst:.1e}"


def held(close: Close, what: str, model: Any, shards: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    specs = model.specs()
    for name, shard in shards.items():
        close(f"{what} of {name}", shard, take(wanted[name], specs[name], model.world.tensor.index))


def whole(close: Close, what: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        close(f"whole {what} of {name}", x, wanted[name])


def chunks(how: How) -> int | None:
    return 2 if how.schedule == "interleaved" else None


def optimizer(model: Any, case: Case, how: How) -> Any:
    stepper = case.stepper(model.parameters())
    if not how.horovods:
        return hp.DistributedOptimizer(stepper, model, clip=CLIP if case.clip else None)
    import horovod.torch as hvd

    named = list(model.named_parameters())
    return hvd.DistributedOptimizer(stepper, named_parameters=named, backward_passes_per_step=how.microbatches)


def after_synchronize(stepper: Any, how: How) -> None:
    if how.horovods:
        with stepper.skip_synchronize():
            stepper.step()
    else:
        stepper.step()
    stepper.zero_grad()


def meshes(size: int) -> list[Mesh]:
    """All ways to lay `size` ranks out."""
    degrees = product(*[[n for n in (1, 2, 4, 8) if size % n == 0]] * 3)
    return [Mesh(*three) for three in degrees if three[0] * three[1] * three[2] == size]


def opened(degrees: Mesh, **options: Any) -> Any:
    """The mesh, ready. A test closes it at its end, not in `finally`: a rank that failed must not wait for others."""
    return hp.init(data=degrees.data, pipeline=degrees.pipeline, tensor=degrees.tensor, seed=3, **options)


def wave(ranks_: int, microbatches: int, folder: Path, rank: int) -> str:
    """A schedule of nobody's making: stages go down the ranks and up again, the backwards take the last sample first.

    The last rank holds two stages that follow one another, and messages travel both ways.
    """
    rows = []
    for p in range(ranks_):
        down, up = p, 2 * ranks_ - 1 - p
        forwards = [f"{stage}F{m}" for stage in (down, up) for m in range(microbatches)]
        rows.append(forwards + [f"{stage}B{m}" for stage in (up, down) for m in reversed(range(microbatches))])
    path = folder / f"wave-{rank}-{microbatches}.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    return str(path)


def ways(mesh: Any, folder: Path) -> Iterator[tuple[Case, How]]:
    """Every schedule with tied and untied weights, clipped and not; all else varies along with them."""
    micros = 2 if mesh.data.size == 8 else 4  # some replica of 8 has two samples only
    schedules = ["1f1b"]
    if mesh.pipeline.size > 1:
        schedules += ["gpipe", "interleaved", wave(mesh.pipeline.size, micros, folder, mesh.rank)]
    for i, (schedule, tied, clip) in enumerate(product(schedules, (True, False), (True, False))):
        stages = mesh.pipeline.size * (1 if schedule in ("1f1b", "gpipe") else 2)
        depth = max(2, stages - 2)  # embed and head are parts too
        sequence = mesh.tensor.size > 1 and (i // 4 + tied + clip) % 2 == 1
        yield Case(depth, tied, clip, kv_heads=(12, 4, 2)[i % 3]), How(schedule, sequence, micros)


def proved(degrees: Mesh, folder: Path) -> None:
    mesh = opened(degrees)
    for case, how in ways(mesh, folder):
        check(mesh, case, how, plain(case))
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


@ranks(8, timeout=300)
@pytest.mark.parametrize("degrees", meshes(8), ids=str)
def test_every_mesh_of_8_ranks_and_every_schedule_train_as_one_process(degrees: Mesh, tmp_path: Path) -> None:
    proved(degrees, tmp_path)
