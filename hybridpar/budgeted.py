"""Recomputation by a budget: one microbatch goes through the pipeline, watched; what to recompute is chosen by that.

    each rank      forward of its stages: which tensors stay for the backward, in which block; how long a block takes
    all            tell one another, take the most over tensor ranks and replicas, and choose alike

What stays is held while it is watched, so that a tensor is counted once. Buffers and random numbers are put back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hybridpar.loss import logits
from hybridpar.microbatch import tensors, to_device
from hybridpar.pipeline.action import Kind
from hybridpar.pipeline.budget import Block, Budget, Left, choose, told
from hybridpar.pipeline.executor import Executor, Micro
from hybridpar.pipeline.schedule import Schedule, build, read
from hybridpar.tensor.recompute import Switch
from hybridpar.wires.world import World

_RUNS = 3  # the first warms up, and of the others the quicker counts
_ALIKE = 3  # times as long is still the same work, on a machine that does other work too


def planned(budget: Budget, schedule: str, ranks: int, chunks: int) -> Schedule:
    """The schedule of a step as the budget has to see it.

    Raises ValueError where it depends on the number of microbatches and nobody says how many there are.

    Example:
        >>> planned(Budget("1 GB"), "1f1b", ranks=4, chunks=1).microbatches
        4
    """
    if schedule.endswith(".csv"):
        return read(schedule)
    if budget.microbatches is None and schedule != "1f1b":
        raise ValueError(
            f"recompute=Budget({budget.size!r}): {schedule} holds more the more microbatches a step has: say how many, "
            f"as in Budget({budget.size!r}, microbatches=8)"
        )
    return build(schedule, ranks, budget.microbatches or ranks, chunks)


def fit(
    budget: Budget, switch: Switch, stages: Mapping[int, nn.Module], executor: Executor, schedule: Schedule,
    world: World, example: Any,
) -> str:  # fmt: skip
    """Set `switch` to the blocks that must be recomputed, and say in words which. All ranks call it together.

    Raises ValueError where there is nothing to watch, and where the budget is too small.

    Example:
        >>> fit(Budget("2 GB"), switch, stages, executor, schedule, world, inputs)      # doctest: +SKIP
    """
    if example is None:
        raise ValueError(
            f"recompute=Budget({budget.size!r}) is chosen by watching one microbatch: give its inputs as "
            "parallelize(..., example=inputs)"
        )
    example = to_device(example, world.device)
    once = replace(schedule, microbatches=1, actions=tuple(
        tuple(a for a in row if a.kind is Kind.FORWARD and a.micro == 0) for row in schedule.actions
    ))  # fmt: skip
    runs: list[_Watch] = []
    for _ in range(_RUNS):
        watch = _Watch(stages)
        switch.watch = watch.block
        with watch.looking(), _untouched(stages.values()):
            samples = torch.arange(len(tensors(example)[0]))
            executor.run(once, [Micro(example, samples, watch.output)], graded=True)
        switch.watch = None
        runs.append(watch)
    for one in runs[1:]:
        watch.quicken(one)
    several = world.everyone.objects(watch.seen())
    choice = choose(schedule, _agreed(several, schedule.stages), budget)
    switch.names = frozenset(choice.names)
    lines = [f"  recomputed for {told(budget.bytes)} of activations: {', '.join(choice.names) or 'nothing'}"]
    for rank, (before, after) in enumerate(zip(choice.before, choice.after)):
        lines.append(f"    pipeline index {rank}: {told(before)} with nothing recomputed, {told(after)} so")
    return "\n".join(lines)


@dataclass
class _Seen:
    """What was seen of a stage or of a block on it: tensors by number, and their bytes."""

    whole: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


class _Watch:
    """One forward of the stages of this rank, and the tensors that it leaves."""

    def __init__(self, stages: Mapping[int, nn.Module]) -> None:
        self._stages = stages
        held = [x for stage in stages.values() for x in (*stage.parameters(), *stage.buffers())]
        self._known = {x.untyped_storage().data_ptr() for x in held}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no address is used again
        self._rest = {s: _Seen() for s in stages}
        self._blocks: dict[int, dict[str, _Seen]] = {s: {} for s in stages}
        self._stage, self._into = -1, _Seen()
        self._hooks = saved_tensors_hooks(self._pack, lambda x: x)

    @contextmanager
    def looking(self) -> Iterator[None]:
        handles = []
        for s, stage in self._stages.items():
            handles.append(stage.register_forward_pre_hook(self._enters(s)))
            handles.append(stage.register_forward_hook(self._leaves, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._alive.clear()

    def block(self, name: str, given: Any, run: Callable[[], Any]) -> Any:
        """Run a block that could be recomputed."""
        around, self._into = self._into, self._blocks[self._stage].setdefault(name, _Seen())
        self._into.inputs |= self._sizes(tensors(given))
        began = time.perf_counter()
        try:
            return run()
        finally:
            self._into.seconds += time.perf_counter() - began
            self._into = around

    def output(self, output: Any) -> None:
        """The last stage's: a loss keeps about as much."""
        for t in tensors(logits(output)):
            self._into.whole[-1 - len(self._into.whole)] = t.numel() * max(4, t.element_size())

    def quicken(self, other: _Watch) -> None:
        """Take the times of `other`, another run, where they are less."""
        for s, blocks in other._blocks.items():
            for name, one in blocks.items():
                mine = self._blocks[s].get(name, one)
                mine.seconds = min(mine.seconds, one.seconds)

    def seen(self) -> dict[int, tuple[dict[int, int], dict[str, _Seen]]]:
        """For each stage what is left outside of blocks, and its blocks."""
        return {s: (rest.whole, self._blocks[s]) for s, rest in self._rest.items()}

    def _enters(self, s: int) -> Callable[..., None]:
        def enter(_: nn.Module, args: Any) -> None:
            self._stage, self._into = s, self._rest[s]
            if s:  # what was received is held beside the copy that the stage is given
                self._into.whole |= {-1 - i: t.untyped_storage().nbytes() for i, t in enumerate(tensors(args[:2]))}
            self._hooks.__enter__()

        return enter

    def _leaves(self, _: nn.Module, args: Any, output: Any) -> None:
        self._hooks.__exit__()
        self._into.whole |= self._sizes(tensors(output))

    def _pack(self, x: Tensor) -> Tensor:
        self._into.whole |= self._sizes([x])
        return x

    def _sizes(self, several: Sequence[Tensor]) -> dict[int, int]:
        found = {}
        for x in several:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._known:
                self._alive.append(x)
                found[self._numbers.setdefault(storage.data_ptr(), len(self._numbers))] = storage.nbytes()
        return found


def _agreed(several: Sequence[Mapping[int, tuple[dict[int, int], dict[str, _Seen]]]], stages: int) -> list[Left]:
    """What each stage leaves: the most on any rank that holds it, in the least seconds."""
    found = []
    where = Counter(name for s in range(stages) for name in {n for n, one in _blocks(several, s) if one.whole})
    for s in range(stages):
        rest = _most([told[s][0] for told in several if s in told])
        names = dict.fromkeys(name for name, one in _blocks(several, s) if one.whole)
        blocks = []
        for name in names:
            same = [one for other, one in _blocks(several, s) if other == name]
            whole, inputs = _most([one.whole for one in same]), _most([one.inputs for one in same])
            if where[name] == 1:
                blocks.append(Block(name, min(one.seconds for one in same), whole, inputs))
            else:  # the pipeline cuts it in two
                rest |= whole
        found.append(Left(tuple(blocks), rest))
    return _evened(found)


def _evened(left: Sequence[Left]) -> list[Left]:
    """The same with one time for blocks that leave the same bytes and take about as long: clocks are noisy, and the
    choice among such blocks is not to depend on that."""
    least: dict[tuple[int, ...], float] = {}
    for block in (block for one in left for block in one.blocks):
        least[_shape(block)] = min(block.seconds, least.get(_shape(block), block.seconds))
    return [
        replace(one, blocks=tuple(
            replace(b, seconds=least[_shape(b)]) if b.seconds < _ALIKE * least[_shape(b)] else b for b in one.blocks
        ))
        for one in left
    ]  # fmt: skip


def _shape(block: Block) -> tuple[int, ...]:
    return tuple(sorted(block.whole.values()))


def _blocks(several: Sequence[Mapping[int, tuple[Any, dict[str, _Seen]]]], s: int) -> list[tuple[str, _Seen]]:
    return [pair for told in several if s in told for pair in told[s][1].items()]


def _most(several: Sequence[Mapping[int, int]]) -> dict[int, int]:
    return {number: max(one.get(number, 0) for one in several) for number in set().union(*several)}


@contextmanager
def _untouched(stages: Any) -> Iterator[None]:
    """Leave buffers and torch's generators as they are."""
    kept = [(x, x.clone()) for stage in stages for x in stage.buffers()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for x, before in kept:
            x.copy_(before)
