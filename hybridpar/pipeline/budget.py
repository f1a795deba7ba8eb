"""Which blocks to recompute so that activations fit into a budget: cheapest seconds per byte, no more than needed.

    held on a rank     each microbatch between its forward and its backward, as the schedule has it
    of each            what its forward leaves: of a block all of it, or where it is recomputed its inputs
    for a moment       in a backward, all that the block which is just recomputed would have left

A tensor that several blocks leave (a mask, what one gives to the next) is there once, so blocks are sets of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hybridpar.pipeline.action import Kind
from hybridpar.pipeline.schedule import Schedule

Tensors = Mapping[int, int]  # the number of each, and its bytes
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Budget:
    """What the activations of each rank may take, such as "2 GB" or a number of bytes; for `recompute=`.

    `microbatches` are those of a step. Under 1f1b, which holds no more the more there are, it may be left out.

    Example:
        >>> Budget("1.5 GiB").bytes
        1610612736
        >>> hp.parallelize(model, mesh, loss, example=inputs, recompute=hp.Budget("2 GB"))      # doctest: +SKIP
    """

    size: str | int
    microbatches: int | None = None

    def __post_init__(self) -> None:
        if self.bytes < 1 or (self.microbatches is not None and self.microbatches < 1):
            raise ValueError(f"{self!r}: give at least a byte, and at least 1 microbatch")

    @property
    def bytes(self) -> int:
        """The size as a number."""
        if isinstance(self.size, int):
            return self.size
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]+)\s*", str(self.size).upper())
        if found is None or found[2] not in _UNITS:
            raise ValueError(f'Budget({self.size!r}): write it as in "2 GB" or "1.5 GiB", or as a number of bytes')
        return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Block:
    """A block as one microbatch goes through it: `whole` is what its forward of `seconds` leaves, `inputs` what is left
    where it is recomputed."""

    name: str
    seconds: float
    whole: Tensors
    inputs: Tensors


@dataclass(frozen=True)
class Left:
    """What the forward of one microbatch leaves on a stage: in `blocks` that can be recomputed, and besides them."""

    blocks: tuple[Block, ...]
    rest: Tensors

    def held(self, chosen: Collection[str]) -> int:
        """Bytes that stay until the backward where the `chosen` blocks are recomputed."""
        found = dict(self.rest)
        for block in self.blocks:
            found |= block.inputs if block.name in chosen else block.whole
        return sum(found.values())

    def moment(self, chosen: Collection[str]) -> int:
        """Bytes that come in a backward while the largest of the `chosen` blocks is recomputed."""
        return max((_beyond(block.whole, block.inputs) for block in self.blocks if block.name in chosen), default=0)


@dataclass(frozen=True)
class Choice:
    """The blocks to recompute, and the most that each pipeline index holds without and with that."""

    names: tuple[str, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


def choose(schedule: Schedule, left: Sequence[Left], budget: Budget) -> Choice:
    """The blocks to recompute; `left` is what each stage's forward leaves.

    Raises ValueError where even all blocks are not enough.

    Example:
        >>> from hybridpar.pipeline.schedule import gpipe
        >>> blocks = tuple(Block(f"blocks.{i}", seconds=1.0, whole={10 + i: 80}, inputs={i: 20}) for i in range(2))
        >>> choose(gpipe(ranks=1, microbatches=3), [Left(blocks, {})], Budget(400))
        Choice(names=('blocks.0',), before=(480,), after=(380,))
    """
    names: list[str] = []
    before, after = [], []
    for rank in range(schedule.ranks):
        mine = {s: left[s] for s in schedule.stages_of(rank)}
        chosen = _chosen(schedule, rank, mine, budget)
        names += [block.name for one in mine.values() for block in one.blocks if block.name in chosen]
        before.append(peak(schedule, rank, mine, ()))
        after.append(peak(schedule, rank, mine, chosen))
    return Choice(tuple(names), tuple(before), tuple(after))


def peak(schedule: Schedule, rank: int, left: Mapping[int, Left], chosen: Collection[str]) -> int:
    """The most bytes of activations at any moment of a step on `rank`, of whose stages `left` tells."""
    held = {stage: one.held(chosen) for stage, one in left.items()}
    now = most = 0
    for action in schedule.actions[rank]:
        if action.kind is Kind.FORWARD:
            now += held[action.stage]
            most = max(most, now)
        elif action.kind is Kind.BACKWARD:
            most = max(most, now + left[action.stage].moment(chosen))
            now -= held[action.stage]
    return most


def told(count: float) -> str:
    """Bytes for people.

    Example:
        >>> told(1234567), told(12)
        ('1.23 MB', '12 B')
    """
    unit = next((unit for unit in ("GB", "MB", "KB") if count >= _UNITS[unit]), "B")
    return f"{count / _UNITS[unit]:.3g} {unit}" if unit != "B" else f"{count:.0f} B"


def _chosen(schedule: Schedule, rank: int, left: Mapping[int, Left], budget: Budget) -> list[str]:
    def fits(chosen: Collection[str]) -> bool:
        return peak(schedule, rank, left, chosen) <= budget.bytes

    prices = {block.name: _price(block) for one in left.values() for block in one.blocks}
    cheapest = sorted((name for name in prices if prices[name] is not None), key=lambda name: prices[name] or 0.0)
    chosen: list[str] = []
    for name in cheapest:
        if not fits(chosen):
            chosen.append(name)
    if not fits(chosen):
        without, least = peak(schedule, rank, left, ()), peak(schedule, rank, left, chosen)
        raise ValueError(
            f"recompute=Budget({budget.size!r}): pipeline index {rank} holds {told(without)} of activations with "
            f"nothing recomputed and {told(least)} ({least} bytes) with {len(chosen)} blocks recomputed, all that can "
            "be: make microbatches smaller, raise the tensor or pipeline degree, or give a budget of that"
        )
    for name in reversed(cheapest):  # one that came early may be in vain beside a large one that came late
        fewer = [other for other in chosen if other != name]
        chosen = fewer if fits(fewer) else chosen
    return chosen


def _price(block: Block) -> float | None:
    """Seconds per byte, or None where recomputing spares nothing."""
    spared = sum(block.whole.values()) - sum(block.inputs.values())
    return block.seconds / spared if spared > 0 else None


def _beyond(whole: Tensors, inputs: Tensors) -> int:
    return sum(size for number, size in whole.items() if number not in inputs)
