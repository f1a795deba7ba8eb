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
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[tuple[Range, ...], ...] = ()
    partial: bool = False

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
        ranges = sorted(r for part in self.parts for r in part)
        return any(left[1] > right[0] for left, right in zip(ranges, ranges[1:]))

    def owned(self, index: int) -> tuple[tuple[Range, Range], ...]:
        """(local range, global range) of what `index` owns: each element has one owner, its first holder.

        A whole parameter (dim None) is owned at index 0; its ranges are then along dim 0 of a flat view.
        """
        if self.dim is None:
            count = 1
            for n in self.shape:
                count *= n
            return ((((0, count), (0, count))),) if index == 0 else ()
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


def _minus(piece: Range, taken: Sequence[Range]) -> list[Range]:
    """What is left of `piece` without the ranges `taken`."""
    left = [piece]
    for start, stop in taken:
        left = [
            kept
            for a, b in left
            for kept in ((a, min(b, start)), (max(a, stop), b))
            if kept[0] < kept[1]
        ]
    return left
