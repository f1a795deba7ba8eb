"""Horovod as the carrier of the data axis.

    start_allreduce   float16, float32, float64, int32, int64: Horovod's allreduce
                      bfloat16: Horovod cannot add it, so each rank adds one piece in float32
                          [a0 a1]  alltoall   [a0 b0] -> sum0   allgather   [sum0 sum1]
                          [b0 b1]  -------->  [a1 b1] -> sum1   --------->  [sum0 sum1]
                      anything else: over MPI
    start_reduce_scatter   Horovod's, or bfloat16 as above without the last step
    moves             allgather, alltoall, broadcast of any dtype, as words of the same length
    the rest          send, recv, objects, barrier: Horovod has none, or none that is quick; over MPI

Horovod matches operations by name, and hangs where names differ. An operation that the caller does not name gets the
axis's own count of operations, never Horovod's process-wide one. A name given by the caller is kept, since Horovod
negotiates a known name faster; while it is under way already, the next one of this name is told apart by a number.

Measured facts about Horovod 0.28.1 that shape this file: unnamed operations hang as soon as one rank has made one more
of them; bfloat16 raises; one small operation costs about a cycle (1 ms).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridpar.shard import balanced
from hybridpar.wires.axis import Axis, Finished, Handle

_ADDED = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMBINE = {"sum": torch.sum, "average": torch.mean, "max": torch.amax, "min": torch.amin}
_WAY_OUT = "build it with `python -m hybridpar.install`"


def check_built() -> None:
    """Raise RuntimeError unless Horovod is here, built with MPI and for the torch that is installed.

    Example:
        >>> check_built()       # silent where all is well      # doctest: +SKIP
    """
    try:
        import horovod

        version = horovod.__version__
        facts = Path(horovod.__file__).with_name("metadata.json")  # written when Horovod is built
        torch_then = json.loads(facts.read_text()).get("pytorch") if facts.exists() else None
        # Before it is loaded: one built for another torch often fails there, with the name of a lost C++ symbol.
        if torch_then not in (None, torch.__version__):
            raise RuntimeError(
                f"Horovod {version} was built for torch {torch_then} and torch {torch.__version__} is installed; "
                f"{_WAY_OUT}"
            )
        built = _hvd().mpi_built()
    except (ImportError, AttributeError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"Horovod with PyTorch cannot be loaded ({why}); {_WAY_OUT}") from error
    if not built:
        raise RuntimeError(f"Horovod {version} was built without MPI; {_WAY_OUT}")


class HorovodAxis(Axis):
    """The ranks of Horovod's world, which `hvd.init(comm=...)` made of the data axis.

    `peers` is the same ranks over MPI. One such axis per process: Horovod has one world.

    Example:
        >>> axis = HorovodAxis("data", (0, 2), peers)               # doctest: +SKIP
        >>> axis.start_allreduce(x, "average", "gradients").wait()  # doctest: +SKIP
    """

    def __init__(self, name: str, ranks: Sequence[int], peers: Axis) -> None:
        hvd = _hvd()
        if (hvd.rank(), hvd.size()) != (peers.index, peers.size):
            raise ValueError(
                f"{name} axis: Horovod says rank {hvd.rank()} of {hvd.size()} and MPI says {peers.index} of "
                f"{peers.size}; let hybridpar initialise Horovod, and call hp.init() first"
            )
        self.name, self.index, self.size, self.ranks = name, peers.index, peers.size, tuple(ranks)
        self._hvd, self._peers = hvd, peers
        self._ops = {"sum": hvd.Sum, "average": hvd.Average, "max": hvd.Max, "min": hvd.Min}
        self._count = 0
        self._under_way: dict[str, set[int]] = {}

    def start_allreduce(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        if not x.numel():
            return Finished(x)
        if x.dtype is torch.bfloat16:
            return _Bfloat16Sum(self._hvd, x, self._reachable(x).view(-1), op, *self._named(name))
        if x.dtype not in _ADDED:
            return self._peers.start_allreduce(x, op, name)
        flat, (name, release) = self._reachable(x).view(-1), self._named(name)
        return _Sum(self._hvd, self._hvd.allreduce_async_(flat, name=name, op=self._ops[op]), x, flat, release)

    def start_reduce_scatter(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        flat, (name, release) = self._reachable(x), self._named(name)
        if x.dtype is torch.bfloat16:
            splits = torch.full((self.size,), len(x) // self.size, dtype=torch.int32)
            handle = self._hvd.alltoall_async(flat.view(torch.int16), splits=splits, name=name)
            combine = _COMBINE[op]
            return _Got(self._hvd, handle, x, release, lambda got: combine(_rows(got[0], self.size), dim=0))
        handle = self._hvd.reducescatter_async(flat, name=name, op=self._ops[op])
        return _Got(self._hvd, handle, x, release)

    def start_allgather(self, x: Tensor, name: str | None = None) -> Handle:
        name, release = self._named(name)
        handle = self._hvd.allgather_async(self._words(x.detach()), name=name)
        return _Got(self._hvd, handle, x, release, lambda got: got.view(x.dtype))

    def allgather(self, x: Tensor, dim: int = 0) -> Tensor:
        rows = x.detach().movedim(dim, 0).contiguous()
        if not _moves(rows):
            return self._peers.allgather(x, dim)
        got = self._hvd.synchronize(self._hvd.allgather_async(self._words(rows), name=self._named(None)[0]))
        return got.view(x.dtype).to(x.device).movedim(0, dim).contiguous()

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        rows = x.detach().movedim(dim, 0).contiguous()
        if x.dtype not in _ADDED or not rows.numel():
            return self._peers.reduce_scatter(x, dim)
        handle = self._hvd.reducescatter_async(self._reachable(rows), name=self._named(None)[0], op=self._hvd.Sum)
        return self._hvd.synchronize(handle).to(x.device).movedim(0, dim).contiguous()

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        if not _moves(pieces[0]):
            return self._peers.alltoall(pieces)
        words = self._words(torch.cat([piece.detach() for piece in pieces]))
        splits = torch.tensor([len(piece) for piece in pieces], dtype=torch.int32)
        handle = self._hvd.alltoall_async(words, splits=splits, name=self._named(None)[0])
        got, coming = self._hvd.synchronize(handle)
        return list(got.view(pieces[0].dtype).to(pieces[0].device).split(coming.tolist()))

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        if not x.numel() or x.element_size() not in _WORDS:
            return self._peers.broadcast(x, source)
        words = self._words(x.detach().view(-1))
        self._hvd.synchronize(self._hvd.broadcast_async_(words, source, name=self._named(None)[0]))
        return x if words.data_ptr() == x.data_ptr() else x.copy_(words.view(x.dtype).view(x.shape))

    def send(self, x: Tensor, to: int, tag: int) -> Handle:
        return self._peers.send(x, to, tag)

    def recv(self, x: Tensor, source: int, tag: int) -> Handle:
        return self._peers.recv(x, source, tag)

    def objects(self, value: Any) -> list[Any]:
        return self._peers.objects(value)

    def barrier(self) -> None:
        self._peers.barrier()

    @property
    def notes(self) -> Axis:
        return self._peers.notes

    def _named(self, name: str | None) -> tuple[str, Callable[[], None]]:
        """The name on the wire, and what to call when its operation is over."""
        if name is None:
            self._count += 1
            return f"{self.name}.{self._count}", lambda: None
        taken = self._under_way.setdefault(name, set())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        taken.add(slot)
        return f"{self.name}.{name}.{slot}", lambda: taken.discard(slot)

    def _reachable(self, x: Tensor) -> Tensor:
        """`x` itself where Horovod can read it, else a copy in host memory."""
        return x if x.device.type == "cpu" or self._hvd.cuda_built() else x.cpu()

    def _words(self, x: Tensor) -> Tensor:
        return self._reachable(x).view(_WORDS[x.element_size()])


class _Sum:
    """An allreduce under way in `flat`, for `x`; they share memory where Horovod can read `x`."""

    def __init__(self, hvd: Any, handle: int, x: Tensor, flat: Tensor, release: Callable[[], None]) -> None:
        self._hvd, self._handle, self._x, self._flat, self._release = hvd, handle, x, flat, release
        self._over = False

    def wait(self) -> Tensor:
        if not self._over:
            self._hvd.synchronize(self._handle)
            self._release()
            if self._flat.device != self._x.device:
                self._x.copy_(self._flat.view(self._x.shape))
            self._over = True
        return self._x

    def done(self) -> bool:
        return self._over or self._hvd.poll(self._handle)


class _Got:
    """An operation under way that gives another tensor than `x`, of its dtype and on its device; `finish` makes it."""

    def __init__(
        self,
        hvd: Any,
        handle: int,
        x: Tensor,
        release: Callable[[], None],
        finish: Callable[[Any], Tensor] = lambda got: got,
    ) -> None:
        self._hvd, self._handle, self._x, self._release, self._finish = hvd, handle, x, release, finish
        self._got: Tensor | None = None

    def wait(self) -> Tensor:
        if self._got is None:
            got = self._finish(self._hvd.synchronize(self._handle))
            self._release()
            self._got = got.to(device=self._x.device, dtype=self._x.dtype)
        return self._got

    def done(self) -> bool:
        return self._got is not None or self._hvd.poll(self._handle)


class _Bfloat16Sum:
    """An alltoall of pieces, and when they have come their sum in float32 and its allgather."""

    def __init__(
        self, hvd: Any, x: Tensor, flat: Tensor, op: str, name: str, release: Callable[[], None]
    ) -> None:
        self._hvd, self._x, self._op, self._name, self._release = hvd, x, op, name, release
        splits = torch.tensor([b - a for a, b in balanced(len(flat), hvd.size())], dtype=torch.int32)
        self._pieces = hvd.alltoall_async(flat.view(torch.int16), splits=splits, name=f"{name}.pieces")
        self._sums: int | None = None
        self._over = False

    def wait(self) -> Tensor:
        if not self._over:
            self._gather()
            words = self._hvd.synchronize(self._sums)
            self._x.copy_(words.view(torch.bfloat16).view(self._x.shape))
            self._release()
            self._over = True
        return self._x

    def done(self) -> bool:
        if self._over:
            return True
        if self._sums is None and self._hvd.poll(self._pieces):
            self._gather()
        return self._sums is not None and self._hvd.poll(self._sums)

    def _gather(self) -> None:
        """Add what has come and begin to gather the sums; peers may be here at different times, the name matches."""
        if self._sums is None:
            words, _ = self._hvd.synchronize(self._pieces)
            pieces = _rows(words, self._hvd.size())
            combined = _COMBINE[self._op](pieces, dim=0).to(torch.bfloat16)
            self._sums = self._hvd.allgather_async(combined.view(torch.int16), name=f"{self._name}.sums")


def _rows(words: Tensor, size: int) -> Tensor:
    """The pieces of bfloat16 that came from each rank, in float32: [size, n]."""
    return words.view(torch.bfloat16).view(size, len(words) // size).float()


def _moves(x: Tensor) -> bool:
    """Whether Horovod can move the rows of `x`; the same answer on all ranks, whose number of rows may differ."""
    return x.element_size() in _WORDS and x.shape[1:].numel() > 0


def _hvd() -> Any:
    import_module("mpi4py.MPI")  # first: else Horovod would own MPI, and end it
    import horovod.torch as hvd

    return hvd
