"""One weave of forwards and backwards makes every schedule; only the warm-up differs.

    rank p does    warm-up forwards | then one forward, one backward, in turns | then the backwards that are left

    gpipe          M                              Huang et al. 2019, figure 2c
    1f1b           P - 1 - p                      Narayanan et al. 2019 (PipeDream), with a flush: 2021, figure 4
    interleaved    2 (P - 1 - p) + (V - 1) G      Narayanan et al. 2021, figure 4 and section 2.2

P ranks, p this rank, M microbatches, V stages (chunks) per rank; stage s is on rank s % P.
Huang: https://arxiv.org/abs/1811.06965. Narayanan: https://doi.org/10.1145/3341301.3359646 and
https://arxiv.org/abs/2104.04473.

Interleaving goes in rounds: a rank takes G microbatches through its first stage, the same through its second
and so on. Narayanan et al. have G = P, so M must be a multiple of P. Here M is cut into M // P rounds as equal as
can be, each of P microbatches or more, so that no rank runs dry between two rounds: idle time is (P - 1) / (V M) of
the work for every M >= P. With fewer microbatches than ranks there is one round of M. G is the longest round.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridpar.pipeline.action import Action, Kind
from hybridpar.shard import balanced


def weave(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> tuple[Action, ...]:
    """`warmup` forwards, then a forward and a backward in turns, then the backwards that are left.

    A REDUCE follows the last backward of each stage.
    """
    warmup = min(warmup, len(forwards))
    row = list(forwards[:warmup])
    for pair in zip(forwards[warmup:], backwards):
        row += pair
    row += backwards[len(forwards) - warmup :]
    return with_reductions(row)


def with_reductions(row: Sequence[Action]) -> tuple[Action, ...]:
    """The row with a REDUCE right after the last backward of each of its stages."""
    last = {action.stage: i for i, action in enumerate(row) if action.kind is Kind.BACKWARD}
    reductions = {i: Action(Kind.REDUCE, stage) for stage, i in last.items()}
    return tuple(step for i, action in enumerate(row) for step in (action, reductions.get(i)) if step is not None)


def rounds(ranks: int, microbatches: int) -> tuple[range, ...]:
    """The microbatches of each round of an interleaved schedule, the longest round first."""
    return tuple(range(*r) for r in balanced(microbatches, max(1, microbatches // ranks)))


def strands(rank: int, ranks: int, microbatches: int, chunks: int) -> tuple[list[Action], list[Action]]:
    """The forwards and the backwards of one rank, each in the order in which they are done."""
    stages = range(rank, ranks * chunks, ranks)
    turns = rounds(ranks, microbatches)
    forwards = [Action(Kind.FORWARD, s, m) for turn in turns for s in stages for m in turn]
    backwards = [Action(Kind.BACKWARD, s, m) for turn in turns for s in reversed(stages) for m in turn]
    return forwards, backwards
