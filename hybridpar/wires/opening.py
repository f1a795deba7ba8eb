"""Open a world: split MPI's communicators for every axis, start Horovod on the data axis, choose the GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from mpi4py import MPI

from hybridpar.mesh import Mesh
from hybridpar.wires.axis import Alone, Axis
from hybridpar.wires.boot import idle_horovod
from hybridpar.wires.mpi import MpiAxis
from hybridpar.wires.world import World

if TYPE_CHECKING:
    from types import ModuleType


def open_world(
    comm: MPI.Intracomm,
    mesh: Mesh,
    seed: int = 0,
    carrier: str = "mpi",
    synchronous: bool = False,
    sync: str | None = None,
    columns: int | None = None,
) -> World:
    """Lay the ranks of `comm` out as `mesh` and connect them.

    `carrier` of the tensor and pipeline axes: "mpi", "gloo", "nccl". `synchronous` sends wait for their receiver.
    `sync` is the policy of the data axis that optimizers will follow, if the command line has one. `columns` are those
    of the terminal that shows what ranks print, if it is one.
    """
    from hybridpar.wires import hvd

    hvd.check_built()
    closing: list[Callable[[], None]] = []

    def connect(name: str, group: tuple[int, ...]) -> tuple[Axis, MPI.Intracomm]:
        # Every rank splits for every axis, in one order; the colour is the group's first rank.
        part = comm.Split(group[0], comm.rank)
        if len(group) == 1:
            closing.append(part.Free)
            return Alone(name, comm.rank), part
        axis = MpiAxis(part, name, group, synchronous)
        closing.append(axis.free)
        return axis, part

    everyone, _ = connect("everyone", tuple(range(mesh.size)))
    replica, _ = connect("replica", mesh.replica(comm.rank))
    peers, data_comm = connect("data", mesh.group("data", comm.rank))
    axes = {name: connect(name, mesh.group(name, comm.rank))[0] for name in ("pipeline", "tensor")}
    device = _device(comm)
    if carrier != "mpi":
        from hybridpar.wires.dist import torch_axes

        axes, close = torch_axes(carrier, mesh, everyone, axes, device)
        closing.append(close)
    start_horovod(data_comm)
    closing.append(lambda: stop_horovod(comm))
    data = Alone("data", comm.rank) if mesh.data == 1 else hvd.HorovodAxis("data", peers.ranks, peers)
    axes |= {"everyone": everyone, "replica": replica, "data": data, "peers": peers}
    return World(mesh, comm.rank, seed, device=device, sync=sync, columns=columns, _closing=closing, **axes)


def start_horovod(comm: MPI.Intracomm) -> None:
    """Start Horovod on the ranks of `comm`, which call it together."""
    horovod = _horovod()
    with idle_horovod() if comm.size == 1 else nullcontext():
        horovod.init(comm=comm)
    if horovod.size() != comm.size:
        raise RuntimeError(
            f"Horovod sees a world of {horovod.size()} where the data axis has {comm.size} ranks: it was built "
            "without MPI or for another one; run `python -m hybridpar.install --force`"
        )


def stop_horovod(comm: MPI.Intracomm) -> None:
    """Stop it; all ranks of the world, `comm`, together."""
    comm.Barrier()  # a rank that stops early would stop Horovod on the others in mid-use
    _horovod().shutdown()


def stop_earlier_horovod(comm: MPI.Intracomm) -> None:
    """Stop Horovod where it is running already; all ranks together."""
    started = sys.modules.get("horovod.torch")
    if started is not None and started.is_initialized():
        stop_horovod(comm)


def _horovod() -> ModuleType:
    import horovod.torch

    return horovod.torch


def _device(comm: MPI.Intracomm) -> torch.device:
    """The GPU of this rank, by its place among the world's ranks on this host, or the CPU where there is none.

    Horovod's local rank would not do: it counts within the data axis, so two ranks of a host may share it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    device = torch.device("cuda", node.rank % torch.cuda.device_count())
    node.Free()
    torch.cuda.set_device(device)
    return device
