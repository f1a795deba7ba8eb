"""The order that the actions of several ranks force on one another, and the circle where there is none.

Each rank does its actions one after another, and an action waits for what it needs from other ranks. A
schedule can be executed if this graph has no circle; messages never block, so nothing else can wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridpar.pipeline.action import Action

Rows = Sequence[Sequence[Action]]


def replay(rows: Rows, stages: int, microbatches: int) -> Iterator[tuple[int, Action]]:
    """(rank, action) of all `rows` in an order in which they can be executed.

    Raises ValueError where none of the ranks that are left can go on, and says who waits for whom.
    """
    done: set[Action] = set()
    position = [0] * len(rows)
    asleep: dict[Action, list[int]] = {}  # what the ranks wait for
    awake = list(range(len(rows)))
    while awake:
        rank = awake.pop()
        while position[rank] < len(rows[rank]):
            action = rows[rank][position[rank]]
            missing = _missing(action, stages, microbatches, done)
            if missing is not None:
                asleep.setdefault(missing, []).append(rank)
                break
            yield rank, action
            done.add(action)
            position[rank] += 1
            awake += asleep.pop(action, ())
    if asleep:
        raise ValueError(_circle(rows, position, {rank: need for need, ranks in asleep.items() for rank in ranks}))


def _missing(action: Action, stages: int, microbatches: int, done: set[Action]) -> Action | None:
    return next((need for need in action.needs(stages, microbatches) if need not in done), None)


def _circle(rows: Rows, position: Sequence[int], waits: dict[int, Action]) -> str:
    """In words: the ranks that wait for one another, or for what no rank does."""
    home = {action: rank for rank, row in enumerate(rows) for action in row}
    rank, seen = min(waits), []
    while rank not in seen:
        seen.append(rank)
        if waits[rank] not in home:
            break
        rank = home[waits[rank]]
    clauses = [
        f"rank {r} at position {position[r]} ({rows[r][position[r]]}) waits for {waits[r]}, "
        + (f"which rank {home[waits[r]]} does later" if waits[r] in home else "which no rank does")
        for r in (seen[seen.index(rank) :])
    ]
    return f"deadlock: {'; '.join(clauses)}"
