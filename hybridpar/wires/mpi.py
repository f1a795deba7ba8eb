"""MPI as a carrier: tensors are handed to MPI where they lie, by address.

CPU tensors are never copied on the way. CUDA tensors go directly where MPI is CUDA-aware, else through host memory.
MPI has no bfloat16 and no arithmetic on half floats: these are moved as raw words and summed in float32.

Only upper-case (buffer) calls are used. The first lower-case call on a communicator duplicates it while holding
Python's interpreter lock, and that deadlocks against Horovod's background thread.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hybridpar.shard import balanced
from hybridpar.wires.axis import Axis, Handle

_WORDS = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}
_NUMBERS = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.int16: MPI.INT16_T,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
}
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.bool: torch.int32}
_OPS = {"sum": MPI.SUM, "average": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
_MOST = 2**31 - 1  # MPI counts are C ints


class MpiHandle:
    """A request under way; keeps its tensor alive, and finishes the result after the request has completed.

    `ranks` are those without which it cannot complete.
    """

    def __init__(
        self, request: MPI.Request, x: Tensor, ranks: tuple[int, ...], finish: Callable[[], Tensor] | None = None
    ) -> None:
        self._request, self._x, self.ranks, self._finish = request, x, ranks, finish

    def wait(self) -> Tensor:
        self._request.Wait()
        if self._finish is not None:
            self._x, self._finish = self._finish(), None
        return self._x

    def done(self) -> bool:
        return self._request.Test()


class MpiAxis(Axis):
    """The ranks of one communicator.

    `synchronous` makes every send wait for its receiver (MPI_Issend): tests use it, since buffering hides wrong orders.
    """

    def __init__(self, comm: MPI.Intracomm, name: str, ranks: Sequence[int] = (), synchronous: bool = False) -> None:
        self._comm, self.name = comm, name
        self.index, self.size = comm.rank, comm.size
        self.ranks = tuple(ranks) or tuple(range(comm.size))
        self._synchronous = synchronous
        self._isend = comm.Issend if synchronous else comm.Isend
        self._direct = cuda_aware()

    def start_allreduce(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        wide = x.to(_WIDER.get(x.dtype, x.dtype))
        sent = self._reachable(wide)
        request = self._comm.Iallreduce(MPI.IN_PLACE, _numbers(sent), _OPS[op])
        return MpiHandle(request, sent, self.ranks, lambda: self._finish(x, sent, op))

    def allreduce(self, x: Tensor, op: str = "sum") -> Tensor:
        wide = x.to(_WIDER.get(x.dtype, x.dtype))
        sent = self._reachable(wide)
        self._comm.Allreduce(MPI.IN_PLACE, _numbers(sent), _OPS[op])  # blocking: better algorithms than Iallreduce
        return self._finish(x, sent, op)

    def allgather(self, x: Tensor, dim: int = 0) -> Tensor:
        dim %= x.dim()
        sent = self._reachable(x.detach().contiguous())
        lengths = self._lengths(x.shape[dim])
        shapes = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in lengths]
        counts = [_count(shape) for shape in shapes]
        all_ = torch.empty(sum(counts), dtype=x.dtype, device=sent.device)
        if all_.numel() > _MOST:  # MPI counts places in the whole too
            for source, piece in enumerate(all_.split(counts)):
                self._comm.Bcast(_words(piece.copy_(sent.view(-1)) if source == self.index else piece), root=source)
        else:
            self._comm.Allgatherv(_words(sent), [_address(all_), counts, _WORDS[x.element_size()]])
        pieces = [piece.view(shape) for piece, shape in zip(all_.split(counts), shapes)]
        # Pieces of a leading dim already lie one after another.
        whole = all_.view(sum(lengths), *x.shape[1:]) if dim == 0 else torch.cat(pieces, dim)
        return whole.to(x.device)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        dim %= x.dim()
        pieces = [x.detach().narrow(dim, a, b - a) for a, b in balanced(x.shape[dim], self.size)]
        wide = _WIDER.get(x.dtype, x.dtype)
        sent = self._reachable(torch.cat([p.reshape(-1) for p in pieces]).to(wide))
        mine = pieces[self.index]
        got = torch.empty(mine.shape, dtype=wide, device=sent.device)
        self._comm.Reduce_scatter(_numbers(sent), _numbers(got), [p.numel() for p in pieces], MPI.SUM)
        return got.to(device=x.device, dtype=x.dtype)

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        sent = self._reachable(torch.cat([p.detach().reshape(-1) for p in pieces]))
        counts = torch.tensor([p.numel() for p in pieces], dtype=torch.int64)
        coming = torch.empty_like(counts)
        self._comm.Alltoall([_address(counts), 1, MPI.INT64_T], [_address(coming), 1, MPI.INT64_T])
        got = torch.empty(int(coming.sum()), dtype=sent.dtype, device=sent.device)
        _checked_count(max(sent.numel(), got.numel()))
        word = _WORDS[sent.element_size()]
        self._comm.Alltoallv([_address(sent), counts.tolist(), word], [_address(got), coming.tolist(), word])
        rest = pieces[0].shape[1:]
        return [p.view(-1, *rest).to(pieces[0].device) for p in got.split(coming.tolist())]

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        sent = self._reachable(x)
        self._comm.Bcast(_words(sent), root=source)
        return x if sent is x else x.copy_(sent)

    def send(self, x: Tensor, to: int, tag: int) -> Handle:
        sent = self._reachable(x.detach())
        return MpiHandle(self._isend(_words(sent), dest=to, tag=tag), sent, (self.ranks[to],))

    def recv(self, x: Tensor, source: int, tag: int) -> Handle:
        got = self._reachable(x, fill=False)
        finish = None if got is x else (lambda: x.copy_(got))
        request = self._comm.Irecv(_words(got), source=source, tag=tag)
        return MpiHandle(request, x, (self.ranks[source],), finish)

    def objects(self, value: Any) -> list[Any]:
        letter = bytearray(pickle.dumps(value))
        lengths = self._lengths(len(letter))
        _checked_count(sum(lengths))
        all_ = bytearray(sum(lengths))
        self._comm.Allgatherv([letter, MPI.BYTE], [all_, lengths, MPI.BYTE])
        starts = [sum(lengths[:i]) for i in range(self.size)]
        return [pickle.loads(all_[a : a + n]) for a, n in zip(starts, lengths)]

    def barrier(self) -> None:
        self._comm.Barrier()

    @property
    def comm(self) -> MPI.Intracomm:
        """For Horovod, which is started on communicators."""
        return self._comm

    def part(self, name: str, colour: int) -> MpiAxis:
        """An axis of those that give the same `colour`, in order of their index here; all ranks together."""
        members = [rank for rank, theirs in zip(self.ranks, self._lengths(colour)) if theirs == colour]
        return MpiAxis(self._comm.Split(colour, self.index), name, members, self._synchronous)

    def free(self) -> None:
        """Give the communicator back; all ranks of the axis together."""
        self._comm.Free()

    def _lengths(self, mine: int) -> list[int]:
        length, lengths = torch.tensor([mine]), torch.empty(self.size, dtype=torch.int64)
        self._comm.Allgather(_numbers(length), [_address(lengths), 1, MPI.INT64_T])
        return lengths.tolist()

    def _reachable(self, x: Tensor, fill: bool = True) -> Tensor:
        """`x` itself where MPI can read it, else host memory, filled from `x`."""
        if not x.is_contiguous():
            raise ValueError(f"{self.name} axis: a tensor of shape {tuple(x.shape)} must be contiguous: x.contiguous()")
        if x.device.type == "cpu":
            return x
        if self._direct:
            torch.cuda.current_stream(x.device).synchronize()  # MPI does not know torch's streams
            return x
        return x.cpu() if fill else torch.empty_like(x, device="cpu")

    def _finish(self, x: Tensor, sent: Tensor, op: str) -> Tensor:
        if op == "average":
            sent.div_(self.size)
        return x if sent is x else x.copy_(sent)


def cuda_aware() -> bool:
    """Whether this MPI takes CUDA tensors by address."""
    if not torch.cuda.is_available():
        return False
    query = getattr(ctypes.CDLL(None), "MPIX_Query_cuda_support", None)
    return bool(query and query())


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _address(x: Tensor) -> MPI.buffer:
    """Where `x` lies. MPI does not keep `x` alive: the caller must hold it by a name until the call has returned."""
    return MPI.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())


def _words(x: Tensor) -> list[Any]:
    """`x` as raw words, whatever its dtype."""
    return [_address(x), _checked(x), _WORDS[x.element_size()]]


def _numbers(x: Tensor) -> list[Any]:
    """`x` as numbers that MPI can add."""
    return [_address(x), _checked(x), _NUMBERS[x.dtype]]


def _checked(x: Tensor) -> int:
    return _checked_count(x.numel())


def _checked_count(count: int) -> int:
    if count > _MOST:
        raise ValueError(f"a message of {count} elements is more than MPI counts ({_MOST}); cut it over more ranks")
    return count
