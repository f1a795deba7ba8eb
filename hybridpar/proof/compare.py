"""Holds what each rank has recorded against the reference that rank 0 trains.

Rank 0 makes a step of the reference and sends what came of it; each rank looks at its own shards. So a difference has
a rank. What rounding may do is measured, not guessed: rank 0 trains the reference a second time in another precision.

    fp32 (or what the run has)    16 x the difference between the two references, at least 64 units in the last place
    fp64                          that difference brought down to fp64 (2^-29), x 1000; at least 1e-10

both of the size of the tensor, or of a thousandth of the largest of its kind where the tensor is smaller: a gradient
that is zero in theory is a sum of terms that are not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridpar.global_view import take
from hybridpar.proof.between import Between, between
from hybridpar.proof.recorder import Recorder
from hybridpar.proof.reference import Fed, Reference, Told
from hybridpar.proof.report import KINDS, Difference
from hybridpar.shard import Spec

START, LOSS, GRADIENTS, BUFFERS, WEIGHTS = KINDS
EXACT = 1e-10
_TO_DOUBLE = 1000 * 2.0**-29
_ROUNDING = 16
_LAST_PLACES = 64
_UNMEASURED = 1e-3  # of the tensor's size, where the second reference cannot be trained
_SMALL = 1e-3  # of the largest tensor of its kind

Noise = dict[tuple[int, str, str], float]  # by step, kind and name: what rounding did


def fed(recorder: Recorder) -> list[Fed]:
    """What each step was fed, from all ranks; all of them call it together."""
    world, found = recorder.model.world, []
    leader = world.pipeline.index == 0 and world.tensor.index == 0
    for number, step in enumerate(recorder.records):
        batch = (step.batch, step.microbatches) if leader else None
        batches, fresh, frozen, still, groups = zip(
            *world.everyone.objects((batch, step.fresh, step.frozen, step.still, step.groups))
        )
        found.append(
            Fed(
                [batch for batch in batches if batch is not None],
                step.number,
                all(fresh),
                frozenset().union(*frozen),
                frozenset().union(*still),
                step.clips,
                merged(groups, recorder),
                between(recorder, number),
            )
        )
    return found


def merged(told: Sequence[Mapping[int, Any]], recorder: Recorder) -> dict[int, list[Any]]:
    """Each optimizer's groups over all ranks. What is trained and in none of them is put into the first."""
    found: dict[int, list[Any]] = {}
    for groups in told:
        for number, members in groups.items():
            mine = found.setdefault(number, [(options, []) for options, _ in members])
            for (_, names), (_, more) in zip(mine, members):
                names += [name for name in more if name not in names]
    trained = [n for part in _trained(recorder) for n in part]
    seen = {name for members in found.values() for _, names in members for name in names}
    if found:
        found[min(found)][0][1].extend(n for n in dict.fromkeys(trained) if n not in seen)
    return found


def _trained(recorder: Recorder) -> list[list[str]]:
    named = recorder.model.named_parameters()
    return recorder.model.world.everyone.objects([name for name, p in named if p.requires_grad])


def reference(recorder: Recorder, double: bool | None = None) -> Reference:
    """A reference that begins where the run began; on rank 0."""
    world = recorder.model.world
    kinds = [_plain(type(one)) for one in recorder.optimizers]
    module, loss = copy.deepcopy(recorder.original), copy.deepcopy(recorder.loss)
    return Reference(module, loss, world.seed, world.device, kinds, [o.defaults for o in recorder.optimizers], double)


def _plain(kind: type) -> type:
    """torch's class, of which Horovod has made its own."""
    return next(k for k in kind.__mro__ if not k.__module__.startswith("horovod"))


def is_double(recorder: Recorder) -> bool:
    """Whether the run computes in fp64."""
    return all(x.dtype == torch.float64 for x in recorder.start.values() if x.is_floating_point())


def compared(recorder: Recorder, feeding: Sequence[Fed], noise: Noise) -> list[Difference]:
    """All differences of all ranks, on every rank; `noise` is that of an earlier run, and is filled if it is empty."""
    world = recorder.model.world
    told = trained(recorder, feeding, noise) if world.rank == 0 else None
    noise.update(world.everyone.objects(noise if world.rank == 0 else None)[0])
    exact, mine = is_double(recorder), []
    for number, step in enumerate(recorder.records):
        there = told[number] if told else None
        wanted = {
            LOSS: {"": torch.tensor(there.loss, dtype=torch.float64)} if there else {},
            GRADIENTS: there.gradients if there and step.gradients else {},
            WEIGHTS: there.weights if there and step.weights else {},
            START: dict(reference_start(recorder)) if there and number == 0 else {},
        }
        here = {
            LOSS: {"": torch.tensor(step.loss, dtype=torch.float64)},
            GRADIENTS: step.gradients,
            WEIGHTS: step.weights,
            START: recorder.start,
        }
        mine += _apart(recorder, feeding[number].between)
        for kind, tensors in wanted.items():
            whole = shared(world, tensors)
            mine += _held_against(recorder, number, kind, here[kind], whole, noise, exact)
        for replica in range(world.data.size):
            whole = shared(world, there.buffers[replica] if there else {})
            if replica == world.data.index:
                mine += _held_against(recorder, number, BUFFERS, step.buffers, whole, noise, exact)
    return [one for part in world.everyone.objects(mine) for one in part]


def _apart(recorder: Recorder, found: Between) -> list[Difference]:
    """The weights that this rank has changed before a step, and others have not, or not so."""
    rank, records = recorder.model.world.rank, recorder.records
    mine = [one for one in found.apart if rank in one.changed]
    sizes = [largest(records[one.step].changed[one.name]) for one in mine]
    return [Difference(one.step, START, one.name, rank, one.size, 0.0, size) for one, size in zip(mine, sizes)]


def reference_start(recorder: Recorder) -> dict[str, Tensor]:
    """The weights that the unsplit module began with."""
    return {name: p.detach().cpu() for name, p in recorder.original.named_parameters()}


def trained(recorder: Recorder, feeding: Sequence[Fed], noise: Noise) -> list[Told]:
    """The reference's steps; measures `noise` with a second reference if it is empty."""
    told = [copied(ref) for ref in _steps(reference(recorder), feeding)]
    if not noise:
        try:
            other = _steps(reference(recorder, double=not is_double(recorder)), feeding)
            for number, (one, two) in enumerate(zip(told, other)):
                noise.update(_measured(number, one, two))
        except (RuntimeError, TypeError, ValueError):  # the module insists on a dtype
            noise[-1, "", ""] = 0.0
    return told


def _steps(ref: Reference, feeding: Sequence[Fed]) -> Any:
    for one in feeding:
        yield ref.step(one)


def copied(told: Told) -> Told:
    """With buffers of its own: the reference goes on with its."""
    return Told(told.loss, told.gradients, told.weights, [dict(one) for one in told.buffers], told.micros)


def _measured(number: int, one: Told, two: Told) -> Noise:
    found = {(number, LOSS, ""): abs(one.loss - two.loss)}
    pairs = [(GRADIENTS, one.gradients, two.gradients), (WEIGHTS, one.weights, two.weights)]
    pairs += [(BUFFERS, a, b) for a, b in zip(one.buffers, two.buffers)]
    for kind, mine, theirs in pairs:
        for name, x in mine.items():
            key = number, kind, name
            found[key] = max(found.get(key, 0.0), largest(x.double() - theirs[name].double()))
    return found


def shared(world: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's `tensors`, on the CPU of every rank."""
    first = world.rank == 0
    shapes = world.everyone.objects([(n, tuple(x.shape), x.dtype) for n, x in tensors.items()] if first else None)[0]
    found = {}
    for dtype in dict.fromkeys(dtype for _, _, dtype in shapes):
        some = [(n, torch.Size(shape)) for n, shape, kind in shapes if kind == dtype]
        lengths = [shape.numel() for _, shape in some]
        flat = torch.empty(sum(lengths), dtype=dtype)
        if first:
            flat = torch.cat([tensors[n].cpu().reshape(-1) for n, _ in some])
        if len(flat):
            flat = world.everyone.broadcast(flat.to(world.device), 0).cpu()
        found |= {n: x.view(shape) for (n, shape), x in zip(some, flat.split(lengths))}
    return found


def _held_against(
    recorder: Recorder,
    number: int,
    kind: str,
    here: Mapping[str, Tensor | None],
    wanted: Mapping[str, Tensor],
    noise: Noise,
    exact: bool,
) -> list[Difference]:
    """The differences of what this rank has."""
    model, found = recorder.model, []
    most = max((largest(x) for x in wanted.values()), default=0.0)
    for name, mine in here.items():
        if name not in wanted:
            continue
        spec = spec_of(recorder, name, wanted[name])
        if mine is not None and tuple(mine.shape) != spec.local_shape(model.world.tensor.index):
            continue  # a buffer cut in a way that no spec tells
        whole = take(wanted[name], spec, model.world.tensor.index).double()
        error = largest((torch.zeros_like(whole) if mine is None else mine.double()) - whole)
        scale = max(largest(wanted[name]), _SMALL * most)
        dtype = wanted[name].dtype if kind != LOSS else next(iter(recorder.start.values())).dtype
        room = allowed(kind, scale, dtype, noise.get((number, kind, name)), exact)
        found.append(Difference(number, kind, name, model.world.rank, error, room, scale))
    return found


def spec_of(recorder: Recorder, name: str, whole: Tensor) -> Spec:
    """How `name` is cut; whole where nobody says so."""
    applied = recorder.model._applied
    return applied.specs.get(name) or applied.buffers.get(name) or Spec(name, tuple(whole.shape))


def allowed(kind: str, scale: float, dtype: torch.dtype, noise: float | None, exact: bool) -> float:
    """How far off rounding may be."""
    if kind == START or not dtype.is_floating_point:
        return 0.0  # the same bits
    if exact:
        return max(EXACT * scale, _TO_DOUBLE * (noise or 0.0), 1e-300)
    last = _LAST_PLACES * torch.finfo(dtype).eps
    return max((last if noise is not None else max(last, _UNMEASURED)) * scale, _ROUNDING * (noise or 0.0), 1e-300)


def largest(x: Tensor) -> float:
    """The largest magnitude; infinite for what is no number."""
    if not x.numel():
        return 0.0
    value = float(x.detach().double().abs().max())
    return value if math.isfinite(value) else math.inf
