"""From facts about a difference to its likely cause: each function knows one signature; the first that fits counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from hybridpar.proof.facts import CLOSE, Cause, Divergence, Facts, Mask, Part, module_of, near, told_by
from hybridpar.proof.gradients import EVEN, counts, returned_wrongly, tied, unlike_averages, unsummed


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
    words = "no signature fits: look at what this module does differently when it is cut"
    one = facts.divergence
    return Cause("unknown", words, one.module, one.microbatch, one.rank) if one else Cause("unknown", words)


# ---- the start


def changed_apart(facts: Facts) -> Cause | None:
    """Weights that some ranks have changed between steps."""
    if not facts.apart:
        return None
    name, rank, words = next((one for one in facts.apart if one[0] == facts.name), facts.apart[0])
    return Cause("unequal change of weights", words, module_of(name), rank=rank)


def loaded_elsewhere(facts: Facts) -> Cause | None:
    """A shard that is another slice of the whole."""
    if not facts.moved:
        return None
    rank, name, slices = facts.moved[0]
    return Cause("wrong slice", f"rank {rank} has loaded its shard of {name} from the wrong slice: {slices}",
                 module_of(name), rank=rank)  # fmt: skip


def unequal_start(facts: Facts) -> Cause | None:
    ranks = [rank for rank, names in enumerate(facts.wrong) if names]
    if not ranks:
        return None
    begin = "begins" if len(ranks) == 1 else "begin"
    return Cause("unequal start", f"{_ranks(ranks)} {begin} with other weights than the module had when it was cut: "
                 "they were changed, or loaded, on some ranks only", rank=ranks[0])  # fmt: skip


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


def summed_wrongly(facts: Facts) -> Cause | None:
    """What the first wrong tensor between modules tells of the tensor axis."""
    one, tensor = facts.divergence, facts.degrees[2]
    if one is None or tensor == 1:
        return None
    if one.total < CLOSE:
        return _at(one, "missing reduction", "is never summed over the tensor axis: each rank has its own share")
    if one.residual < CLOSE and near(one.ratio, tensor):
        words = f"is summed over the tensor axis once too often: it is {tensor} times too large"
        return _at(one, "doubled reduction", words)
    return None


def first_module(facts: Facts) -> Cause | None:
    """What else it tells."""
    one = facts.divergence
    if one is None:
        return None
    if one.residual < CLOSE and near(one.ratio, 0):
        return _at(one, "missing", "is zero: nothing has come from the other stage")
    if one.twin < CLOSE:
        return _at(one, "wrong slice", "belongs to another tensor index: it is the wrong slice")
    if one.residual < CLOSE and told_by(one.ratio):
        return _at(one, "scaled", f"is {one.ratio:.6g} times what it should be")
    return None


def _at(one: Divergence, key: str, words: str) -> Cause:
    """A cause at the module that gives `one`, or whose backward made the gradient."""
    what = f"what {one.module} gives" if one.forward else f"the gradient of what {one.module} gives"
    by = f", which {one.reader} hands back," if one.reader and not one.forward else ""
    module = one.module if one.forward else one.reader or one.module
    return Cause(key, f"{what}{by} {words}", module, one.microbatch, one.rank)


def weighed_loss(facts: Facts) -> Cause | None:
    """A loss that is another mean of the right losses of the microbatches."""
    parts, loss = facts.parts, facts.loss
    total = sum(p.counted for p in parts)
    if not parts or not total:
        return None
    whole = sum(p.counted * p.loss for p in parts)
    replicas = [[p for p in parts if p.replica == d] for d in range(facts.degrees[0])]
    means = [sum(p.counted * p.loss for p in r) / s for r in replicas if (s := sum(p.counted for p in r))]
    if near(loss, whole / total):
        return _no_mean(facts, whole / total)
    if near(loss, fmean(p.loss for p in parts)):
        return Cause("unequal microbatches", EVEN.format(what="loss", counts=counts(parts)))
    if near(loss, fmean(means)):
        return Cause("unequal replicas", "the loss is the mean of the replicas' means, though they count "
                     f"{counts([Part(0, sum(p.counted for p in r), 0) for r in replicas])}")  # fmt: skip
    for d, mean in enumerate(means):
        if near(loss, mean):
            return Cause("missing reduction", f"the loss is that of replica {d} alone: it is not averaged over the "
                         "data axis")  # fmt: skip
    for m, p in enumerate(parts):
        rest = whole - p.counted * p.loss
        if near(loss, rest / total) or total > p.counted and near(loss, rest / (total - p.counted)):
            return Cause("missing microbatch", f"microbatch {m} is missing in the loss", microbatch=m)
    factor = loss / (whole / total)
    if facts.divergence is not None or not told_by(factor):
        return None
    axis = {facts.degrees[2]: "tensor", facts.degrees[0]: "data", facts.degrees[1]: "pipeline"}.get(round(factor))
    if near(factor, round(factor)) and round(factor) > 1 and axis:
        return Cause("doubled reduction", f"the loss is summed over the {axis} axis once too often: it is "
                     f"{round(factor)} times too large")  # fmt: skip
    return Cause("scaled", f"the modules' outputs are right and the loss is {factor:.6g} times what it should be: look "
                 "at the weights of the microbatches and at what the loss divides by")  # fmt: skip


def _no_mean(facts: Facts, mean: float) -> Cause | None:
    """The run's loss is the mean of its microbatches', which is not the loss of the whole batch."""
    if near(facts.reference_loss, mean):
        return None
    return Cause("no mean over samples", f"the loss is the mean over its microbatches, {mean:.6g}, and the function "
                 f"gives {facts.reference_loss:.6g} for the whole batch: one that sums, or that leaves out samples by "
                 "a mask of its own, is no mean over samples, and depends on how the batch is cut; use "
                 "hp.CrossEntropy(), whose ignored tokens do not count, or divide by the number of samples")


# ---- buffers and updates


def buffers_apart(facts: Facts) -> Cause | None:
    ranks = [rank for rank, names in enumerate(facts.wrong) if names]
    return Cause("buffer", f"the buffer {facts.name} is not synchronised: {_ranks(ranks)} of {len(facts.places)} "
                 f"{'has' if len(ranks) == 1 else 'have'} another value than one process that sees the same "
                 "microbatches", module_of(facts.name), rank=ranks[0]) if ranks else None  # fmt: skip


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
                 "give the optimizer model.parameters(), or freeze it with requires_grad_(False)", module_of(seen[0]))


def scaled_update(facts: Facts) -> Cause | None:
    """Updates that are right up to a factor."""
    wrong = [rank for rank, names in enumerate(facts.wrong) if names]
    fit = facts.fits[wrong[0]] if wrong and facts.fits else None
    if fit is None or fit.factor is None:
        return Cause("update", "gradients are right and what the optimizer made of them is not: it computes over a "
                     "whole tensor what it should compute over all shards, or weights were changed after its step")
    if near(fit.factor, 0):
        return Cause("not updated", f"{facts.name} has a gradient and keeps its value", module_of(facts.name))
    if not told_by(fit.factor):
        return None
    return Cause("update", f"gradients are right and the update is {fit.factor:.6g} times what it should be")


_FORWARD: tuple[Callable[[Facts], Cause | None], ...] = (drawn_again, masked, summed_wrongly, first_module)
_BY_KIND: dict[str, tuple[Callable[[Facts], Cause | None], ...]] = {
    "weights at the start": (changed_apart, loaded_elsewhere, unequal_start),
    "loss": (*_FORWARD, weighed_loss),
    "gradients": (
        drawn_again, masked, summed_wrongly, unlike_averages, tied, first_module, unsummed, returned_wrongly
    ),  # fmt: skip
    "buffers": (buffers_apart,),
    "updated parameters": (options_apart, not_stepped, never_seen, scaled_update),
}


def _site(one: Mask) -> str:
    return one.site.rpartition(":")[0] or one.site


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks[:8]))
