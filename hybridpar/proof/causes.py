"""From facts about a difference to its likely cause: each function knows one signature.

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

from collections.abc import Callable, Sequence
from statistics import fmean, median

from hybridpar.proof.facts import CLOSE, Cause, Facts, Mask, Part, near


def likely(facts: Facts) -> Cause:
    """The first signature that fits.

    Example:
        >>> facts = Facts("updated parameters", "a.weight", 0, (2, 1, 1), [(0, 0, 0), (1, 0, 0)], idle=[1])
        >>> likely(facts).key
        'no optimizer step'
    """
    for signature in _BY_KIND[facts.kind]:
        cause = signature(facts)
        if cause is not None:
            return cause
    module = facts.divergence.module if facts.divergence else None
    return Cause("unknown", "no signature fits: look at what this module does differently when it is cut", module)


# ---- the start


def loaded_elsewhere(facts: Facts) -> Cause | None:
    """A shard that is another slice of the whole."""
    if not facts.moved:
        return None
    rank, name, slices = facts.moved[0]
    return Cause("wrong slice", f"rank {rank} has loaded its shard of {name} from the wrong slice: {slices}",
                 _module(name), rank=rank)  # fmt: skip


def unequal_start(facts: Facts) -> Cause | None:
    ranks = [rank for rank, names in enumerate(facts.wrong) if names]
    return Cause("unequal start", f"{_ranks(ranks)} begin with other weights than the module had when it was cut: they "
                 "were changed, or loaded, on some ranks only", rank=ranks[0]) if ranks else None  # fmt: skip


# ---- forward


def drawn_again(facts: Facts) -> Cause | None:
    return Cause("torch's generator", "the module draws random numbers from torch's own generator (a dropout as a "
                 "function, or inside torch's attention or recurrent layers), which differ from layout to layout: use "
                 "nn.Dropout modules, or verify with it turned off") if facts.random else None  # fmt: skip


def masked(facts: Facts) -> Cause | None:
    return same_mask(facts.masks)


def same_mask(masks: Sequence[Mask]) -> Cause | None:
    """Masks that should differ and do not, or the other way round."""
    found: dict[tuple[str, int, int], Mask] = {}
    for one in masks:
        if one.length < 32:  # may be alike by chance
            continue
        other = found.setdefault((one.site, one.crc, one.length), one)
        if (other.replica, other.sample, other.parts) != (one.replica, one.sample, one.parts):
            who = f"ranks {other.rank} and {one.rank}" if other.rank != one.rank else f"rank {one.rank}"
            what = "different parts of one sample" if other.parts != one.parts else "different samples"
            return Cause("same dropout mask", f"{who} draw{'s' * (other.rank == one.rank)} the same dropout mask at "
                         f"{_site(one)} for {what}",
                         _site(one), rank=max(other.rank, one.rank))  # fmt: skip
    drawn: dict[tuple[str, int, int, object], Mask] = {}
    for one in masks:
        other = drawn.setdefault((one.site, one.replica, one.sample, one.parts), one)
        if other.crc != one.crc:
            return Cause("different dropout masks", f"ranks {other.rank} and {one.rank} draw different dropout masks "
                         f"at {_site(one)} for sample {one.sample}, which both hold", _site(one), rank=one.rank)
    wrong = [one for one in masks if not one.right]
    return Cause("dropout mask", f"rank {wrong[0].rank} draws another dropout mask at {_site(wrong[0])} for sample "
                 f"{wrong[0].sample} than one process does", _site(wrong[0]), rank=wrong[0].rank) if wrong else None


def first_module(facts: Facts) -> Cause | None:
    """What the first wrong tensor between modules tells."""
    one, tensor = facts.divergence, facts.degrees[2]
    if one is None:
        return None
    what = f"what {one.module} gives" if one.forward else f"the gradient of what {one.module} gives"
    module = one.module if one.forward else one.reader or one.module
    by = f", which {one.reader} hands back," if one.reader and not one.forward else ""
    answers = (
        (tensor > 1 and one.total < CLOSE, "missing reduction", "is never summed over the tensor axis: each rank has "
         "its own share"),
        (tensor > 1 and one.residual < CLOSE and near(one.ratio, tensor), "doubled reduction",
         f"is summed over the tensor axis once too often: it is {tensor} times too large"),
        (one.residual < CLOSE and near(one.ratio, 0), "missing", "is zero: nothing has come from the other stage"),
        (one.twin < CLOSE, "wrong slice", "belongs to another tensor index: it is the wrong slice"),
        (one.residual < CLOSE, "scaled", f"is {one.ratio:.6g} times what it should be"),
    )  # fmt: skip
    for true, key, words in answers:
        if true:
            return Cause(key, f"{what}{by} {words}", module, one.microbatch, one.rank)
    return None


def weighed_loss(facts: Facts) -> Cause | None:
    """A loss that is another mean of the right losses of the microbatches."""
    parts, loss = facts.parts, facts.loss
    total = sum(p.counted for p in parts)
    if not parts or not total:
        return None
    whole = sum(p.counted * p.loss for p in parts)
    replicas = [[p for p in parts if p.replica == d] for d in range(facts.degrees[0])]
    means = [sum(p.counted * p.loss for p in r) / s for r in replicas if (s := sum(p.counted for p in r))]
    if near(loss, fmean(p.loss for p in parts)):
        return Cause("unequal microbatches", _EVEN.format(what="loss", counts=_counts(parts)))
    if near(loss, fmean(means)):
        return Cause("unequal replicas", "the loss is the mean of the replicas' means, though they count "
                     f"{_counts([Part(0, sum(p.counted for p in r), 0) for r in replicas])}")  # fmt: skip
    for d, mean in enumerate(means):
        if near(loss, mean):
            return Cause("missing reduction", f"the loss is that of replica {d} alone: it is not averaged over the "
                         "data axis")  # fmt: skip
    for m, p in enumerate(parts):
        rest = whole - p.counted * p.loss
        if near(loss, rest / total) or total > p.counted and near(loss, rest / (total - p.counted)):
            return Cause("missing microbatch", f"microbatch {m} is missing in the loss", microbatch=m)
    if facts.divergence is not None:
        return None
    factor = loss / (whole / total)
    axis = {facts.degrees[2]: "tensor", facts.degrees[0]: "data", facts.degrees[1]: "pipeline"}.get(round(factor))
    if near(factor, round(factor)) and round(factor) > 1 and axis:
        return Cause("doubled reduction", f"the loss is summed over the {axis} axis once too often: it is "
                     f"{round(factor)} times too large")  # fmt: skip
    return Cause("scaled", f"the modules' outputs are right and the loss is {factor:.6g} times what it should be: look "
                 "at the weights of the microbatches and at what the loss divides by")  # fmt: skip


# ---- gradients


def unlike_averages(facts: Facts) -> Cause | None:
    """Gradients that only weigh the microbatches wrongly."""
    wrong = [rank for rank, names in enumerate(facts.wrong) if names]
    fits = {rank: facts.fits[rank] for rank in wrong} if facts.fits else {}
    if not fits or any(fit is None or not fit.holds for fit in fits.values()):
        return None
    data, _, tensor = facts.degrees
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
        return Cause("unequal microbatches", _EVEN.format(what="gradient", counts=_counts(facts.parts)))
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
    module = None if everything else _module(facts.name)
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
    return Cause("scaled", f"gradients are {factor:.6g} times what they should be: look at the weights of the "
                 "microbatches and at what scales gradients before the optimizer steps", module)  # fmt: skip


def tied(facts: Facts) -> Cause | None:
    """The gradient of a tied parameter, by what each of its uses contributes."""
    fit = facts.uses
    if fit is None or not fit.holds or len(fit.coefficients) < 2:
        return None
    least = min((c for c in fit.coefficients if not near(c, 0)), default=1.0) if facts.clipped else 1.0
    for name, c in zip(facts.use_names, [c / least for c in fit.coefficients]):
        if near(c, 0):
            return Cause("tied weight", f"{facts.name} is tied to {_others(facts)} and the gradient of its use as "
                         f"{name} is missing", _module(facts.name))  # fmt: skip
        if near(c, 2):
            return Cause("tied weight", f"{facts.name} is tied to {_others(facts)} and the gradient of its use as "
                         f"{name} counts twice", _module(facts.name))  # fmt: skip
    return None


def unsummed(facts: Facts) -> Cause | None:
    """Shares that add up to the gradient along the tensor axis."""
    if facts.degrees[2] > 1 and facts.totals < CLOSE:
        return Cause("missing reduction", f"the gradient of {facts.name} is never summed over the tensor axis: each "
                     "rank has its own share", _module(facts.name))  # fmt: skip
    return None


# ---- buffers and updates


def buffers_apart(facts: Facts) -> Cause | None:
    ranks = [rank for rank, names in enumerate(facts.wrong) if names]
    return Cause("buffer", f"the buffer {facts.name} is not synchronised: {_ranks(ranks)} of {len(facts.places)} "
                 f"{'has' if len(ranks) == 1 else 'have'} another value than one process that sees the same "
                 "microbatches", _module(facts.name), rank=ranks[0]) if ranks else None  # fmt: skip


def options_apart(facts: Facts) -> Cause | None:
    if not facts.options:
        return None
    key, a, x, b, y = facts.options[0]
    what = "learning rates" if key == "lr" else f"values of {key}"
    return Cause("unequal options", f"the optimizers have different {what}: {x} on rank {a} and {y} on rank {b}",
                 rank=b)  # fmt: skip


def not_stepped(facts: Facts) -> Cause | None:
    if facts.idle and len(facts.idle) < len(facts.places):
        return Cause("no optimizer step", f"the optimizer has not stepped on {_ranks(facts.idle)}", rank=facts.idle[0])
    return None


def never_seen(facts: Facts) -> Cause | None:
    seen = [name for name in facts.unseen if any(name in names for names in facts.wrong)]
    if not seen:
        return None
    return Cause("parameter not in the optimizer", f"the optimizer never saw {seen[0]}"
                 f"{f' and {len(seen) - 1} more' if len(seen) > 1 else ''}: it has a gradient and keeps its value; "
                 "give the optimizer model.parameters(), or freeze it with requires_grad_(False)", _module(seen[0]))


def scaled_update(facts: Facts) -> Cause | None:
    """Updates that are right up to a factor."""
    wrong = [rank for rank, names in enumerate(facts.wrong) if names]
    fit = facts.fits[wrong[0]] if wrong and facts.fits else None
    if fit is None or fit.factor is None:
        return Cause("update", "gradients are right and what the optimizer made of them is not: it computes over a "
                     "whole tensor what it should compute over all shards, or weights were changed after its step")
    if near(fit.factor, 0):
        return Cause("not updated", f"{facts.name} has a gradient and keeps its value", _module(facts.name))
    return Cause("update", f"gradients are right and the update is {fit.factor:.6g} times what it should be")


_EVEN = "every microbatch counts the same in the {what}, though they count {counts}"
_FORWARD: tuple[Callable[[Facts], Cause | None], ...] = (drawn_again, masked, first_module)
_BY_KIND: dict[str, tuple[Callable[[Facts], Cause | None], ...]] = {
    "weights at the start": (loaded_elsewhere, unequal_start),
    "loss": (*_FORWARD, weighed_loss),
    "gradients": (drawn_again, unlike_averages, unsummed, tied, masked, first_module),
    "buffers": (buffers_apart,),
    "updated parameters": (options_apart, not_stepped, never_seen, scaled_update),
}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _site(one: Mask) -> str:
    return one.site.rpartition(":")[0] or one.site


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


def _counts(parts: Sequence[Part]) -> str:
    shown = [f"{p.counted:g}" for p in parts[:6]]
    return ", ".join(shown) + (", ..." if len(parts) > 6 else "")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks[:8]))
