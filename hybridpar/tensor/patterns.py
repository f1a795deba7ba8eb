"""Which modules the patterns of a tensor plan mean: names and styles only.

A `*` stands for one component of a dotted name, or a part of one; the first pattern that fits a module counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from hybridpar.tensor.styles import STYLES


def matched(plan: Mapping[str, str], names: list[str], everything: bool) -> dict[str, str]:
    """The style of each name that a pattern fits, in the order of `names`.

    ValueError for an unknown style and, with `everything`, for a pattern that matches nothing.

    Example:
        >>> matched({"blocks.*.up": "column"}, ["", "blocks", "blocks.0", "blocks.0.up"], everything=True)
        {'blocks.0.up': 'column'}
    """
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(f'tensor plan: "{pattern}" has the style "{style}"; the styles are {", ".join(STYLES)}')
        found = [name for name in names if fits(pattern, name)]
        if everything and not found:
            near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[1:4]
            raise ValueError(f'tensor plan: "{pattern}" matches no module; the nearest are {", ".join(near)}')
        for name in found:
            styles.setdefault(name, style)
    return {name: styles[name] for name in names if name in styles}


def fits(pattern: str, name: str) -> bool:
    """Whether each component of `name` is as `pattern` has it."""
    parts, components = pattern.split("."), name.split(".")
    return len(parts) == len(components) and all(map(fnmatchcase, components, parts))


def around(name: str, styles: Mapping[str, str]) -> str | None:
    """The style of a module, or of the nearest module around it that has one."""
    while name and name not in styles:
        name = name.rpartition(".")[0]
    return styles.get(name)


def beside(styles: Mapping[str, str], name: str) -> set[str]:
    """The styles of the modules with the same parent."""
    above = name.rpartition(".")[0]
    return {style for other, style in styles.items() if other.rpartition(".")[0] == above}


def regions(plan: Mapping[str, str], names: list[str]) -> frozenset[str]:
    """The modules that run as one piece by `plan`: nothing can be done between the calls of their parts.

    Example:
        >>> sorted(regions({"body": "space", "head": "column"}, ["", "body", "body.0", "head"]))
        ['body']
    """
    return frozenset(name for name, style in matched(plan, names, everything=False).items() if style == "space")
