"""A short probe on the real mesh: at which size gathered gradients leave, and how often Horovod looks for them.

    one pass    [arithmetic][arithmetic][arithmetic]...     20 ms in all, as many parts as buckets
                        bucket -> bucket -> bucket -> wait  as many bytes as the gradients, 16 MiB at most

The cost of Horovod's thread to the arithmetic is in it, and what a small bucket gains by leaving early. Medians of some
passes, of the slowest rank; of sizes within 5 % of the quickest the smallest. All ranks choose alike: ranks that hold
the same weights then add their gradients in the same order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hybridpar.wires.boot import wished_cycle_time
from hybridpar.wires.cycle import DEFAULT, restart
from hybridpar.wires.world import World

SIZES = tuple(1 << power for power in (18, 20, 22, 24))  # bytes
CYCLES = (DEFAULT, 5.0)  # ms
_MOST_BYTES = SIZES[-1]
_ARITHMETIC_SECONDS = 0.02
_SECONDS, _PASSES = 1.0, 3
_CLOSE = 1.05


@dataclass(frozen=True)
class Choice:
    """What to do, and why in one line; `bucket_bytes` None: the default."""

    bucket_bytes: int | None
    why: str


def probe(world: World, gradient_bytes: int) -> Choice:
    """Choose for gradients of so many bytes, and leave Horovod with its cycle time; all ranks call it together.

    Example:
        >>> probe(world, 40 << 20).why                          # doctest: +SKIP
        'buckets of 4.0 MiB and a Horovod cycle of 1 ms: 38 ms, others up to 61 ms'
    """
    if world.data.size == 1:
        return Choice(None, "one replica: no gradients travel")
    total = min(max(world.everyone.objects(gradient_bytes)), _MOST_BYTES)
    sizes = [size for size in SIZES if size < total] or [SIZES[0]]
    wished = wished_cycle_time()
    cycles = (wished,) if wished else CYCLES
    _pass(world, total, total)  # carriers connect at the first use
    first = _pass(world, total, total)
    if first > _SECONDS / 2:
        return Choice(None, f"one pass of {_mib(total)} took {first:.1f} s, however it is cut: the default")
    passes = max(1, min(_PASSES, int(_SECONDS / first / len(sizes) / len(cycles))))
    took: dict[tuple[float, int], float] = {}
    for cycle in cycles:
        restart(world, cycle)
        _pass(world, total, total)
        rounds = [[_pass(world, total, size) for size in sizes] for _ in range(passes)]
        took |= {(cycle, size): median(one) for size, one in zip(sizes, zip(*rounds))}
    best = min(took.values())
    cycle, size = min((choice for choice, seconds in took.items() if seconds <= _CLOSE * best), key=lambda c: c[::-1])
    restart(world, cycle)
    why = (
        f"buckets of {_mib(size)} and a Horovod cycle of {cycle:g} ms: {took[cycle, size] * 1e3:.0f} ms for "
        f"{_mib(total)} beside 20 ms of arithmetic, others up to {max(took.values()) * 1e3:.0f} ms"
    )
    return Choice(size, why)


def _pass(world: World, total: int, size: int) -> float:
    """Seconds of one pass of the slowest rank, alike on all ranks."""
    buckets = [torch.zeros(max(1, min(size, total - at) // 4)) for at in range(0, total, size)]
    square = torch.ones(128, 128)
    world.everyone.barrier()
    began = time.perf_counter()
    under_way = []
    for number, bucket in enumerate(buckets):
        _work(square, _ARITHMETIC_SECONDS / len(buckets))
        under_way.append(world.data.start_allreduce(bucket, "average", f"probe.{size}.{number}"))
    for handle in under_way:
        handle.wait()
    return max(world.everyone.objects(time.perf_counter() - began))


def _work(square: Tensor, seconds: float) -> None:
    """As much arithmetic as takes this thread so many seconds, whatever others take from it meanwhile."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        torch.mm(square, square)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.2g} MiB" if count < 10 << 20 else f"{count >> 20} MiB"
