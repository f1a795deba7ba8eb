"""The first module that gives something else, or is handed another gradient, than in one process. All ranks together.

Forward, modules are looked at in the order of their calls, microbatch by microbatch; backward, in the order in which
gradients come. Rank 0 sends what the reference has, each rank looks at its own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridpar.proof.compare import LOSS, is_double, largest, shared
from hybridpar.proof.facts import Divergence, Mask
from hybridpar.proof.recorder import Recorder
from hybridpar.proof.watch import Seen, Watch, checksum, part

_TINY = 1e-300
_EXACT, _ROUNDED = 1e-9, 1e-3  # of a tensor's size: what differs by more is wrong, in fp64 and otherwise


def masks(recorder: Recorder, reference: Watch | None) -> list[Mask]:
    """Every rank's dropout masks of the step, and whether the reference draws them too."""
    world = recorder.model.world
    told = world.everyone.objects(recorder.watch.masks)
    if reference is None:
        return world.everyone.objects(None)[0]
    found = []
    for rank, masks in enumerate(told):
        for one in masks:
            whole = reference.bits.get((one.site, one.sample))
            right = whole is None or _crc(whole, one) == one.crc
            replica = world.mesh.place(rank).data
            found.append(Mask(rank, replica, one.site, one.sample, one.crc, one.length, one.parts, right))
    return world.everyone.objects(found)[0]


def _crc(whole: Tensor, one: Any) -> int:
    if one.dim is None:
        return checksum(whole)
    return checksum(torch.cat([whole.narrow(one.dim - 1, a, b - a) for a, b in one.parts], one.dim - 1))


def divergence(recorder: Recorder, reference: Watch | None, kind: str) -> Divergence | None:
    """The first module, in the order of the calls and then of the backward pass, of which a rank has something else."""
    world, seen = recorder.model.world, recorder.watch.seen
    order = world.everyone.objects(None if reference is None else _order(reference, kind))[0]
    starts = world.everyone.objects(None if reference is None else sorted({key[3] for key in reference.seen}))[0]
    for key, forward in order:
        wanted = None
        if reference is not None:
            wanted = reference.seen[key].value if forward else reference.seen[key].gradient
        whole = shared(world, {} if wanted is None else {"": wanted})[""].double()
        mine = seen.get(key)
        found = _seen_error(recorder, mine, whole, forward)
        told = world.everyone.objects(found)
        scale = max(largest(whole), _TINY)
        wrong = [rank for rank, error in enumerate(told) if error is not None and not error <= _room(recorder) * scale]
        if wrong:
            name = key[0]
            reader = world.everyone.objects(None if reference is None else _reader(reference, name))[0]
            return _described(recorder, mine, whole, forward, wrong[0], told[wrong[0]], {
                "module": name, "reader": reader, "microbatch": starts.index(key[3]), "scale": scale,
                "kind": world.everyone.objects(None if reference is None else reference.seen[key].kind)[0],
            })  # fmt: skip
    return None


def _room(recorder: Recorder) -> float:
    return _EXACT if recorder.double or is_double(recorder) else _ROUNDED


def _order(watch: Watch, kind: str) -> list[tuple[Any, bool]]:
    """What to look at: the outputs where the loss is wrong, else their gradients."""
    if kind == LOSS:
        return [(key, True) for key, one in sorted(watch.seen.items(), key=lambda item: item[1].order)]
    graded = [(key, one) for key, one in watch.seen.items() if one.gradient is not None]
    return [(key, False) for key, one in sorted(graded, key=lambda item: item[1].returned)]


def _reader(watch: Watch, name: str) -> str:
    """The innermost module that was given what `name` returned, if there is one."""
    readers = watch.readers.get(name, [])
    leaves = [r for r in readers if not any(other.startswith(f"{r}.") for other in readers)]
    return leaves[0] if len(leaves) == 1 else ""


def _seen_error(recorder: Recorder, mine: Seen | None, whole: Tensor, forward: bool) -> float | None:
    """How far this rank's tensor is off; None where it has none to compare."""
    pair = _pair(recorder, mine, whole, forward)
    return None if pair is None else largest(pair[0] - pair[1])


def _pair(recorder: Recorder, mine: Seen | None, whole: Tensor, forward: bool) -> tuple[Tensor, Tensor] | None:
    """This rank's tensor and what it should be."""
    if mine is None or not forward and (mine.shared or mine.gradient is None):
        return None
    world = recorder.model.world
    wanted = part(whole, mine, world.tensor)
    if wanted is None:
        return None
    # Losses are scaled by the number of replicas, whose gradients are averaged.
    return (mine.value.cpu().double() if forward else mine.gradient.cpu().double() / world.data.size), wanted


def _described(
    recorder: Recorder, mine: Seen | None, whole: Tensor, forward: bool, rank: int, error: float, known: dict[str, Any]
) -> Divergence:
    """The hypotheses about what is wrong with a tensor, tried on all ranks' of it."""
    world, scale = recorder.model.world, known["scale"]
    pair = _pair(recorder, mine, whole, forward)
    told = world.everyone.objects(pair)
    found, wanted = told[rank]
    group = world.mesh.group("tensor", rank)
    others = [told[r][0] for r in group if told[r] is not None and told[r][0].shape == whole.shape]
    total = largest(sum(others) - whole) / scale if len(others) == len(group) else 1.0
    twins = [told[r][1] for r in group if r != rank and told[r] is not None and told[r][1].shape == found.shape]
    twin = min((largest(found - x) / scale for x in twins if not torch.equal(x, wanted)), default=1.0)
    ratio = float((found * wanted).sum() / (wanted * wanted).sum().clamp(min=_TINY))
    residual = largest(found - ratio * wanted) / scale
    return Divergence(
        forward=forward, rank=rank, error=error, total=total, twin=twin, ratio=ratio, residual=residual, **known
    )


