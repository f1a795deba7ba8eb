"""Signatures of gradients: what the microbatches, the uses of a tied weight and the tensor ranks add to them.

    gradient of a rank = sum over microbatches of c_m x (gradient of microbatch m)      c_m = 1 is right

    c_m                                     cause
    D for its own replica's, else 0         never averaged over the data axis
    D everywhere                            summed over the data axis, not averaged
    T everywhere                            summed over the tensor axis where each rank had the whole
    0 for one                               that microbatch is missing
    in proportion to 1 / samples            every microbatch counts the same
    one number per rank                     each rank has scaled its gradients: clipped by its own norm

D and T are the sizes of the data and the tensor axis. Where no c fits, the sum over the tensor ranks is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from hybridpar.proof.facts import CLOSE, Cause, Facts, Part, module_of, near, told_by

EVEN = "every microbatch counts the same in the {what}, though they count {counts}"


def unlike_averages(facts: Facts) -> Cause | None:
    """Gradients that only weigh the microbatches wrongly."""
    wrong = [rank for rank, names in enumerate(facts.wrong) if names]
    fits = {rank: facts.fits[rank] for rank in wrong} if facts.fits else {}
    if not fits or any(fit is None or not fit.holds for fit in fits.values()):
        return None
    data, _, tensor = facts.degrees
    if not any(told_by(c) for fit in fits.values() for c in fit.coefficients):
        return None
    rank, fit = next(iter(fits.items()))
    everything = all(len(facts.wrong[r]) == facts.held[r] for r in wrong) and len(wrong) == len(facts.places)
    factors = {r: f.factor for r, f in fits.items()}
    if all(f is not None for f in factors.values()):
        return _scaled(facts, factors, everything)
    own = {r: [part.replica == facts.places[r][0] for part in facts.parts] for r in wrong}
    if data > 1 and all(_only(fits[r].coefficients, own[r], None if facts.clipped else data) for r in wrong):
        return Cause("missing reduction", "gradients are not averaged over the data axis: each replica has stepped "
                     "with those of its own samples (wrap the optimizer in hp.DistributedOptimizer)", rank=rank)
    for r, one in fits.items():
        weights = _unclipped(facts, one.coefficients)
        missing = [m for m, c in enumerate(weights) if near(c, 0)]
        if len(missing) == 1 and all(near(c, 1) for m, c in enumerate(weights) if m not in missing):
            return Cause("missing microbatch", f"microbatch {missing[0]} is missing in the gradients of rank {r}",
                         microbatch=missing[0], rank=r)  # fmt: skip
        twice = [m for m, c in enumerate(weights) if near(c, 2)]
        if len(twice) == 1 and all(near(c, 1) for m, c in enumerate(weights) if m not in twice):
            return Cause("doubled microbatch", f"microbatch {twice[0]} counts twice in the gradients of rank {r}",
                         microbatch=twice[0], rank=r)  # fmt: skip
    if all(_even(one.coefficients, facts.parts) for one in fits.values()):
        return Cause("unequal microbatches", EVEN.format(what="gradient", counts=counts(facts.parts)))
    shown = ", ".join(f"{c:.3g}" for c in fit.coefficients[:8])
    return Cause("weights of microbatches", f"the microbatches count {shown} times what they should", rank=rank)


def _scaled(facts: Facts, factors: dict[int, float], everything: bool) -> Cause:
    """All wrong gradients are right up to one factor on each rank."""
    data, _, tensor = facts.degrees
    rank, factor = next(iter(factors.items()))
    if not all(near(f, factor) for f in factors.values()):
        told = ", ".join(f"{f:.4g} on rank {r}" for r, f in list(factors.items())[:4])
        return Cause("local clipping", f"each rank has scaled its gradients by a number of its own ({told}): clipped "
                     "by the norm of what the rank holds; use hp.clip_grad_norm_(model, ...)", rank=rank)  # fmt: skip
    module = None if everything else module_of(facts.name)
    if near(factor, 0):
        return Cause("missing", "there is no gradient at all: nothing has come back to this parameter", module)
    axes = [("data", data), ("tensor", tensor)] if everything else [("tensor", tensor), ("data", data)]
    for axis, size in axes:
        if size > 1 and near(factor, size):
            return Cause("doubled reduction", f"gradients are summed over the {axis} axis where they should be "
                         f"{'averaged' if axis == 'data' else 'taken as they are'}: they are {size} times too large",
                         module)  # fmt: skip
        if size > 1 and near(factor, 1 / size):
            return Cause("missing reduction", f"gradients are divided by the size of the {axis} axis once too often: "
                         f"they are {size} times too small", module)  # fmt: skip
    # One wrong gradient gives a wrong norm, and clipping by that scales all the others.
    norm = "; or another gradient is wrong, and with it the norm that all are clipped by: verify without clipping"
    return Cause("scaled", f"gradients are {factor:.6g} times what they should be: look at the weights of the "
                 "microbatches and at what scales gradients before the optimizer steps"
                 f"{norm * facts.clipped}", module)  # fmt: skip


def tied(facts: Facts) -> Cause | None:
    """The gradient of a tied parameter, by what each of its uses contributes."""
    fit = facts.uses
    if fit is None or not fit.holds or len(fit.coefficients) < 2:
        return None
    least = min((c for c in fit.coefficients if not near(c, 0)), default=1.0) if facts.clipped else 1.0
    for name, c in zip(facts.use_names, [c / least for c in fit.coefficients]):
        if near(c, 0):
            return Cause("tied weight", f"{facts.name} is tied to {_others(facts)} and the gradient of its use as "
                         f"{name} is missing", module_of(facts.name))  # fmt: skip
        if near(c, 2):
            return Cause("tied weight", f"{facts.name} is tied to {_others(facts)} and the gradient of its use as "
                         f"{name} counts twice", module_of(facts.name))  # fmt: skip
    return None


def unsummed(facts: Facts) -> Cause | None:
    """Shares that add up to the gradient along the tensor axis."""
    if facts.degrees[2] > 1 and facts.totals < CLOSE:
        return Cause("missing reduction", f"the gradient of {facts.name} is never summed over the tensor axis: each "
                     "rank has its own share", module_of(facts.name))  # fmt: skip
    return None


def returned_wrongly(facts: Facts) -> Cause | None:
    """Whether gradients are wrong as they come back from the backward pass, or become wrong later."""
    told = [one for one in facts.returned if one is not None]
    wrong = [rank for rank, one in enumerate(facts.returned) if one is not None and not one[1] < CLOSE]
    if not told:
        return None
    if not wrong and not facts.clipped:
        return Cause("changed gradient", f"the microbatches give the right gradient of {facts.name} on every rank, and "
                     "it is changed before the optimizer steps: where it is averaged, by a hook, or by the script",
                     module_of(facts.name))  # fmt: skip
    replicas = {facts.places[rank][0] for rank in wrong}
    if len(replicas) != 1 or facts.degrees[0] == 1:
        return None
    name = facts.returned[wrong[0]][0]
    where = "this rank" if len(wrong) == 1 else f"replica {replicas.pop()}"
    return Cause("one replica", f"the gradient of {name} is wrong on {where} before it is averaged, and right on the "
                 "others: look for what the script does differently there", module_of(name), rank=wrong[0])  # fmt: skip


def _others(facts: Facts) -> str:
    return ", ".join(name for name in facts.use_names if name != facts.name)


def _only(found: Sequence[float], own: Sequence[bool], factor: float | None) -> bool:
    """Whether `found` is `factor` (or any, if it is None) where `own` is true, and zero elsewhere."""
    factor = next((c for c, mine in zip(found, own) if mine), 0.0) if factor is None else factor
    return all(near(c, factor if mine else 0.0) for c, mine in zip(found, own)) and not near(factor, 0.0)


def _unclipped(facts: Facts, coefficients: Sequence[float]) -> list[float]:
    """The coefficients as they were before clipping: most of them were 1."""
    if not facts.clipped:
        return list(coefficients)
    usual = median(c for c in coefficients if not near(c, 0)) if any(not near(c, 0) for c in coefficients) else 1.0
    return [c / usual for c in coefficients]


def _even(coefficients: Sequence[float], parts: Sequence[Part]) -> bool:
    """Whether coefficient x count is the same for all, where the counts are not."""
    made = [c * p.counted for c, p in zip(coefficients, parts)]
    return len({p.counted for p in parts}) > 1 and all(near(x / made[0], 1) for x in made) if made[0] else False


def counts(parts: Sequence[Part]) -> str:
    shown = [f"{p.counted:g}" for p in parts[:6]]
    return ", ".join(shown) + (", ..." if len(parts) > 6 else "")
