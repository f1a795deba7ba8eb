"""Spans: when which rank did what. A trace is the same type whether it was simulated or measured.

    Span(rank=1, kind="F", stage=1, micro=0, start=1.0, end=2.0)      seconds

F and B are work. R, the reduction of a stage's gradients, goes on beside the work and is not counted as busy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

WORK = ("F", "B")


@dataclass(frozen=True)
class Span:
    """From `start` to `end`, in seconds, `rank` did `kind` for a stage; `micro` is None where there is none."""

    rank: int
    kind: str
    stage: int
    micro: int | None
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """Spans and a name.

    Example:
        >>> trace = Trace((Span(0, "F", 0, 0, 0.0, 1.0), Span(1, "F", 1, 0, 1.0, 2.0)), "two forwards")
        >>> trace.makespan, trace.bubble(), trace.busy(0)
        (2.0, 0.5, 1.0)
    """

    spans: tuple[Span, ...]
    name: str = ""

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that did something, in order."""
        return tuple(sorted({span.rank for span in self.spans}))

    @cached_property
    def microbatches(self) -> int:
        return 1 + max((span.micro for span in self.spans if span.micro is not None), default=-1)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((s.end for s in self.spans), default=0.0) - min((s.start for s in self.spans), default=0.0)

    @cached_property
    def ideal(self) -> float:
        """Seconds that the work would take if it were spread evenly and nobody ever waited."""
        return sum(map(self.busy, self.ranks)) / max(1, len(self.ranks))

    def busy(self, rank: int) -> float:
        """Seconds in which `rank` did forwards or backwards."""
        return self._busy.get(rank, 0.0)

    @cached_property
    def _busy(self) -> dict[int, float]:
        seconds: dict[int, float] = {}
        for span in self.spans:
            if span.kind in WORK:
                seconds[span.rank] = seconds.get(span.rank, 0.0) + span.seconds
        return seconds

    def bubble(self) -> float:
        """The idle share of all ranks' time, from 0 to 1."""
        return 1 - self.ideal / self.makespan if self.makespan else 0.0

    def idle(self, rank: int) -> float:
        """The idle share of one rank's time, from 0 to 1."""
        return 1 - self.busy(rank) / self.makespan if self.makespan else 0.0

    def chunks(self) -> dict[int, int]:
        """For each stage the how-manyth of its rank it is: 0 for a rank's first stage."""
        held: dict[int, list[int]] = {}
        for rank, stage in sorted({(span.rank, span.stage) for span in self.spans}):
            held.setdefault(rank, []).append(stage)
        return {stage: chunk for stages in held.values() for chunk, stage in enumerate(stages)}

    def from_zero(self) -> Trace:
        """The same trace, moved so that its first span starts at 0 seconds."""
        first = min((span.start for span in self.spans), default=0.0)
        return replace(self, spans=tuple(replace(s, start=s.start - first, end=s.end - first) for s in self.spans))

    def to_json(self) -> str:
        """The trace as JSON text, for `from_json`."""
        return json.dumps({"name": self.name, "spans": [asdict(span) for span in self.spans]})

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The trace of a text that `to_json` wrote. Raises ValueError on any other."""
        try:
            value = json.loads(text)
            return cls(tuple(Span(**span) for span in value["spans"]), value["name"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a trace as Trace.to_json writes it: {error}") from None


def join(traces: Iterable[Trace], name: str) -> Trace:
    """One trace of the spans that several ranks recorded, in order of start."""
    return Trace(tuple(sorted((span for trace in traces for span in trace.spans), key=lambda s: s.start)), name)


def duration(seconds: float) -> str:
    """Seconds in words: `1.5 s`, `12.3 ms`, `40 us`.

    Example:
        >>> duration(0.0123), duration(33.0)
        ('12.3 ms', '33 s')
    """
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us" if seconds else "0 s"
