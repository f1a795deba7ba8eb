"""The memory of a bucket's parameters where it is there only while they are used (ZeRO 3).

    between uses     p -> one NaN, seen as a tensor of p's shape           memory: none
    in use           p -> its place in [ p0 | p1 | p2 ... ]                memory: what has been gathered

It is one storage, which becomes empty and is filled again: what autograd keeps of a parameter for the backward pass,
the parameter itself or a view of its memory, finds the values there again. They are written through another tensor than
the parameters, so autograd counts no change in place; as in FSDP (Zhao et al. 2023, https://arxiv.org/abs/2304.11277).
Whoever reads a parameter in between gets NaN, and cannot write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridpar.optim.bucket import Named

Layout = Sequence[tuple[int, tuple[int, ...]]]  # where a parameter begins, and its strides


class Memory:
    """[length] numbers for the parameters `members`, at the places of `layout`."""

    def __init__(self, members: Named, layout: Layout, length: int) -> None:
        first = members[0][1]
        self._flat = torch.zeros(length, dtype=first.dtype, device=first.device)
        self._bytes = self._flat.untyped_storage().nbytes()
        void = torch.nan if first.is_floating_point() or first.is_complex() else 0
        nothing = torch.full((), void, dtype=first.dtype, device=first.device)
        self._parameters = [p for _, p in members]
        self._full = [
            self._flat.as_strided(p.shape, strides, start) for p, (start, strides) in zip(self._parameters, layout)
        ]
        self._empty = [nothing.expand(p.shape) for p in self._parameters]
        self.there = True
        for p, place in zip(self._parameters, self._full):
            place.copy_(p.detach())

    def part(self, start: int, stop: int) -> Tensor:
        """A copy of a range of it."""
        return self._flat[start:stop].clone()

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Let the parameters have these `values` [length], until `empty`."""
        self._flat.untyped_storage().resize_(self._bytes)
        self._flat.copy_(values)
        for p, place in zip(self._parameters, self._full):
            p.data = place
        self.there = True

    def empty(self) -> None:
        """Give the memory back."""
        for p, nothing in zip(self._parameters, self._empty):
            p.data = nothing
        self._flat.untyped_storage().resize_(0)
        self.there = False
