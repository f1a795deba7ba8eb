"""A bucket of ZeRO: parameters whose gradients are averaged, and whose values are gathered, by one operation.

    memory, D replicas      [ p0 | p1 | p2 ... | zeros ]          D shares of one length
    reduce_scatter          index 0 gets share 0 of the average, index 1 share 1, ...
    allgather               the shares, stepped by the optimizer, become the parameters again

The cut falls where the shares end, whatever the parameters: all replicas hold the same number of elements. With ZeRO 3
the share of the values has a memory of its own, and that of the parameters is there while they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.bucket import Named
from hybridpar.optim.zero.memory import Memory
from hybridpar.optim.zero.piece import Piece, flat
from hybridpar.shard import Range
from hybridpar.wires.axis import Axis, Handle

_ALIGNMENT = 16  # elements: each gradient begins at a multiple of it, as vector instructions like it


class Bucket:
    """`members` in the order of memory; `each_pass`: gradients leave after each backward pass, not only the last.

    With `home` the values are there between the parameters' uses, in pieces on that device (ZeRO 3).
    """

    def __init__(
        self,
        name: str,
        members: Named,
        axis: Axis,
        peers: Axis,
        each_pass: bool,
        home: torch.device | None = None,
    ) -> None:
        self._name, self.members, self._axis, self.each_pass = name, list(members), axis, each_pass
        self._starts, length = [], 0
        for _, p in members:
            self._starts.append(length)
            length += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        self._share = -(-length // axis.size)
        first = members[0][1]
        self._like = {"dtype": first.dtype, "device": first.device}
        self._strides = [torch.empty_like(p, device="meta").stride() for _, p in members]
        self._home = home
        self.memory: Memory | None = None
        self._values: Tensor | None = None  # this replica's share, of which the pieces are views
        self.pieces = self._in_place(peers) if home is None else self._apart(peers, home)
        self._memory: Tensor | None = None  # gradients of this pass
        self._ready: set[int] = set()
        self._sending: Handle | None = None
        self._sum: Tensor | None = None  # this replica's share of the gradients of this step
        self.had: set[int] = set()  # members that had a gradient in this step, here

    @property
    def full(self) -> bool:
        """Whether all gradients that may come have come."""
        return all(place in self._ready or not p.requires_grad for place, (_, p) in enumerate(self.members))

    @property
    def trained(self) -> bool:
        """Whether any of the parameters is not frozen."""
        return any(p.requires_grad for _, p in self.members)

    def take(self, place: int) -> None:
        """Move the gradient of the parameter at `place` here."""
        name, p = self.members[place]
        if place in self._ready:
            raise ValueError(
                f"{name}: a gradient came after its reduction over the data axis had begun; one backward pass must "
                "reach each parameter once (checkpoint with use_reentrant=False, or do not share the parameter there)"
            )
        if self._memory is None:
            self.finish()
            self._memory = torch.zeros(self._share * self._axis.size, **self._like)
        start = self._starts[place]
        memory = self._memory[start : start + p.numel()]
        laid = memory.as_strided(p.shape, self._strides[place])
        laid.copy_(p.grad.to_dense() if p.grad.is_sparse else p.grad)
        p.grad = None
        self._ready.add(place)

    def launch(self) -> None:
        """Begin the reduction, with zeros for parameters that have no gradient here."""
        for place, (_, p) in enumerate(self.members):
            if place not in self._ready and p.grad is not None:
                self.take(place)
        self.finish()  # the operation of an earlier pass has the same name
        memory = torch.zeros(self._share * self._axis.size, **self._like) if self._memory is None else self._memory
        self._sending, self._memory = self._axis.start_reduce_scatter(memory, "average", self._name), None
        self.had |= self._ready
        self._ready.clear()

    def finish(self) -> None:
        """Wait for the reduction that is under way, if one is, and add what comes of it."""
        if self._sending is not None:
            share, self._sending = self._sending.wait(), None
            share = share if self._home is None else share.to(self._home)
            self._sum = share if self._sum is None else self._sum.add_(share)

    def deliver(self, had: list[bool]) -> None:
        """Give the pieces their gradients; `had` says which parameters had one on any replica."""
        self.finish()
        for (start, _), piece, any_had in zip(self._mine(), self.pieces, had):
            if any_had:
                part = self._sum[start : start + piece.held.numel()]
                # As autograd does: what an earlier step left is added to.
                piece.held.grad = part if piece.held.grad is None else piece.held.grad.add_(part)
        self._sum = None
        self.had.clear()

    @torch.no_grad()
    def gather(self) -> Handle:
        """Begin to collect the parameters that the pieces make now."""
        if self._values is not None:
            return self._axis.start_allgather(self._values.to(self._like["device"]), f"{self._name}.values")
        share = torch.zeros(self._share, **self._like)
        for (start, stop), piece in zip(self._mine(), self.pieces):
            share[start:stop] = piece.held
        return self._axis.start_allgather(share, f"{self._name}.values")

    @torch.no_grad()
    def fill(self, memory: Tensor) -> None:
        """Put what was gathered into the parameters."""
        if self.memory is not None:
            self.memory.fill(memory)
            return
        for start, (_, p) in zip(self._starts, self.members):
            flat(p).copy_(memory[start : start + p.numel()])

    def _in_place(self, peers: Axis) -> list[Piece]:
        """Pieces in the memory of the parameters."""
        pieces = []
        for start, (_, p), strides in zip(self._starts, self.members, self._strides):
            if p.stride() != strides:  # a view with gaps
                p.data = torch.empty_like(p).copy_(p.data)
            ranges = self._ranges(start, p.numel())
            first, stop = ranges[peers.index]
            held = Parameter(flat(p)[first:stop], requires_grad=p.requires_grad)
            pieces.append(Piece(p, held, ranges, peers, strides))
        return pieces

    def _apart(self, peers: Axis, home: torch.device) -> list[Piece]:
        """Pieces in a memory of their own; the parameters' becomes empty."""
        layout = list(zip(self._starts, self._strides))
        self.memory = Memory(self.members, layout, self._share * self._axis.size)
        mine = self.memory.part(self._axis.index * self._share, (self._axis.index + 1) * self._share)
        away = home != mine.device and torch.cuda.is_available()
        self._values = mine.to(home).pin_memory() if away and home.type == "cpu" else mine.to(home)
        self.memory.empty()
        pieces = []
        for (start, strides), (_, p) in zip(layout, self.members):
            ranges = self._ranges(start, p.numel())
            first, stop = self._within(start, ranges[peers.index])
            held = Parameter(self._values[first:stop], requires_grad=p.requires_grad)
            pieces.append(Piece(p, held, ranges, peers, strides, sole=True))
        return pieces

    def _ranges(self, start: int, count: int) -> tuple[Range, ...]:
        """The part of a parameter at `start` that each index holds."""
        ends = [min(max(index * self._share - start, 0), count) for index in range(self._axis.size + 1)]
        return tuple(zip(ends[:-1], ends[1:]))

    def _mine(self) -> list[Range]:
        """Where each piece lies in this replica's share."""
        return [self._within(start, piece.mine) for start, piece in zip(self._starts, self.pieces)]

    def _within(self, start: int, mine: Range) -> Range:
        """Where a part of the parameter at `start` lies in this replica's share."""
        before = start - self._axis.index * self._share
        return (before + mine[0], before + mine[1]) if mine[1] > mine[0] else (0, 0)
