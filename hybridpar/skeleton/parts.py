"""Where the calls of a forward may be cut, and what must travel over each cut.

    embed | block 0 | block 1 | block 2 | norm, head        parts: each begins with a block, except the first
                    ^
                    what was made before the cut and is used after it travels: here the result of block 0

Pure: it knows calls and names, not modules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hybridpar.skeleton.observe import Call, Result


@dataclass(frozen=True)
class Part:
    """Consecutive calls between two possible cuts; `label` is what the report calls it."""

    label: str
    calls: tuple[Call, ...]


def parts(calls: Sequence[Call], blocks: Collection[str]) -> list[Part]:
    """The parts: what comes before the first block, one for each call of a block with what follows, what comes after.

    Example:
        >>> def made(name, *uses): return Call((name, 0), frozenset((use, 0) for use in uses), frozenset())
        >>> calls = [made("embed"), made("b.0", "embed"), made("b.1", "b.0"), made("head", "b.1"), made("", "head")]
        >>> [part.label for part in parts(calls, {"b.0", "b.1"})]
        ['embed', 'b.0', 'b.1', 'head']
    """
    found: list[list[Call]] = [[]]
    last = max(i for i, call in enumerate(calls) if call.result[0] in blocks)
    for i, call in enumerate(calls):
        if (call.result[0] in blocks or i == last + 1) and found[-1]:
            found.append([])
        found[-1].append(call)
    if len(found) > 1 and [call.result[0] for call in found[-1]] == [""]:
        tail = found.pop()
        found[-1] += tail
    return [Part(group[0].result[0], tuple(group)) for group in found]


def live(before: Sequence[Call], after: Sequence[Call]) -> tuple[Result, ...]:
    """The results of `before` that `after` uses, in the order in which they were made."""
    used = frozenset[Result]().union(*(call.uses for call in after))
    return tuple(call.result for call in before if call.result in used)


def homes(stages: Sequence[Sequence[Call]]) -> dict[str, tuple[int, ...]]:
    """For each unit the stage of each of its calls."""
    found: dict[str, tuple[int, ...]] = {}
    for number, calls in enumerate(stages):
        for call in calls:
            name, _ = call.result
            found[name] = (*found.get(name, ()), number)
    return found
