"""What the turns of a run say: medians, ratios round by round, bars, and whether all trained alike.

A ratio is taken within a round, where both sides met the same state of the machine, and the median over the rounds
is what counts. The bubble of P stages and M microbatches: a stage works during M of M + P - 1 slots (Huang et al.
2019, GPipe, section 2.3), so the shortest possible step is (M + P - 1) / M times the work of one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.candidates import Bar, Candidate

FIRST_TOLERANCE, LATER_TOLERANCE = 1e-5, 1e-4  # relative; fp32, and AdamW magnifies what the first steps differ in


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and their extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Outcome:
    """One bar: the ratio that was measured and whether it clears the bar."""

    bar: Bar
    ratio: Spread

    @property
    def passed(self) -> bool:
        return self.ratio.median >= self.bar.speed


def bubble(microbatches: int, stages: int = 2) -> float:
    """The shortest time of a pipelined step over that of one stage's work.

    Example:
        >>> bubble(8)
        1.125
    """
    return (microbatches + stages - 1) / microbatches


def ratios(ours: Sequence[float], rival: Sequence[float], handicap: float = 1.0) -> Spread:
    """How many times as fast as the rival, round by round; `handicap` multiplies the rival's seconds."""
    return Spread.of([theirs * handicap / mine for mine, theirs in zip(ours, rival, strict=True)])


def judge(bars: Sequence[Bar], seconds: Mapping[str, Sequence[float]], microbatches: int) -> list[Outcome]:
    """The outcome of each bar whose two sides were measured. `seconds[name]` per step, one value per round."""
    return [
        Outcome(bar, ratios(seconds[bar.ours], seconds[bar.rival], bubble(microbatches) if bar.bubble else 1.0))
        for bar in bars
        if bar.ours in seconds and bar.rival in seconds
    ]


def disagreement(candidates: Sequence[Candidate], losses: Mapping[str, Sequence[float]]) -> str | None:
    """A sentence about the first candidate whose losses are not those of the first one, or None.

    Losses are those of steps 0, 1, ... on the same batches; of candidates whose ranks never meet only the first counts.
    """
    present = [candidate for candidate in candidates if losses.get(candidate.name)]
    if not present:
        return None
    first = min(present, key=lambda candidate: candidate.learns_alone)
    for other in present:
        pairs = list(zip(losses[first.name], losses[other.name]))
        for step, (right, seen) in enumerate(pairs[:1] if other.learns_alone or first.learns_alone else pairs):
            tolerance = LATER_TOLERANCE if step else FIRST_TOLERANCE
            if not abs(seen - right) <= tolerance * abs(right):  # NaN agrees with nothing
                return (
                    f"the loss of {other.name} at step {step} is {seen:.7f}, that of {first.name} is {right:.7f}: "
                    f"they differ by more than {tolerance:g} of it, so the candidates do not do the same work"
                )
    return None
