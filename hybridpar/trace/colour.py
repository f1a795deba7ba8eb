"""The colours of a drawn trace: cool for forwards, warm for backwards, changing from the first microbatch to the last.

A rank's later stages are paler, with an edge in the full colour, so that interleaved rounds can be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

Colour = tuple[float, float, float]  # red, green, blue, from 0 to 1

COOL = ("#a5e3ee", "#62b4f0", "#5b7fe8", "#7a63d2")
WARM = ("#ffe08a", "#ffb35c", "#f47f5f", "#d9567d")
NIGHT = "#1d2440"


def cell(kind: str, position: float, depth: float) -> tuple[str, str, str]:
    """(fill, edge, text) of a span: `position` of its microbatch and `depth` of its stage, both from 0 to 1.

    Example:
        >>> cell("F", position=0.0, depth=0.0)
        ('#a5e3ee', '#a5e3ee', '#1d2440')
    """
    edge = _along([_read(stop) for stop in (COOL if kind == "F" else WARM)], position)
    fill = _blend(edge, (1.0, 1.0, 1.0), 0.72 * depth)
    return _write(fill), _write(edge), "#ffffff" if _light(fill) < 0.52 else NIGHT


def _along(stops: Sequence[Colour], position: float) -> Colour:
    at = position * (len(stops) - 1)
    left = min(int(at), len(stops) - 2)
    return _blend(stops[left], stops[left + 1], at - left)


def _blend(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(x + (y - x) * share for x, y in zip(a, b))


def _light(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _read(text: str) -> Colour:
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _write(colour: Colour) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in colour)
