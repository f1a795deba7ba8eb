"""What goes with what: each combination that a training can ask for, and for those that are refused one sentence.

    tensor x pipeline x data x zero x precision x recompute x sync x compression

Whoever refuses a combination asks here, so that the matrix which `hybridpar support` prints is what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import prod
from typing import Any

from hybridpar.optim.sync.wish import NAMES

# What each cuts over the data axis.
ZERO = {0: "nothing over the data axis", 1: "the optimizer's state", 2: "gradients too", 3: "weights too"}
PRECISIONS = (None, "bf16", "fp16")
RECOMPUTE = ("none", "selective", "full")
COMPRESSION = (None, "bf16", "fp16", "power_sgd")
DEGREES = (1, 2)  # 2 stands for all above 1


@dataclass(frozen=True)
class Combination:
    """What a training asks for: its degrees, and one word or number for each of the rest; `sync` without its numbers.

    Example:
        >>> refusal(Combination(tensor=2, zero=1, sync="easgd")) is None
        False
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    recompute: str = "none"
    sync: str = "allreduce"
    zero: int = 0
    compression: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Rule:
    """`meant` are refused with `sentence`, in which fields of the combination are filled in."""

    meant: Callable[[Combination], bool]
    sentence: str


WORDS = (
    Rule(
        lambda c: c.zero not in ZERO,
        "zero={zero!r}: choose " + ", ".join(f"{zero} (cuts {what})" for zero, what in ZERO.items()),
    ),
    Rule(
        lambda c: c.precision not in PRECISIONS,
        'precision={precision!r}: choose "bf16", "fp16", or None for what the module itself has',
    ),
)
RULES = (
    Rule(
        lambda c: c.zero > 0 and c.sync != "allreduce",
        "zero={zero} cuts over replicas that hold the same weights, and {sync} lets them differ: use "
        'sync="allreduce", or leave out zero',
    ),
    Rule(
        lambda c: c.zero > 0 and c.compression is not None,
        "zero={zero} adds gradients as they are, and compression=hp.Compression.{compression} would send others: leave "
        "out one of them",
    ),
    Rule(
        lambda c: c.precision == "fp16" and c.sync != "allreduce",
        'precision="fp16" skips a step on all ranks where one overflows, and {sync} lets replicas step by themselves: '
        'use precision="bf16", or sync="allreduce"',
    ),
    Rule(
        lambda c: c.sync == "async_ps" and c.compression is not None,
        "async_ps sends weights in the type that they have, and compression=hp.Compression.{compression} would send "
        'another: leave out the compression, or use sync="local_sgd(1)"',
    ),
    Rule(
        lambda c: c.sync != "allreduce" and c.compression == "power_sgd",
        "{sync} sends weights, and compression=hp.Compression.power_sgd is for gradients that are averaged in every "
        "step: use hp.Compression.bf16",
    ),
    Rule(
        lambda c: c.precision == "fp16" and c.compression == "power_sgd",
        "compression=hp.Compression.power_sgd keeps what it has not sent, and the scale of that changes under "
        'precision="fp16": use precision="bf16", or leave out the compression',
    ),
)


def refusal(asked: Combination) -> str | None:
    """Why `asked` is refused, in one sentence that ends with a way out, or None where it is supported.

    Example:
        >>> refusal(Combination(zero=1, sync="easgd"))
        'zero=1 cuts over replicas that hold the same weights, and easgd lets them differ: use sync="allreduce", or leave out zero'
    """  # noqa: E501
    rule = _rule(asked)
    return None if rule is None else rule.sentence.format(**asdict(asked))


def check(asked: Combination) -> None:
    """Raise ValueError where `asked` is refused."""
    sentence = refusal(asked)
    if sentence is not None:
        raise ValueError(sentence)


def unsynced(replicas: int, together: int) -> str | None:
    """Why a SyncBatchNorm is refused among `replicas` of which `together` average gradients in a step, or None."""
    if together == replicas:
        return None
    return (
        f"a SyncBatchNorm needs all {replicas} replicas in every step and this sync policy leaves them to themselves: "
        'use sync="allreduce", or torch.nn.BatchNorm'
    )


def combinations() -> Iterator[Combination]:
    """All of them, each degree 1 or 2."""
    values = (DEGREES, DEGREES, DEGREES, RECOMPUTE, NAMES, ZERO, COMPRESSION, PRECISIONS)
    return (Combination(*each) for each in product(*values))


def rows() -> list[dict[str, Any]]:
    """Each combination with `refused`: the sentence, or None.

    Example:
        >>> [row for row in rows() if row["zero"] == 2 and row["sync"] == "easgd"][0]["refused"][:20]
        'zero=2 cuts over rep'
    """
    return [{**asdict(one), "refused": refusal(one)} for one in combinations()]


def table() -> str:
    """The matrix as Markdown: rows that say the same are one, and so are meshes and recomputations.

    Example:
        >>> print(table().splitlines()[0])
        Under every mesh and recompute:
    """
    first = [name.name for name in fields(Combination)][:4]  # what a table is for
    tables: dict[tuple[tuple[tuple[Any, ...], ...], ...], list[tuple[Any, ...]]] = {}
    cells: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], str]]] = {}
    for one in combinations():
        values = tuple(asdict(one).values())
        cells.setdefault(values[:4], []).append((values[4:], _mark(one)))
    for where, marked in cells.items():
        tables.setdefault(tuple(_merged(marked)), []).append(where)
    lines: list[str] = []
    for merged, places in tables.items():
        lines += [_where(first, places), "", *_drawn(merged), ""]
    return "\n".join([*lines, *_notes()])


def _rule(asked: Combination) -> Rule | None:
    return next((rule for rule in (*WORDS, *RULES) if rule.meant(asked)), None)


def _mark(one: Combination) -> str:
    rule = _rule(one)
    return "yes" if rule is None else f"no ({RULES.index(rule) + 1})"


def _merged(marked: Iterable[tuple[tuple[Any, ...], str]]) -> list[tuple[Any, ...]]:
    """Rows (syncs, zeros, compressions, mark of each precision), each of the first three several values that agree."""
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for (sync, zero, compression, _), mark in marked:
        key = ((sync,), (zero,), (compression,))
        found[key] = (*found.get(key, ()), mark)
    for dim in (2, 1, 0):
        several: dict[Any, tuple[Any, ...]] = {}
        for key, marks in found.items():
            rest = (key[:dim], key[dim + 1 :], marks)
            several[rest] = (*several.get(rest, ()), *key[dim])
        found = {(*before, values, *after): marks for (before, after, marks), values in several.items()}
    return [(*key, *marks) for key, marks in found.items()]


def _drawn(merged: Iterable[tuple[Any, ...]]) -> list[str]:
    lines = ["| sync | zero | compression | " + " | ".join(f"precision {_word(p)}" for p in PRECISIONS) + " |"]
    lines.append("|" + "---|" * (3 + len(PRECISIONS)))
    for *several, first, second, third in merged:
        told = [", ".join(map(_word, values)) for values in several]
        lines.append("| " + " | ".join([*told, first, second, third]) + " |")
    return lines


def _where(names: list[str], places: list[tuple[Any, ...]]) -> str:
    """In words which meshes and recomputations `places` are."""
    possible = (DEGREES, DEGREES, DEGREES, RECOMPUTE)
    held = [sorted({place[i] for place in places}, key=possible[i].index) for i in range(4)]
    if prod(map(len, held)) != len(places):  # no product of values: one by one
        return "Under " + "; ".join(", ".join(f"{n}={_degree(v)}" for n, v in zip(names, one)) for one in places) + ":"
    told = [f"{n} {' or '.join(map(_degree, h))}" for n, h, p in zip(names, held, possible) if len(h) < len(p)]
    return f"Under {', '.join(told)}:" if told else "Under every mesh and recompute:"


def _notes() -> list[str]:
    found: dict[int, str] = {}
    for one in combinations():
        rule = _rule(one)
        if rule is not None:
            found.setdefault(RULES.index(rule) + 1, rule.sentence.format(**asdict(one)))
    return [f"{number}. {found[number]}" for number in sorted(found)]


def _word(value: object) -> str:
    return "none" if value is None else str(value)


def _degree(value: object) -> str:
    return "above 1" if value == 2 else str(value)
