"""Traces as one stand-alone SVG picture: a panel per trace, all at the same scale, over one time axis.

    title
    name, time, idle share
      rank 0 | 0 1 2 3         0   4 1   ...   | 27 % idle
      rank 1 |   0 1 2     0   3 1   ...
             0        10        20 ms
    legend

Cells carry the microbatch, and the stage where a rank has several; a title shows on each when pointed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import floor, log10

from hybridpar.trace.colour import NIGHT, cell
from hybridpar.trace.spans import WORK, Span, Trace, duration

WIDTH, LEFT, RIGHT = 1120, 84, 112  # of the picture, of what stands left and right of the time
ROW, GAP, BEAM = 30, 5, 4  # heights of a rank's row, between rows, of a reduction
GREY, TRACK, RULE, REDUCE = "#69708a", "#f0f2f7", "#dfe3ec", "#2fa37c"
FONT = "font-family='Inter, Segoe UI, Helvetica, Arial, sans-serif'"


def svg(*traces: Trace, title: str = "") -> str:
    """The traces under each other, as the text of an SVG file.

    Example:
        >>> svg(Trace((Span(0, "F", 0, 0, 0.0, 1.0),), "one forward")).startswith("<svg ")
        True
    """
    traces = tuple(trace.from_zero() for trace in traces)
    longest = max((trace.makespan for trace in traces), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest  # pixels per second
    top, parts = 26.0, []
    if title:
        parts.append(_text(24, top + 10, title, 19, NIGHT, weight=600))
        top += 34
    for trace in traces:
        parts += _panel(trace, scale, longest, top)
        top += 34 + len(trace.ranks) * (ROW + GAP) + 10
    parts += _times(longest, scale, top - 6)
    parts += _legend(traces, top + 32)
    height = top + 58
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height:g}' "
        f"viewBox='0 0 {WIDTH} {height:g}' {FONT}>\n"
        f"<rect width='{WIDTH}' height='{height:g}' rx='10' fill='#ffffff'/>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(trace: Trace, scale: float, longest: float, top: float) -> Iterator[str]:
    chunks = trace.chunks()
    deepest = max(chunks.values(), default=0)
    yield _text(24, top + 14, trace.name, 14, NIGHT, weight=600)
    numbers = f"{duration(trace.makespan)}, {_percent(trace.bubble())} idle"
    yield _text(WIDTH - 24, top + 14, numbers, 13, GREY, anchor="end")
    for x, _ in _ticks(longest, scale):
        yield f"<path d='M{x:.2f} {top + 26:g}v{len(trace.ranks) * (ROW + GAP):g}' stroke='{RULE}' fill='none'/>"
    for row, rank in enumerate(trace.ranks):
        y = top + 28 + row * (ROW + GAP)
        yield _text(LEFT - 12, y + 18.5, f"rank {rank}", 13, GREY, anchor="end")
        yield _rect(LEFT, y, trace.makespan * scale, ROW, TRACK, 3)
        for span in trace.spans:
            if span.rank == rank and span.seconds:
                depth = chunks[span.stage] / deepest if deepest else 0.0
                yield _span(trace, span, scale, y, depth, several=bool(deepest))
        yield _text(WIDTH - 24, y + 18.5, f"{_percent(trace.idle(rank))} idle", 12, GREY, anchor="end")


def _span(trace: Trace, span: Span, scale: float, y: float, depth: float, several: bool) -> str:
    x, width = LEFT + span.start * scale, span.seconds * scale
    micro = "" if span.micro is None else f" microbatch {span.micro},"
    hint = f"{span.kind} of stage {span.stage},{micro} {duration(span.seconds)} from {duration(span.start)}"
    if span.kind not in WORK:
        return _rect(x, y + ROW - BEAM, width, BEAM, REDUCE, 2, hint)
    fill, edge, ink = cell(span.kind, (span.micro or 0) / max(1, trace.microbatches - 1), depth)
    inset = min(1.1, width / 8)
    box = _rect(x + inset, y, width - 2 * inset, ROW - BEAM - 1, fill, min(2.5, width / 6), hint, edge)
    stage = f"s{span.stage}" if several else ""
    return box + _label(span, stage, x + width / 2, width, y, ink, digits=len(str(trace.microbatches - 1)))


def _label(span: Span, stage: str, x: float, width: float, y: float, ink: str, digits: int) -> str:
    """The microbatch, large, and the stage, small, as far as there is room for the longest."""
    micro = "" if span.micro is None else str(span.micro)
    if width < 7.5 * digits + 2:
        return ""
    if not stage or width < 7.5 * digits + 6 * len(stage) + 6:
        return _text(x, y + 17.5, micro, 12, ink, anchor="middle")
    small = f"<tspan dx='2' font-size='9' fill-opacity='0.75'>{stage}</tspan>"
    return _text(x, y + 17.5, micro, 12, ink, anchor="middle", more=small)


def _ticks(longest: float, scale: float) -> list[tuple[float, float]]:
    """(x, seconds) of the round times up to `longest`."""
    step = _step(longest)
    return [(LEFT + i * step * scale, i * step) for i in range(floor(longest / step + 1e-9) + 1)]


def _times(longest: float, scale: float, y: float) -> Iterator[str]:
    """The axis: round times and, at the first, their unit."""
    unit, size = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if longest >= s or u == "us")
    for x, seconds in _ticks(longest, scale):
        yield _text(x, y + 14, f"{seconds / size:.6g}" + ("" if seconds else f" {unit}"), 11, GREY, anchor="middle")


def _step(longest: float) -> float:
    """A round number of seconds that cuts `longest` into 6 to 14 parts or so."""
    rough = longest / 12
    power = 10.0 ** floor(log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough)


def _legend(traces: tuple[Trace, ...], y: float) -> Iterator[str]:
    most = max((trace.microbatches for trace in traces), default=1)
    shown = min(8, most)
    x = float(LEFT)
    for kind, name in (("F", "forward"), ("B", "backward")):
        if any(span.kind == kind for trace in traces for span in trace.spans):
            for i in range(shown):
                yield _rect(x + 13 * i, y, 12.4, 12, cell(kind, i / max(1, shown - 1), 0.0)[0], 2)
            words = f"{name}, microbatch 0" + (f" to {most - 1}" if most > 1 else "")
            yield _text(x + 13 * shown + 8, y + 10.5, words, 12, GREY)
            x += 13 * shown + 34 + 6.4 * len(words)
    if any(span.kind == "R" and span.seconds for trace in traces for span in trace.spans):
        yield _rect(x, y + 4, 26, BEAM, REDUCE, 2)
        yield _text(x + 34, y + 10.5, "reduction of gradients", 12, GREY)
        x += 34 + 24 + 6.4 * len("reduction of gradients")
    if any(trace.chunks().values() and max(trace.chunks().values()) for trace in traces):
        yield _text(x, y + 10.5, "paler: a later stage (s) of the rank", 12, GREY)


def _rect(
    x: float, y: float, width: float, height: float, fill: str, radius: float, hint: str = "", edge: str = ""
) -> str:
    shape = f"x='{x:.2f}' y='{y:.2f}' width='{width:.2f}' height='{height:g}' rx='{radius:g}' fill='{fill}'"
    shape += f" stroke='{edge}'" if edge else ""
    return f"<rect {shape}><title>{escape(hint)}</title></rect>" if hint else f"<rect {shape}/>"


def _text(
    x: float, y: float, text: str, size: float, fill: str, anchor: str = "start", weight: int = 400, more: str = ""
) -> str:
    look = f"font-size='{size:g}' fill='{fill}' text-anchor='{anchor}' font-weight='{weight}'"
    return f"<text x='{x:.2f}' y='{y:.2f}' {look}>{escape(text)}{more}</text>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
