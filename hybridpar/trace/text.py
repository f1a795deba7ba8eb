"""A trace as a picture for the terminal: one row per rank, time to the right.

    rank 0 |0-1-    0===1===|        0-    forward of microbatch 0
    rank 1 |  0-0===1-1===  |        0===  its backward

A character is the same time in all of a picture. Where every span is a multiple of one unit, as in a simulated
trace, a unit is a whole number of characters; otherwise (a measured trace) ends are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from string import ascii_lowercase, ascii_uppercase, digits

from hybridpar.trace.spans import WORK, Span, Trace, duration

FILL = {"F": "-", "B": "=", "R": "~"}
COLOUR = {"F": "\x1b[30;106m", "B": "\x1b[30;103m", "R": "\x1b[95m"}  # on light cyan, on light yellow, magenta
RESET = "\x1b[0m"
ONE_CHARACTER = (digits, ascii_lowercase, ascii_uppercase)  # of a microbatch in a rank's first, second, third stage
WIDEST = 4  # characters for a unit


def gantt(*traces: Trace, width: int = 100, colour: bool = False) -> str:
    """The traces under each other at the same scale, `width` characters wide at most, with figures and a legend.

    `colour` adds ANSI colours.

    Example:
        >>> print(gantt(Trace((Span(0, "F", 0, 0, 0.0, 1.0), Span(0, "B", 0, 0, 1.0, 3.0)), "one rank")))
        one rank: 3 s, idle 0.0 %, work 3 s per rank
        rank 0 |0---0=======|
        0- forward of microbatch 0, 0= its backward
    """
    traces = tuple(trace.from_zero() for trace in traces)
    margin = max((len(_head(rank)) for trace in traces for rank in trace.ranks), default=0)
    scale = _scale(traces, width - margin - 2)
    panels, legends = [], {}
    for trace in traces:
        labels = _Labels.fit(trace, scale)
        panels.append("\n".join([figures(trace), *_rows(trace, labels, scale, margin, colour)]))
        reduction = ", ~ reduction of gradients" if any(s.kind == "R" and s.seconds for s in trace.spans) else ""
        legends[labels.legend() + reduction] = None
    return "\n\n".join(panels) + "\n" + "\n".join(legends)


def figures(trace: Trace) -> str:
    """One line: name, time, idle share, and the time of the work if it were spread evenly.

    Example:
        >>> figures(Trace((Span(0, "F", 0, 0, 0.0, 0.004), Span(1, "F", 1, 0, 0.004, 0.008)), "1f1b"))
        '1f1b: 8 ms, idle 50.0 %, work 4 ms per rank'
    """
    return (
        f"{trace.name}: {duration(trace.makespan)}, idle {trace.bubble():.1%}, work {duration(trace.ideal)} per rank"
    ).replace("%", " %")


@dataclass(frozen=True)
class _Labels:
    """How a picture writes microbatch and stage: in full, or as one character where that is all there is room for."""

    chunks: dict[int, int]
    full: bool

    @classmethod
    def fit(cls, trace: Trace, scale: float) -> _Labels:
        chunks = trace.chunks()
        several = len(set(chunks.values())) > 1
        longest = len(str(trace.microbatches - 1)) + several
        room = median([int(span.seconds * scale + 1e-6) for span in trace.spans if span.kind == "F"] or [0])
        return cls(chunks if several else {}, longest <= room)

    def of(self, span: Span, room: int) -> str:
        if span.micro is None:
            return ""
        chunk = self.chunks.get(span.stage, 0)
        full = str(span.micro) + (ascii_lowercase[chunk % 26] if self.chunks else "")
        return full if self.full and len(full) <= room else ONE_CHARACTER[chunk % 3][span.micro % 10]

    def legend(self) -> str:
        if self.full:
            stages = ", a b c: the rank's first, second, third stage" if self.chunks else ""
            return "0- forward of microbatch 0, 0= its backward" + stages
        stages = ", a is 0 in the rank's second stage, A in its third" if self.chunks else ""
        return "0 forward of microbatch 0, 0= its backward, last digits only" + stages


def _rows(trace: Trace, labels: _Labels, scale: float, margin: int, colour: bool) -> list[str]:
    rows, columns = [], round(trace.makespan * scale)
    for rank in trace.ranks:
        spans = [span for span in trace.spans if span.rank == rank]
        work = [span for span in spans if span.kind in WORK]
        rows.append(f"{_head(rank):{margin}}|{_row(work, labels, scale, columns, colour)}|")
        reduces = [span for span in spans if span.kind == "R" and round(span.seconds * scale)]
        if reduces:
            rows.append(f"{'reduce':{margin}}|{_row(reduces, labels, scale, columns, colour)}|")
    return rows


def _row(spans: Sequence[Span], labels: _Labels, scale: float, columns: int, colour: bool) -> str:
    text, at = "", 0
    for span in sorted(spans, key=lambda span: span.start):
        start, end = max(at, round(span.start * scale)), round(span.end * scale)
        if end <= start:
            continue  # too short to be seen at this scale
        room = end - start - (span.kind == "B")  # a backward keeps its sign
        cell = labels.of(span, max(1, room)).ljust(end - start, FILL[span.kind])
        text += " " * (start - at) + (f"{COLOUR[span.kind]}{cell}{RESET}" if colour else cell)
        at = end
    return text + " " * (columns - at)


def _head(rank: int) -> str:
    return f"rank {rank} "


def _scale(traces: Sequence[Trace], columns: int) -> float:
    """Characters per second."""
    longest = max((trace.makespan for trace in traces), default=0.0)
    unit = _unit([span for trace in traces for span in trace.spans if span.kind in WORK])
    if unit and longest:
        whole = columns // round(longest / unit)
        if whole:
            return min(whole, WIDEST) / unit
    return columns / longest if longest else 0.0


def _unit(spans: Sequence[Span]) -> float | None:
    """The longest time, if there is one, that all spans begin and end at multiples of."""
    shortest = min((span.seconds for span in spans if span.seconds), default=0.0)
    for parts in (1, 2, 3, 4):
        unit = shortest / parts
        edges = [edge / unit for span in spans for edge in (span.start, span.end)] if unit else []
        if edges and all(abs(edge - round(edge)) < 1e-6 for edge in edges):
            return unit
    return None
