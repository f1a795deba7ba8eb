"""What every carrier offers: collectives and point-to-point along one axis of the mesh.

    allreduce        x -> sum of all x                      in place
    allgather        x -> all x, one after another          along dim
    reduce_scatter   x -> this index's piece of the sum     along dim
    broadcast        x -> source's x                        in place
    send, recv       never block; a message is matched by (source, tag)

Size 1 is handled here, in `Alone`, and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from hybridpar.shard import balanced


class Handle(Protocol):
    """Something under way."""

    def wait(self) -> Tensor:
        """Block until it is done; returns the tensor that holds the result."""

    def done(self) -> bool:
        """Whether `wait` would return at once. Also lets the carrier make progress."""


class Finished:
    """A handle of something already done."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def wait(self) -> Tensor:
        return self._x

    def done(self) -> bool:
        return True


class Axis(ABC):
    """The ranks along one axis through this rank, and what they can do together.

    `index` is this rank's place, `size` how many there are, `ranks` their world ranks.
    Every collective must be called by all of them, in the same order.
    """

    name: str
    index: int
    size: int
    ranks: tuple[int, ...]

    @abstractmethod
    def start_allreduce(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        """Begin to combine `x` (contiguous, changed in place) over the axis; `op` is sum, average, max or min."""

    def allreduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Combine `x` (contiguous, changed in place) over the axis and return it."""
        return self.start_allreduce(x, op).wait()

    def start_reduce_scatter(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        """Begin to combine `x` [size * n] over the axis, `op` sum or average; `wait` gives this index's share [n].

        `x` may be overwritten. Carriers that cannot do so meanwhile do it at once.
        """
        share = self.reduce_scatter(x)
        return Finished(share.div_(self.size) if op == "average" else share)

    def start_allgather(self, x: Tensor, name: str | None = None) -> Handle:
        """Begin to bring together all ranks' `x` [n], of one length; `wait` gives [size * n]."""
        return Finished(self.allgather(x))

    @abstractmethod
    def allgather(self, x: Tensor, dim: int = 0) -> Tensor:
        """All ranks' `x`, one after another along `dim`; their sizes along `dim` may differ."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """This index's piece, by `balanced`, along `dim` of the sum of all ranks' `x`."""

    @abstractmethod
    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Piece i goes to index i; returns what came from each. Pieces to and from one rank may differ in shape
        along dim 0 only; all must share a dtype."""

    @abstractmethod
    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The tensor of index `source`, into `x` (contiguous) on the others."""

    @abstractmethod
    def send(self, x: Tensor, to: int, tag: int) -> Handle:
        """Begin to send `x` (contiguous) to index `to`; the handle keeps `x` alive."""

    @abstractmethod
    def recv(self, x: Tensor, source: int, tag: int) -> Handle:
        """Begin to receive into `x` (contiguous, of the sender's shape and dtype) from index `source`."""

    @abstractmethod
    def objects(self, value: Any) -> list[Any]:
        """Every rank's small Python value, in order of index."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when all ranks of the axis have come here."""

    @property
    def notes(self) -> Axis:
        """The axis that carries small CPU tensors between the same ranks, matched by tag: itself, unless it cannot."""
        return self

    @property
    def ordered(self) -> bool:
        """Whether messages between two ranks arrive in the order in which they were sent, whatever their tags."""
        return False

    def piece(self, length: int) -> tuple[int, int]:
        """This index's [start, stop) of `length`, by `balanced`."""
        return balanced(length, self.size)[self.index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {self.index} of {self.size}, ranks {self.ranks})"


class Alone(Axis):
    """An axis of size 1: everything is already where it should be.

    Messages to oneself are kept until they are received, so that two stages on one rank need no special case.
    """

    def __init__(self, name: str, rank: int = 0) -> None:
        self.name, self.index, self.size, self.ranks = name, 0, 1, (rank,)
        self._letters: dict[int, list[Tensor]] = {}

    def start_allreduce(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        return Finished(x)

    def allgather(self, x: Tensor, dim: int = 0) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return x

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        return list(pieces)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x

    def send(self, x: Tensor, to: int, tag: int) -> Handle:
        self._letters.setdefault(tag, []).append(x)
        return Finished(x)

    def recv(self, x: Tensor, source: int, tag: int) -> Handle:
        return Finished(x.copy_(self._letters[tag].pop(0)))

    def objects(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None
