"""The time of a schedule under a cost: who computes when, who waits, and what is held.

A rank does its actions in order, each as soon as what it needs has been computed and has come. Messages
never block and do not slow one another: one takes `transfer` seconds after its sender has finished. Reductions go
on beside the work, one after another on each rank, and the step ends when the last one has.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from statistics import median

from hybridpar.pipeline.action import Action, Kind
from hybridpar.pipeline.order import replay
from hybridpar.pipeline.schedule import Schedule
from hybridpar.trace.spans import Span, Trace


@dataclass(frozen=True)
class Cost:
    """Seconds: `forward[s]` and `backward[s]` of one microbatch on stage s, `reduce[s]` of its gradients' reduction,
    and `transfer[p][q]` of a message from pipeline index p to q.

    Example:
        >>> Cost.even(stages=2, ranks=2, forward=1.0, backward=2.0, transfer=0.1).transfer
        ((0.0, 0.1), (0.1, 0.0))
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: tuple[tuple[float, ...], ...]
    reduce: tuple[float, ...]

    def __post_init__(self) -> None:
        for what in ("forward", "backward", "reduce", "transfer"):
            for index, value in enumerate(getattr(self, what)):
                for seconds in value if what == "transfer" else (value,):
                    if not (isfinite(seconds) and seconds >= 0):
                        raise ValueError(f"{what}[{index}] takes {seconds} seconds; times are finite and not negative")

    @classmethod
    def even(
        cls,
        stages: int,
        ranks: int,
        forward: float = 1.0,
        backward: float = 2.0,
        transfer: float = 0.0,
        reduce: float = 0.0,
    ) -> Cost:
        """The same for all stages and all pairs of ranks."""
        links = tuple(tuple(0.0 if p == q else transfer for q in range(ranks)) for p in range(ranks))
        return cls((forward,) * stages, (backward,) * stages, links, (reduce,) * stages)

    @classmethod
    def measured(cls, trace: Trace, ranks: int, transfer: float = 0.0) -> Cost:
        """The median seconds of each stage in a measured trace, to simulate the schedule that it ran."""
        stages = 1 + max((span.stage for span in trace.spans), default=-1)
        taken: dict[tuple[str, int], list[float]] = {}
        for span in trace.spans:
            taken.setdefault((span.kind, span.stage), []).append(span.seconds)
        F, B, R = (tuple(median(taken.get((kind, s), [0.0])) for s in range(stages)) for kind in "FBR")
        return cls(F, B, cls.even(stages, ranks, transfer=transfer).transfer, R)

    def seconds(self, action: Action) -> float:
        """How long `action` takes."""
        table = {Kind.FORWARD: self.forward, Kind.BACKWARD: self.backward, Kind.REDUCE: self.reduce}
        return table[action.kind][action.stage]


def simulate(schedule: Schedule, cost: Cost) -> Trace:
    """When each action of `schedule` begins and ends.

    Raises ValueError where the cost is for other numbers, and where ranks would wait for one another for ever.

    Example:
        >>> from hybridpar.pipeline.schedule import gpipe
        >>> simulate(gpipe(ranks=2, microbatches=3), Cost.even(stages=2, ranks=2)).makespan
        12.0
    """
    _check(schedule, cost)
    end: dict[Action, float] = {}
    computes, reduces = [0.0] * schedule.ranks, [0.0] * schedule.ranks  # when each rank is free to
    spans = []
    for rank, action in replay(schedule.actions, schedule.stages, schedule.microbatches):
        needs = action.needs(schedule.stages, schedule.microbatches)
        come = [end[need] + cost.transfer[schedule.stage_ranks[need.stage]][rank] for need in needs]
        free = reduces if action.kind is Kind.REDUCE else computes
        start = max([computes[rank], free[rank], *come])
        end[action] = free[rank] = start + cost.seconds(action)
        spans.append(Span(rank, action.kind.value, action.stage, action.micro, start, end[action]))
    return Trace(tuple(sorted(spans, key=lambda span: (span.rank, span.start, span.end))), schedule.name)


def held(schedule: Schedule) -> tuple[int, ...]:
    """The most activations that each rank holds at once: of a microbatch and stage, from forward to backward.

    Example:
        >>> from hybridpar.pipeline.schedule import one_f_one_b
        >>> held(one_f_one_b(ranks=4, microbatches=8))
        (4, 3, 2, 1)
    """
    step = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.REDUCE: 0}
    peaks = []
    for row in schedule.actions:
        now = peak = 0
        for action in row:
            now += step[action.kind]
            peak = max(peak, now)
        peaks.append(peak)
    return tuple(peaks)


def _check(schedule: Schedule, cost: Cost) -> None:
    for what in ("forward", "backward", "reduce"):
        if len(getattr(cost, what)) != schedule.stages:
            raise ValueError(
                f"the cost has {len(getattr(cost, what))} {what} times and schedule {schedule.name} has "
                f"{schedule.stages} stages; give one for each stage"
            )
    if [len(row) for row in cost.transfer] != [schedule.ranks] * schedule.ranks:
        raise ValueError(f"the cost's transfer is not a table of {schedule.ranks} x {schedule.ranks} ranks")
