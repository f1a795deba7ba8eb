"""A piece: what one replica keeps of a parameter that is cut over the data axis.

    p, [4, 3], in memory       0 1 2 3 4 5 6 7 8 9 10 11
    pieces, data = 2           |--- index 0 ---|- index 1 -|        where the bucket's cut happens to fall

Pieces are ranges of memory, so they cut a parameter anywhere, and may be empty. The user's optimizer steps pieces in
the place of parameters; that is right for what treats each element by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.shard import Range
from hybridpar.wires.axis import Axis

_NAME = "hybridpar_piece"
_TAG = 8


@dataclass(frozen=True, eq=False)
class Piece:
    """`held` [n] is this replica's part of `whole`; `ranges` are the parts of all, by data index.

    `strides` are those of `whole`. `held` lies in its memory, unless `sole`: then `whole` has none between its uses.
    """

    whole: Parameter
    held: Parameter
    ranges: tuple[Range, ...]
    peers: Axis
    strides: tuple[int, ...]
    sole: bool = False

    @property
    def mine(self) -> Range:
        """[start, stop) of this replica's part."""
        return self.ranges[self.peers.index]

    def part(self, x: Tensor) -> Tensor:
        """This replica's part [n] of `x`, which has the shape of `whole`."""
        start, stop = self.mine
        laid = torch.empty_strided(self.whole.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        return flat(laid)[start:stop].clone()

    def together(self, part: Tensor) -> Tensor:
        """What all replicas' parts make, of the shape of `whole`, on each of them; all call it together."""
        return self._shaped(self.peers.allgather(part.detach().contiguous()))

    def collected(self, part: Tensor, to: int) -> Tensor | None:
        """The same at data index `to` only, and None elsewhere; all call it together."""
        part = part.detach().contiguous()
        if self.peers.index != to:
            if part.numel():
                self.peers.send(part, to, _TAG).wait()
            return None
        parts = []
        for index, (start, stop) in enumerate(self.ranges):
            coming = part if index == to else part.new_empty(stop - start)
            if index != to and stop > start:
                self.peers.recv(coming, index, _TAG).wait()
            parts.append(coming)
        return self._shaped(torch.cat(parts))

    def _shaped(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.whole.shape, self.strides).contiguous()


@dataclass(frozen=True, eq=False)
class Scattered:
    """A tensor of which each replica has a part, as a state of an optimizer."""

    piece: Piece
    part: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    def collected(self, to: int) -> Tensor | None:
        """The whole at data index `to`, None elsewhere; all replicas call it together."""
        return self.piece.collected(self.part, to)


def piece_of(p: Tensor) -> Piece | None:
    """The piece of a parameter of the model that was cut; None for any other."""
    return vars(p).get(_NAME)


def stepped(p: Parameter) -> Parameter:
    """What an optimizer steps for a parameter of the model, and where its gradient is: its piece, or itself."""
    piece = piece_of(p)
    return p if piece is None else piece.held


def keep(piece: Piece) -> None:
    """Let `piece_of(piece.whole)` find it: whoever meets the parameter must know that its gradient lies elsewhere."""
    vars(piece.whole)[_NAME] = piece


def forget(p: Parameter) -> None:
    """Let the parameter be whole again: its next optimizer steps it as it is, or cuts it anew. Replicas do together."""
    piece = vars(p).pop(_NAME, None)
    if piece is not None and piece.sole:
        p.data = torch.empty_strided(p.shape, piece.strides, dtype=p.dtype, device=p.device).copy_(_value(piece))


def lone(p: Tensor) -> bool:
    """Whether the replicas hold a parameter once among them, and no memory of it between its uses."""
    piece = piece_of(p)
    return piece is not None and piece.sole


def value(p: Parameter) -> Tensor:
    """The value of a parameter, whole; replicas call it together, for the same parameters in one order."""
    return _value(piece_of(p)) if lone(p) else p.detach()


@torch.no_grad()
def put(p: Tensor, new: Tensor) -> None:
    """Give a parameter, cut or not, or a buffer another value."""
    if lone(p):
        piece = piece_of(p)
        piece.held.copy_(piece.part(new.to(piece.held.dtype)))
    else:
        p.copy_(new)


def kept(p: Tensor) -> Tensor | Scattered:
    """What a checkpoint is to keep of a tensor of the model."""
    return Scattered(piece_of(p), piece_of(p).held) if lone(p) else p


def _value(piece: Piece) -> Tensor:
    return piece.together(piece.held).to(piece.whole.device)


def flat(x: Tensor) -> Tensor:
    """The memory [n] of a tensor without gaps; it shares it."""
    return x.detach().as_strided((x.numel(),), (1,))


def gradient(p: Tensor) -> Tensor | None:
    """The gradient of a parameter, cut or not; replicas call it together, for the same parameters in one order."""
    piece = piece_of(p)
    if piece is None:
        return p.grad
    return None if piece.held.grad is None else piece.together(piece.held.grad).to(p.device)
