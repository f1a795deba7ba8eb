"""Which rows of a tensor that is cut by rows each index needs from which other: facts, without torch.

A tensor of `length` rows lies as `balanced(length, degree)`, whatever made it; so two tensors of one resolution are cut
alike. What an index is to compute tells the rows that it reads; those of other indices are its halo:

    kernel 3, stride 1, padding 1              index 0        index 1        index 2
        rows held                              0 1 2          3 4 5          6 7
        rows read for its own outputs       -1 0 1 2 3      2 3 4 5 6      5 6 7 8         -1 and 8 are padding

A halo may reach beyond the next neighbour, and an index may hold no row at all.
(Halo exchange for convolutions: Dryden et al. 2019, https://arxiv.org/abs/1903.06681.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hybridpar.shard import Range, balanced

Ranges = tuple[Range, ...]


@dataclass(frozen=True)
class Window:
    """Convolutions and pools: output row o reads rows o * stride - padding + i * dilation for i < kernel.

    Example:
        >>> window = Window(kernel=3, stride=2, padding=1)
        >>> window.outputs(7, 1), window.reads((2, 4))
        (4, (3, 8))
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def span(self) -> int:
        """The rows from the first to the last that one output reads."""
        return (self.kernel - 1) * self.dilation + 1

    def outputs(self, length: int, after: int, ceil: bool = False) -> int:
        """How many rows come out of `length`, with `after` rows of padding at the end; less than 1 if none fits.

        `ceil` as in torch's pools: a last window may begin within the rows or the padding before them.
        """
        count = (length + self.padding + after - self.span + (self.stride - 1) * ceil) // self.stride + 1
        return count - (ceil and (count - 1) * self.stride >= length + self.padding)

    def reads(self, outputs: Range) -> Range:
        """The rows read for these outputs; some may be padding."""
        first, stop = outputs
        if first == stop:
            return 0, 0
        begin = first * self.stride - self.padding
        return begin, begin + (stop - first - 1) * self.stride + self.span


@dataclass(frozen=True)
class Spread:
    """Transposed convolutions: row i adds to outputs i * stride - padding + j * dilation for j < kernel.

    Example:
        >>> spread = Spread(kernel=3, stride=2, padding=1)
        >>> spread.outputs(4, 1), spread.reads((4, 8)), spread.begins(2)
        (8, (2, 5), 3)
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def span(self) -> int:
        """The outputs from the first to the last that one row adds to."""
        return (self.kernel - 1) * self.dilation + 1

    def outputs(self, length: int, after: int) -> int:
        """How many rows come out of `length`; `after` is torch's output_padding."""
        return (length - 1) * self.stride - 2 * self.padding + self.span + after

    def reads(self, outputs: Range) -> Range:
        """Consecutive rows that make all of these outputs, those that no row adds to among them.

        Rows beyond the ends stand for zeros.
        """
        first, stop = (end + self.padding for end in outputs)
        if first == stop:
            return 0, 0
        begin = min(-((self.span - 1 - first) // self.stride), first // self.stride)
        last = max((stop - 1) // self.stride, -((self.span - stop) // self.stride))
        return begin, last + 1

    def begins(self, row: int) -> int:
        """The first output that this row adds to; it may lie before the first there is."""
        return row * self.stride - self.padding


@dataclass(frozen=True)
class Trade:
    """What one index sends and receives so that it has the rows it wants.

    `wanted` are sorted ranges; what lies outside of the tensor is filled in. `sends` and `receives` are (index, rows).
    `still` says that no index sends anything.
    """

    held: Range
    wanted: Ranges
    sends: tuple[tuple[int, Ranges], ...]
    receives: tuple[tuple[int, Ranges], ...]
    still: bool

    @property
    def own(self) -> Ranges:
        """The rows that are wanted and held."""
        return common(self.wanted, self.held)

    @property
    def rows(self) -> int:
        """How many rows are wanted."""
        return sum(stop - start for start, stop in self.wanted)


@lru_cache(maxsize=4096)
def trade(length: int, wanted: tuple[Ranges, ...], index: int) -> Trade:
    """What `index` does, where index i wants the rows `wanted[i]` of `length`.

    Example:
        >>> trade(8, (((-1, 4),), ((2, 7),), ((5, 9),)), 1).sends
        ((0, ((3, 4),)), (2, ((5, 6),)))
    """
    held = balanced(length, len(wanted))
    moved = {(i, j): common(wanted[j], rows) for i, rows in enumerate(held) for j in range(len(wanted)) if i != j}
    sends = tuple((j, rows) for (i, j), rows in moved.items() if i == index and rows)
    receives = tuple((i, rows) for (i, j), rows in moved.items() if j == index and rows)
    return Trade(held[index], wanted[index], sends, receives, not any(moved.values()))


@lru_cache(maxsize=4096)
def windows(window: Window | Spread, length: int, degree: int) -> tuple[Ranges, ...]:
    """What each index reads for its part of `length` outputs."""
    return tuple((window.reads(outputs),) for outputs in balanced(length, degree))


def common(ranges: Sequence[Range], held: Range) -> Ranges:
    """The parts of `ranges` within `held`."""
    within = ((max(start, held[0]), min(stop, held[1])) for start, stop in ranges)
    return tuple((start, stop) for start, stop in within if start < stop)


def runs(rows: Iterable[int]) -> Ranges:
    """Any rows as sorted ranges.

    Example:
        >>> runs([3, 1, 2, 2, 7])
        ((1, 4), (7, 8))
    """
    found: list[Range] = []
    for row in sorted(set(rows)):
        start = found.pop()[0] if found and found[-1][1] == row else row
        found.append((start, row + 1))
    return tuple(found)


def places(rows: Iterable[int], ranges: Ranges) -> list[int]:
    """Where each of `rows` stands among the rows of `ranges`, which lie one after another."""
    offsets, count = {}, 0
    for start, stop in ranges:
        offsets |= {row: count + row - start for row in range(start, stop)}
        count += stop - start
    return [offsets[row] for row in rows]


def bordered(mode: str, length: int, before: int, after: int) -> list[int]:
    """The row that each row of a tensor padded by torch's `mode` copies.

    Example:
        >>> bordered("reflect", 4, 2, 1)
        [2, 1, 0, 1, 2, 3, 2]
    """
    rows = range(-before, length + after)
    if mode == "replicate":
        return [min(max(row, 0), length - 1) for row in rows]
    if mode == "circular":
        return [row % length for row in rows]
    assert mode == "reflect", mode
    return [min(abs(row), 2 * (length - 1) - abs(row)) for row in rows]


def pooled(length: int, outputs: int) -> list[Range]:
    """The rows that each output of an adaptive pool is made of, as torch chooses them."""
    return [(o * length // outputs, -(-(o + 1) * length // outputs)) for o in range(outputs)]
