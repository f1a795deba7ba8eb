"""What the ranks must have alike when a step begins, and in words, where they have not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridpar.proof.facts import Cause, module_of

_MOST = 0.5  # of a shard's numbers: what clamps or prunes weights may leave another index's shard as it is


def strayed(told: list[tuple[Any, ...]]) -> str:
    """In words, why ranks that say ("end",) or ("step", number, replica, fingerprint, microbatches) do not agree.

    Example:
        >>> strayed([("step", 0, 0, 17, 2), ("step", 0, 0, 18, 2)])
        'ranks 0 and 1 are in one replica (data index 0) and were given different batches in step 0'
    """
    ended = [rank for rank, one in enumerate(told) if one[0] == "end"]
    if ended and len(ended) < len(told):
        other = next(rank for rank, one in enumerate(told) if one[0] == "step")
        return f"rank {ended[0]} has ended its training and rank {other} goes on to step {told[other][1]}"
    first: dict[int, int] = {}
    for rank, one in enumerate(told):
        if one[0] == "step":
            leader = first.setdefault(one[2], rank)
            if one[3:] != told[leader][3:]:
                what = "batches" if one[3] != told[leader][3] else "numbers of microbatches"
                return (
                    f"ranks {leader} and {rank} are in one replica (data index {one[2]}) and were given different "
                    f"{what} in step {one[1]}"
                )
    return ""


def frozen_apart(told: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Cause | None:
    """A parameter that some ranks have frozen and others train; `told` is (frozen, trained) of each rank.

    Example:
        >>> frozen_apart([((), ("a.weight",)), (("a.weight",), ())]).words
        'a.weight is frozen on rank 1 and trained on rank 0: call requires_grad_(False) on all ranks alike'
    """
    for rank, (frozen, _) in enumerate(told):
        for name in frozen:
            training = [other for other, (_, trained) in enumerate(told) if name in trained]
            if training:
                ranks = [other for other, (names, _) in enumerate(told) if name in names]
                words = f"{name} is frozen on {_ranks(ranks)} and trained on {_ranks(training)}"
                return Cause("unequal options", f"{words}: call requires_grad_(False) on all ranks alike",
                             module_of(name), rank=rank)  # fmt: skip
    return None


@dataclass(frozen=True)
class Change:
    """What came of a rank's part of a weight between two steps: checksums, the largest change, and the share of its
    numbers that changed. `index` tells which part it is; 0 where each rank has the whole."""

    index: int
    before: int
    after: int
    size: float
    share: float


@dataclass(frozen=True)
class Apart:
    """A weight that ranks changed in different ways before `step`: those who did, and those who did not."""

    step: int
    name: str
    changed: tuple[int, ...]
    kept: tuple[int, ...]
    size: float

    @property
    def words(self) -> str:
        when = f"between steps {self.step - 1} and {self.step}"
        if not self.kept:
            return f"{_ranks(self.changed)} have changed {self.name} in different ways {when}"
        others = f"{_ranks(self.kept)} {'has' if len(self.kept) == 1 else 'have'} not"
        return (
            f"{_ranks(self.changed)} {'has' if len(self.changed) == 1 else 'have'} changed {self.name} {when}, and "
            f"{others}: change weights on all ranks alike"
        )


def changed_apart(step: int, told: Sequence[Mapping[str, Change]]) -> Iterator[Apart]:
    """The weights that were not changed alike; `told` has what came of them on each rank that holds them.

    Replicas that were apart before are no matter of the change. What clamps weights may change one index's shard and
    not another's: shards are apart where one is changed for the most part, and another not at all.

    Example:
        >>> one, other = Change(0, 7, 7, 0.0, 0.0), Change(0, 7, 8, 0.1, 1.0)
        >>> next(changed_apart(2, [{"a": one}, {"a": other}])).words
        'rank 1 has changed a between steps 1 and 2, and rank 0 has not: change weights on all ranks alike'
    """
    for name in dict.fromkeys(name for one in told for name in one):
        holders = {rank: one[name] for rank, one in enumerate(told) if name in one}
        first: dict[int, Change] = {}
        for one in holders.values():
            first.setdefault(one.index, one)
        unlike = any(c.before == first[c.index].before and c.after != first[c.index].after for c in holders.values())
        shares = [c.share for c in holders.values()]
        if unlike or max(shares) > _MOST and not min(shares):
            changed = tuple(rank for rank, c in holders.items() if c.share)
            kept = tuple(rank for rank, c in holders.items() if not c.share)
            yield Apart(step, name, changed, kept, max(c.size for c in holders.values()))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks[:8]))
