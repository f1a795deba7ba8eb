"""What was done to weights between two steps: a reference takes it over where all ranks have done it alike.

    all ranks alike     an average of weights, a clamp, weights loaded again: part of the training
    some ranks only     a bug: told with the rank and the weight, and not taken over
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridpar.global_view import wholes
from hybridpar.proof.recorder import Recorder
from hybridpar.proof.together import Apart, Change, changed_apart
from hybridpar.proof.watch import checksum


@dataclass(frozen=True)
class Between:
    """The weights that were changed alike before a step (whole, on rank 0 only), their names, and the others."""

    names: tuple[str, ...] = ()
    weights: dict[str, Tensor] | None = None
    apart: tuple[Apart, ...] = ()


def between(recorder: Recorder, number: int) -> Between:
    """What came before step `number`; all ranks together."""
    world, step = recorder.model.world, recorder.records[number]
    specs = recorder.model._applied.specs
    told = world.everyone.objects([name for name in step.changed if name in specs])
    names = list(dict.fromkeys(name for part in told for name in part))
    if not names:
        return Between()
    before = recorder.records[number - 1].weights
    mine = {name: step.changed.get(name, before[name]) for name in names if name in before}
    changes = {
        name: _change(before[name], x, 0 if specs[name].dim is None else world.tensor.index)
        for name, x in mine.items()
    }
    everyone = world.everyone.objects(changes)
    apart = tuple(changed_apart(number, everyone))
    odd = {one.name for one in apart}
    alike = tuple(name for name in names if name not in odd)
    homes = {
        name: next(world.mesh.place(rank).pipeline for rank, held in enumerate(everyone) if name in held)
        for name in alike
    }
    here = {name: mine[name].to(world.device) for name in alike if name in mine}
    whole = {name: x for name, x in wholes(here, homes, specs, world).items() if x is not None}
    return Between(alike, whole if world.rank == 0 else None, apart)


def _change(before: Tensor, after: Tensor, index: int) -> Change:
    moved = before != after
    size = float((after.double() - before.double()).abs().max()) if moved.any() else 0.0
    share = float(moved.double().mean()) if moved.numel() else 0.0
    return Change(index, checksum(before), checksum(after), size, share)
