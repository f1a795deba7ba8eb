"""The exact min-max cut of a row of costs into consecutive stages, also for ranks of unequal speed.

    costs 3 1 1 1 2, 2 stages:     3 1 | 1 1 2     slowest stage 4
    speeds 1 and 2:                3 | 1 1 1 2     3 / 1 and 5 / 2, slowest 3

Dynamic programming over prefixes, twice: the first pass finds the least time of the slowest stage, the second, among
all cuts that reach it, the evenest one (least sum of squares). Stages grow backwards from where they end, and growing
stops once the stage alone is worse than the best cut known, so 1,000 layers and 64 stages take about a second.
The problem is that of Pinar and Aykanat 2004, https://doi.org/10.1016/j.jpdc.2004.05.003.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, product
from math import inf, isfinite


def partition(costs: Sequence[float], stages: int, speeds: Sequence[float] | None = None) -> tuple[int, ...]:
    """Where to cut: `stages + 1` boundaries b, stage s being `costs[b[s]:b[s + 1]]`, none of them empty.

    No other cut has a smaller slowest stage, its time being the sum of its costs over `speeds[s]` (1 if not given).
    Among equals the evenest cut is taken, then the one whose last stages are shortest. Raises ValueError for
    more stages than costs, negative costs, and speeds that are not above 0.

    Example:
        >>> partition([3, 1, 1, 1, 2], stages=2)
        (0, 2, 5)
        >>> partition([3, 1, 1, 1, 2], stages=2, speeds=[1, 2])
        (0, 1, 5)
    """
    speeds = (1.0,) * stages if speeds is None else tuple(speeds)
    _check(costs, stages, speeds)
    prefix = list(accumulate(costs, initial=0))

    def seconds(stage: int, start: int, stop: int) -> float:
        return (prefix[stop] - prefix[start]) / speeds[stage]

    def slowest(best: float, stage: float) -> float:
        return max(best, stage)

    cut = _best(len(costs), stages, seconds, slowest, inf)
    limit = max(seconds(s, cut[s], cut[s + 1]) for s in range(stages))

    def unevenness(best: float, stage: float) -> float:
        return best + (stage / limit) ** 2 if limit else best

    return _best(len(costs), stages, seconds, unevenness, limit)


def level(costs: Sequence[float], cut: Sequence[int], homes: Sequence[int]) -> tuple[int, ...]:
    """`cut`, moved so that the ranks are as evenly busy as its neighbours allow; `homes[s]` is the rank of stage s.

    The least slowest stage says nothing of a rank that holds several. One boundary after another, alone or with those
    that follow it, moves by one place while that makes the busiest rank less busy, or, if it stays as busy, the
    slowest stage shorter or the stages more even. With one stage per rank the exact cut stays as it is.

    Example:
        >>> level([1, 1, 1, 1, 2, 2], (0, 2, 4, 5, 6), homes=[0, 1, 0, 1])
        (0, 2, 4, 5, 6)
        >>> level([1, 1, 1, 1, 1, 1, 3], (0, 1, 3, 6, 7), homes=[0, 1, 0, 1])
        (0, 2, 4, 6, 7)
    """
    prefix = list(accumulate(costs, initial=0))

    def badness(cut: Sequence[int]) -> tuple[float, float, float]:
        stages = [prefix[b] - prefix[a] for a, b in zip(cut, cut[1:])]
        busy = {home: sum(s for s, h in zip(stages, homes) if h == home) for home in homes}
        return max(busy.values()), max(stages), sum(s * s for s in stages)

    best, improved = tuple(cut), True
    while improved:
        improved = False
        for first, last, step in product(range(1, len(cut) - 1), range(1, len(cut) - 1), (-1, 1)):
            moved = tuple(b + step * (first <= i <= last) for i, b in enumerate(best))
            if all(a < b for a, b in zip(moved, moved[1:])) and badness(moved) < badness(best):
                best, improved = moved, True
    return best


def _best(
    layers: int,
    stages: int,
    seconds: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
    limit: float,
) -> tuple[int, ...]:
    """The cut with the least joined time whose stages take `limit` each at most; `join` must not fall in either."""
    least = [0.0] + [inf] * layers  # of the first `stop` layers, cut into the stages so far
    last: list[list[int]] = []  # where the last of these stages starts
    for stage in range(stages):
        fresh, starts = [inf] * (layers + 1), [0] * (layers + 1)
        for stop in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start in range(stop - 1, stage - 1, -1):
                own = seconds(stage, start, stop)
                if own > limit or join(0.0, own) > fresh[stop]:
                    break
                if join(least[start], own) < fresh[stop]:
                    fresh[stop], starts[stop] = join(least[start], own), start
        least = fresh
        last.append(starts)
    cut = [layers]
    for starts in reversed(last):
        cut.append(starts[cut[-1]])
    return tuple(reversed(cut))


def _check(costs: Sequence[float], stages: int, speeds: Sequence[float]) -> None:
    if stages < 1:
        raise ValueError(f"{stages} stages cannot be cut; ask for 1 or more")
    if stages > len(costs):
        raise ValueError(
            f"{stages} stages cannot be cut from {len(costs)} layers, each stage needs one at least; "
            f"use a pipeline of {len(costs)} stages or fewer"
        )
    for layer, cost in enumerate(costs):
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"layer {layer} costs {cost}; costs are finite and not negative")
    if len(speeds) != stages:
        raise ValueError(f"{len(speeds)} speeds were given for {stages} stages; give one for each")
    for stage, speed in enumerate(speeds):
        if not (isfinite(speed) and speed > 0):
            raise ValueError(f"stage {stage} has speed {speed}; speeds are finite and above 0")
