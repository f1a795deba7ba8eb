"""Looks at the step that differs again, and collects the facts from which `causes` tells the cause. All ranks together.

The reference is trained up to the step, and asked for more there: the gradient of each microbatch alone, the uses of a
tied parameter apart, and what every module gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridpar.global_view import take
from hybridpar.proof.compare import GRADIENTS, LOSS, START, WEIGHTS, fed, largest, reference, shared, spec_of
from hybridpar.proof.compare import reference_start as starts
from hybridpar.proof.facts import Facts, Fit, Part
from hybridpar.proof.locate import divergence, masks
from hybridpar.proof.recorder import Recorder
from hybridpar.proof.reference import Fed, Reference
from hybridpar.proof.report import Difference
from hybridpar.proof.watch import Watch, checksum

_MOST_NAMES = 12  # parameters whose gradients are taken apart
_MOST_ELEMENTS = 1 << 22
_TINY = 1e-300


def facts(recorder: Recorder, differences: Sequence[Difference], one: Difference) -> Facts:
    """What is known about `one`, the first of `differences`; `recorder` has watched its step."""
    world, step = recorder.model.world, recorder.records[one.step]
    wrong = _wrong(differences, one, world.everyone.size)
    names = _names(recorder, wrong, one.name)
    feeding = fed(recorder)
    ref = _Asked(recorder, feeding, one, names) if world.rank == 0 else None
    told = world.everyone.objects(None if ref is None else ref.told)[0]
    count, watch = told.pop("shares"), ref.watch if ref else None
    mesh = world.mesh
    places = [mesh.place(rank) for rank in range(mesh.size)]
    common: dict[str, Any] = {
        "kind": one.kind,
        "name": one.name,
        "rank": one.rank,
        "degrees": (mesh.data, mesh.pipeline, mesh.tensor),
        "places": [(p.data, p.pipeline, p.tensor) for p in places],
        "wrong": wrong,
        "held": world.everyone.objects(len([*recorder.model.named_parameters()])),
        "loss": step.loss,
        "clipped": bool(step.clips),
        **told,
    }
    if one.kind == START:
        common["apart"] = [(a.name, a.changed[0], a.words) for a in feeding[one.step].between.apart]
        common["moved"] = _moved(recorder, wrong[world.rank], starts(recorder) if world.rank == 0 else {})
    if one.kind in (LOSS, GRADIENTS):
        common["divergence"] = divergence(recorder, watch, one.kind)
        common["masks"] = masks(recorder, watch)
    if one.kind == GRADIENTS:
        whole = shared(world, ref.gradients if ref else {})
        shares = [shared(world, ref.shares[m] if ref else {}) for m in range(count)]
        common["fits"] = world.everyone.objects(_fit(recorder, step.gradients, wrong[world.rank], shares))
        common["returned"] = world.everyone.objects(_returned(recorder, names, shares, told["parts"]))
        common["totals"] = _totals(recorder, step.gradients, one.name, whole, bool(step.clips))
        common["uses"] = _uses(recorder, step.gradients, one.name, shared(world, ref.uses if ref else {}))
    if one.kind == WEIGHTS:
        common |= _stepping(recorder, one, shared(world, ref.updates if ref else {}), wrong)
    return Facts(**common)


class _Asked:
    """The reference in the step of the difference, on rank 0."""

    def __init__(self, recorder: Recorder, feeding: Sequence[Fed], one: Difference, names: Sequence[str]) -> None:
        ref = reference(recorder)
        for earlier in feeding[: one.step]:
            ref.step(earlier)
        here = feeding[one.step]
        names = [n for n in names if n not in here.frozen]
        ref.prepare(here)
        before = {n: p.detach().cpu().clone() for n, p in ref.parameters().items()}
        graded = one.kind == GRADIENTS and here.fresh
        self.shares = ref.shares(here, names) if graded else []
        self.uses = ref.uses(here, one.name) if graded else {}
        self.watch = Watch(ref.draw)
        result = ref.step(here, self.watch)
        self.gradients = {one.name: result.gradients[one.name]} if one.kind == GRADIENTS else {}
        # What the optimizer should have changed, and where it began.
        self.updates = {f"{n}\0after": result.weights[n] for n in names if n in result.weights}
        self.updates |= {f"{n}\0before": before[n] for n in names}
        self.told = {
            "parts": [Part(m.replica, m.counted, m.loss) for m in result.micros],
            "reference_loss": result.loss,
            "use_names": [*self.uses],
            "shares": len(self.shares),
            "random": _random(ref, here),
        }


def _random(ref: Reference, here: Fed) -> bool:
    """Whether the module gives something else with other numbers from torch's generator."""
    values = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            values.append(float(ref._forward(here, None)[0]))
    return values[0] != values[1]


def _wrong(differences: Sequence[Difference], one: Difference, size: int) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(size)]
    for other in differences:
        if other.order == one.order and not other.excess <= 1:
            found[other.rank].append(other.name)
    return found


def _names(recorder: Recorder, wrong: Sequence[Sequence[str]], first: str) -> list[str]:
    """Some of the names that differ, of every rank, small ones first; the same on all ranks."""
    specs, chosen = recorder.model._applied.specs, [first] if first in recorder.model._applied.specs else []
    for names in wrong:
        small = sorted((n for n in names if n in specs), key=lambda n: (torch.Size(specs[n].shape).numel(), n))
        few = small[: max(1, _MOST_NAMES // len(wrong))]
        chosen += [n for n in few if n not in chosen and torch.Size(specs[n].shape).numel() <= _MOST_ELEMENTS]
    return chosen


def _shard(recorder: Recorder, name: str, whole: Tensor) -> Tensor:
    return take(whole, spec_of(recorder, name, whole), recorder.model.world.tensor.index).double()


def _fit(
    recorder: Recorder, here: Mapping[str, Tensor | None], wrong: Sequence[str], shares: Sequence[Mapping[str, Tensor]]
) -> Fit | None:
    """This rank's wrong gradients as a sum over the microbatches' gradients."""
    names = [n for n in wrong if shares and n in shares[0] and n in here]
    if not names:
        return None
    columns = torch.stack([torch.cat([_shard(recorder, n, s[n]).reshape(-1) for n in names]) for s in shares], 1)
    found = torch.cat([_zeros(here[n], _shard(recorder, n, shares[0][n])).reshape(-1) for n in names])
    return fit(columns, found)


def fit(columns: Tensor, found: Tensor) -> Fit:
    """The coefficients of `columns` [n, m] that give `found` [n], by least squares."""
    solved = torch.linalg.lstsq(columns, found[:, None], driver="gelsd").solution[:, 0]
    size = max(float(found.norm()), float(columns.sum(1).norm()), _TINY)
    return Fit(tuple(solved.tolist()), float((columns @ solved - found).norm()) / size)


def _returned(
    recorder: Recorder, names: Sequence[str], shares: Sequence[Mapping[str, Tensor]], parts: Sequence[Part]
) -> tuple[str, float] | None:
    """The parameter of this rank to which most wrongly its microbatches' gradients have come back, and how wrongly."""
    world, found = recorder.model.world, []
    own = [share for share, part in zip(shares, parts) if part.replica == world.data.index]
    for name in (n for n in names if own and n in own[0] and n in recorder.watch.returned):
        wanted = _shard(recorder, name, sum(share[name] for share in own))
        here = recorder.watch.returned[name].cpu().double() / world.data.size
        if here.shape == wanted.shape:
            found.append((largest(here - wanted) / max(largest(wanted), _TINY), name))
    worst = max(found, default=None)
    return None if worst is None else (worst[1], worst[0])


def _zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x.double()


def _totals(
    recorder: Recorder, here: Mapping[str, Tensor | None], name: str, whole: Mapping[str, Tensor], clipped: bool
) -> float:
    """How far the sum of what the tensor ranks have of `name` is from the gradient, where none has it already."""
    world = recorder.model.world
    told = world.everyone.objects(None if here.get(name) is None else here[name].double())
    wanted = whole[name].double()
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for rank, x in enumerate(told):
        place = world.mesh.place(rank)
        if x is not None and x.shape == wanted.shape:
            groups.setdefault((place.data, place.pipeline), []).append(x)
    errors = []
    for group in (group for group in groups.values() if len(group) == world.tensor.size):
        # Clipped gradients are known up to a factor: the norm that they were clipped by was wrong too.
        column, total = wanted.reshape(-1, 1), sum(group).reshape(-1)
        whole_each = all(fit(column, x.reshape(-1)).holds for x in group)
        factor = fit(column, total).coefficients[0] if clipped else 1.0
        errors.append(largest(wanted) if whole_each else largest(total - factor * column[:, 0]))
    return max(errors) / max(largest(wanted), _TINY) if errors else 1.0


def _uses(
    recorder: Recorder, here: Mapping[str, Tensor | None], name: str, uses: Mapping[str, Tensor]
) -> Fit | None:
    """The gradient of a tied parameter as a sum over its uses, on the first rank that has it."""
    mine = None
    if name in here and len(uses) > 1:
        columns = torch.stack([_shard(recorder, name, x).reshape(-1) for x in uses.values()], 1)
        mine = fit(columns, _zeros(here[name], _shard(recorder, name, next(iter(uses.values())))).reshape(-1))
    told = recorder.model.world.everyone.objects(mine)
    return next((one for one in told if one is not None), None)


def _moved(recorder: Recorder, wrong: Sequence[str], whole: Mapping[str, Tensor]) -> list[tuple[int, str, str]]:
    """Shards that are other slices of the whole than they should be."""
    world, found = recorder.model.world, []
    for name, x in shared(world, whole).items():
        spec = spec_of(recorder, name, x)
        if name not in wrong or spec.dim is None:
            continue
        places = [str(world.tensor.index)]
        rows = [checksum(row) for row in x.unbind(spec.dim)]
        mine = [checksum(row) for row in recorder.start[name].unbind(spec.dim)]
        right = [i for a, b in spec.held(world.tensor.index) for i in range(a, b)]
        places = [rows.index(row) if row in rows else -1 for row in mine]
        if -1 not in places and places != right:
            i = next(i for i, (a, b) in enumerate(zip(places, right)) if a != b)
            found.append((world.rank, name, f"row {right[i]} of dim {spec.dim} should be there, and it is {places[i]}"))
    return [one for part in world.everyone.objects(found) for one in part]


def _stepping(
    recorder: Recorder, one: Difference, updates: Mapping[str, Tensor], wrong: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What the optimizers did in the step."""
    world, step = recorder.model.world, recorder.records[one.step]
    groups = world.everyone.objects(step.groups)
    seen = {n for told in groups for members in told.values() for _, names in members for n in names}
    graded = [n for n, g in step.gradients.items() if g is not None and bool(g.any())]
    before = recorder.start if one.step == 0 else recorder.records[one.step - 1].weights | step.changed
    names = [n for n in wrong[world.rank] if f"{n}\0after" in updates and n in step.weights and n in before]
    mine = None
    if names:
        want = [_shard(recorder, n, updates[f"{n}\0after"] - updates[f"{n}\0before"]).reshape(-1) for n in names]
        made = [(step.weights[n].double() - before[n].double()).reshape(-1) for n in names]
        mine = fit(torch.cat(want)[:, None], torch.cat(made))
    trained = {n for n, p in recorder.model.named_parameters() if p.requires_grad}
    unseen = sorted({n for part in world.everyone.objects([n for n in graded if n in trained]) for n in part} - seen)
    return {
        "fits": world.everyone.objects(mine),
        "unseen": unseen,
        "idle": [rank for rank, told in enumerate(groups) if not told],
        "options": _unequal(groups),
    }


def _unequal(groups: Sequence[Mapping[int, Any]]) -> list[tuple[str, int, object, int, object]]:
    """Options of the same group that differ between ranks."""
    first: dict[tuple[int, int, str], tuple[int, object]] = {}
    found = []
    for rank, told in enumerate(groups):
        for number, members in told.items():
            for place, (options, _) in enumerate(members):
                for key, value in options.items():
                    other, theirs = first.setdefault((number, place, key), (rank, value))
                    if isinstance(value, float | int | bool | str | tuple) and value != theirs:
                        found.append((key, other, theirs, rank, value))
    return found
