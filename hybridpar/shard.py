"""Specs: which part of which parameter of the unsplit module a rank holds.

A `Spec` is the single source of truth. Initialisation, gradient sums, clipping, checkpoints and
verification ask it; nobody guesses from a parameter's name.

    Spec("attn.qkv.weight", (12, 4), dim=0, parts=(((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12))))

           rows 0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11        index 0 holds rows 0 1 4 5 8 9 (in that order)
                 q0    q1    k0    k1    v0     v1           index 1 holds rows 2 3 6 7 10 11

Parts of different indices may overlap (a key-value head that two ranks share): then each holder has
only its share of the gradient, and the first holder owns the piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

Range = tuple[int, int]  # [start, stop)


def balanced(length: int, pieces: int) -> tuple[Range, ...]:
    """Cut `range(length)` into consecutive pieces whose sizes differ by at most one, longer ones first.

    Example:
        >>> balanced(7, 3)
        ((0, 3), (3, 5), (5, 7))
    """
    small, extra = divmod(length, pieces)
    starts = [i * small + min(i, extra) for i in range(pieces + 1)]
    return tuple(zip(starts[:-1], starts[1:]))


@dataclass(frozen=True)
class Spec:
    """One parameter: its name and shape in the unsplit module, and who holds what along the tensor axis.

    `dim` is None where each rank holds the whole. `parts[index]` are the ranges of `dim` held at that index.
    `partial` says that the holders' gradients are shares of the gradient, to be summed along the axis.

    Raises ValueError where a range is outside the dim, an index holds an element twice, or nobody holds one.

    Example:
        >>> spec = Spec("up.weight", (10, 4), dim=0, parts=(((0, 6),), ((4, 10),)))
        >>> spec.local_shape(1), spec.overlaps
        ((6, 4), True)
        >>> spec.owned(1)                               # rows 6 to 9; rows 4 and 5 belong to index 0
        (((2, 6), (6, 10)),)
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[tuple[Range, ...], ...] = ()
    partial: bool = False

    def __post_init__(self) -> None:
        if self.dim is None:
            return
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"{self.name} {list(self.shape)} has no dim {self.dim} to be cut along")
        length = self.shape[self.dim]
        where = f"of dim {self.dim} of {self.name} {list(self.shape)}"
        for index, part in enumerate(self.parts):
            for start, stop in part:
                if not 0 <= start <= stop <= length:
                    raise ValueError(f"index {index} cannot hold [{start}, {stop}) {where}: it has 0 to {length}")
            if _overlap(part):
                raise ValueError(f"index {index} holds some element {where} twice: {part}")
        lost = _minus((0, length), [r for part in self.parts for r in part])
        if lost:
            raise ValueError(f"nobody holds [{lost[0][0]}, {lost[0][1]}) {where}: the parts must cover it")

    def renamed(self, prefix: str) -> Spec:
        """The same spec, its name with `prefix` and a dot before it."""
        return replace(self, name=f"{prefix}.{self.name}") if prefix else self

    def held(self, index: int) -> tuple[Range, ...]:
        """The ranges of `dim` held at `index`, in local order."""
        assert self.dim is not None, f"{self.name} is not cut"
        return self.parts[index]

    def local_shape(self, index: int) -> tuple[int, ...]:
        """The shape of the shard held at `index`."""
        if self.dim is None:
            return self.shape
        length = sum(stop - start for start, stop in self.parts[index])
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    @property
    def overlaps(self) -> bool:
        """Whether some element is held at more than one index of a cut dim."""
        if self.dim is None:
            return False
        return _overlap([r for part in self.parts for r in part])

    def owned(self, index: int) -> tuple[tuple[Range, Range], ...]:
        """(local range, global range) of what `index` owns: each element has one owner, its first holder.

        A whole parameter (dim None) is owned at index 0; its ranges are then along dim 0 of a flat view.
        """
        if self.dim is None:
            count = prod(self.shape)
            return (((0, count), (0, count)),) if index == 0 else ()
        taken = [r for part in self.parts[:index] for r in part]
        owned, local = [], 0
        for start, stop in self.parts[index]:
            for piece in _minus((start, stop), taken):
                begin = local + piece[0] - start
                owned.append(((begin, begin + piece[1] - piece[0]), piece))
            local += stop - start
        return tuple(owned)


def cut(name: str, shape: Sequence[int], dim: int, parts: Sequence[Sequence[Range]]) -> Spec:
    """A spec cut along `dim`; overlapping parts make it partial."""
    spec = Spec(name, tuple(shape), dim, tuple(tuple(p) for p in parts))
    return replace(spec, partial=spec.overlaps)


def _overlap(ranges: Sequence[Range]) -> bool:
    """Whether some element is in two of `ranges`."""
    filled = sorted((start, stop) for start, stop in ranges if start < stop)
    return any(left[1] > right[0] for left, right in zip(filled, filled[1:]))


def _minus(piece: Range, taken: Sequence[Range]) -> list[Range]:
    """What is left of `piece` without the ranges `taken`."""
    left = [piece] if piece[0] < piece[1] else []
    for start, stop in taken:
        left = [
            kept
            for a, b in left
            for kept in ((a, min(b, start)), (max(a, stop), b))
            if kept[0] < kept[1]
        ]
    return left
