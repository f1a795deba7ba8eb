"""torch.distributed as a carrier of the tensor and pipeline axes: NCCL between GPUs, and gloo to test the same code.

NCCL knows no tags, and a send waits on the GPU for its receive. So each direction between two ranks has a communicator
of its own (else 1F1B would deadlock: each side's send queued before its receive), and `ordered` tells the mailbox that
messages come in the order of sending. Small Python values and sizes go over MPI.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridpar.launch.interfaces import interfaces
from hybridpar.mesh import Mesh
from hybridpar.shard import balanced
from hybridpar.wires.address import Place, connected
from hybridpar.wires.axis import Axis, Handle
from hybridpar.wires.boot import gloo_interface

_OPS = {"sum": dist.ReduceOp.SUM, "average": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_WIDER = {torch.int16: torch.int32, torch.bool: torch.int32}  # neither carrier adds these
_CONNECT_SECONDS = 20.0


class TorchHandle:
    """A torch.distributed work under way; keeps its tensor alive."""

    def __init__(self, work: dist.Work, x: Tensor, finish: Callable[[], Tensor] | None = None) -> None:
        self._work, self._x, self._finish = work, x, finish

    def wait(self) -> Tensor:
        self._work.wait()
        if self._finish is not None:
            self._x, self._finish = self._finish(), None
        return self._x

    def done(self) -> bool:
        return self._work.is_completed()


class TorchAxis(Axis):
    """The ranks of one process group; `up` and `down` carry messages to higher and to lower indices."""

    def __init__(self, control: Axis, all_: dist.ProcessGroup, up: dist.ProcessGroup, down: dist.ProcessGroup) -> None:
        self.name, self.index, self.size, self.ranks = control.name, control.index, control.size, control.ranks
        self._control, self._all, self._up, self._down = control, all_, up, down

    @property
    def notes(self) -> Axis:
        return self._control

    @property
    def ordered(self) -> bool:
        return True

    def start_allreduce(self, x: Tensor, op: str = "sum", name: str | None = None) -> Handle:
        wide = x.to(_WIDER.get(x.dtype, x.dtype))
        work = dist.all_reduce(wide, _OPS[op], group=self._all, async_op=True)
        return TorchHandle(work, x, lambda: self._finish(x, wide, op))

    def allgather(self, x: Tensor, dim: int = 0) -> Tensor:
        lengths = self._control.objects(x.shape[dim])
        most = max(lengths)
        # Both carriers want equal shapes: shorter pieces are padded, and cut again after the journey.
        mine = x.detach().movedim(dim, 0).contiguous()
        padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])]) if len(mine) < most else mine
        all_ = padded.new_empty(self.size, *padded.shape)
        dist.all_gather([_words(place) for place in all_], _words(padded), group=self._all)
        return torch.cat([place[:n] for place, n in zip(all_, lengths)]).movedim(0, dim).contiguous()

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        moved = x.detach().movedim(dim, 0)
        pieces = [moved[a:b] for a, b in balanced(len(moved), self.size)]
        most = len(pieces[0])
        padded = moved.new_zeros(self.size, most, *moved.shape[1:], dtype=_WIDER.get(x.dtype, x.dtype))
        for place, piece in zip(padded, pieces):
            place[: len(piece)] = piece
        got = torch.empty_like(padded[0])
        dist.reduce_scatter(got, list(padded), group=self._all)
        return got[: len(pieces[self.index])].to(x.dtype).movedim(0, dim).contiguous()

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        counts = [len(p) for p in pieces]
        coming = [row[self.index] for row in self._control.objects(counts)]
        sent = torch.cat([p.detach() for p in pieces])
        got = sent.new_empty(sum(coming), *sent.shape[1:])
        row = sent.shape[1:].numel() * sent.element_size()  # in words
        there, here = [n * row for n in coming], [n * row for n in counts]
        dist.all_to_all_single(_words(got), _words(sent), there, here, group=self._all)
        return list(got.split(coming))

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        dist.broadcast(_words(x), self.ranks[source], group=self._all)
        return x

    def send(self, x: Tensor, to: int, tag: int) -> Handle:
        sent = x.detach()
        group = self._up if to > self.index else self._down
        return TorchHandle(dist.isend(_words(sent), self.ranks[to], group=group), sent)

    def recv(self, x: Tensor, source: int, tag: int) -> Handle:
        group = self._up if source < self.index else self._down
        return TorchHandle(dist.irecv(_words(x), self.ranks[source], group=group), x)

    def objects(self, value: Any) -> list[Any]:
        return self._control.objects(value)

    def barrier(self) -> None:
        self._control.barrier()

    def _finish(self, x: Tensor, wide: Tensor, op: str) -> Tensor:
        if op == "average":
            wide.div_(self.size)
        return x if wide is x else x.copy_(wide)


def _words(x: Tensor) -> Tensor:
    """The bytes of `x` (contiguous), whatever its dtype: carriers know some dtypes only. They share memory."""
    return x.detach().view(-1).view(torch.uint8)


def torch_axes(
    backend: str, mesh: Mesh, everyone: Axis, axes: Mapping[str, Axis], device: torch.device
) -> tuple[dict[str, Axis], Callable[[], None]]:
    """The given axes over torch.distributed instead, and what closes them; `axes` stay as their control.

    Raises ValueError for a backend that cannot be.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"carrier {backend!r} is unknown: use mpi, nccl or gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ValueError("carrier nccl needs GPUs, and torch sees none on this host: use mpi")
    store, interface = _meet(everyone)
    with gloo_interface(interface):
        return _made(backend, mesh, everyone, axes, store), dist.destroy_process_group


def _meet(everyone: Axis) -> tuple[dist.TCPStore, str | None]:
    """The store of rank 0, and the interface that leads to it from here; None where all ranks are on one host."""
    store = dist.TCPStore("127.0.0.1", 0, everyone.size, True, wait_for_workers=False) if everyone.index == 0 else None
    first = everyone.objects(Place.here(store.port if store is not None else 0))[0]
    with connected(first, b"", _CONNECT_SECONDS) as tried:
        way, (address, port) = tried.getsockname()[0], tried.getpeername()[:2]
    ways = everyone.objects(address)
    store = store or dist.TCPStore(address, port, everyone.size, False)
    away = [other for other in ways if other != "127.0.0.1"]  # addresses of rank 0's host, as other hosts know it
    names = {str(ipaddress.ip_interface(known).ip): name for known, name in interfaces().items()}
    return store, names.get(way) or names[away[0]] if away else None


def _made(backend: str, mesh: Mesh, everyone: Axis, axes: Mapping[str, Axis], store: dist.TCPStore) -> dict[str, Axis]:
    dist.init_process_group(backend, store=store, rank=everyone.index, world_size=everyone.size)
    made: dict[str, Axis] = {}
    for name, control in axes.items():
        # torch wants every rank to make every group, in one order.
        for group in sorted({mesh.group(name, rank) for rank in range(mesh.size)}):
            if len(group) == 1:
                continue
            all_, up, down = (dist.new_group(list(group), backend=backend) for _ in range(3))
            if control.ranks == group:
                made[name] = TorchAxis(control, all_, up, down)
        made.setdefault(name, control)
    return made
