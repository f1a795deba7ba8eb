"""`hp.init`: from a launched process to a `World`.

The only place that reads what `hybridpar run` (launch/) and the user wrote into the environment:

    HYBRIDPAR_TENSOR, HYBRIDPAR_PIPELINE, HYBRIDPAR_DATA    degrees; they overrule the script's
    HYBRIDPAR_CARRIER                                       mpi, gloo or nccl, for the tensor and pipeline axes
    HYBRIDPAR_SYNC                                          the sync policy of the data axis; overrules the script's
    HYBRIDPAR_COLUMNS                                       those of the terminal that shows what the ranks print
    HYBRIDPAR_SYNCHRONOUS_SENDS                             1: sends wait for their receiver (tests)
    HYBRIDPAR_SILENT_SECONDS                                without a sign of life a rank ends the job; 0: never
    HYBRIDPAR_LINK_SECONDS                                  so long the network may be away
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

    from hybridpar.wires.world import World


def init(
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    *,
    seed: int = 0,
    carrier: str | None = None,
    comm: MPI.Intracomm | None = None,
    keep_memory: bool = True,
) -> World:
    """Start MPI and Horovod and lay the ranks out as data x pipeline x tensor.

    `tensor` and `pipeline` default to 1 and `data` to the rest of the ranks; `hybridpar run --tensor 2 ...` overrules
    them. `seed` seeds torch and everything random in hybridpar, alike on all ranks. `carrier` of the tensor and
    pipeline axes is "mpi" (the default), "nccl" (GPUs) or "gloo". `comm` takes the place of MPI's world.
    `keep_memory` lets the process keep freed memory for the next step (wires/memory.py): faster on CPUs.

    Afterwards `hvd.rank()` and `hvd.size()` are the replica and the number of replicas.

    Raises ValueError where the degrees do not fit the number of ranks or ranks disagree, RuntimeError where MPI or
    Horovod are not as they must be.

    Example:
        >>> mesh = hp.init(tensor=2)                    # doctest: +SKIP
        >>> print(mesh.mesh)                            # doctest: +SKIP
        data=2 x pipeline=1 x tensor=2
    """
    from hybridpar.wires.ending import Ending

    ending = Ending.installed()
    try:
        import torch
    except ImportError as error:
        raise RuntimeError("PyTorch is not installed: `pip install torch`") from error
    from hybridpar.wires.boot import start_mpi
    from hybridpar.wires.memory import keep_freed_memory

    refuse = sys.modules.get("horovod.torch")
    if refuse is not None and refuse.is_initialized() and "mpi4py.MPI" not in sys.modules:
        raise ValueError(
            "hvd.init() was called before hp.init(): remove it, hp.init() starts Horovod on the data axis"
        )
    if keep_memory:
        keep_freed_memory()
    world = start_mpi()
    ending.join(world)
    from hybridpar.mesh import Mesh
    from hybridpar.optim.sync.wish import parse
    from hybridpar.wires.mpi import MpiAxis
    from hybridpar.wires.opening import open_world, stop_earlier_horovod
    from hybridpar.wires.watchdog import LINK_SECONDS, SILENT_SECONDS

    comm = comm if comm is not None else world
    degrees = {
        "data": _told("HYBRIDPAR_DATA", data),
        "pipeline": _told("HYBRIDPAR_PIPELINE", pipeline),
        "tensor": _told("HYBRIDPAR_TENSOR", tensor),
    }
    _agree(MpiAxis(comm, "everyone").objects({**degrees, "seed": seed, "torch": torch.__version__, **_script()}))
    sync = os.environ.get("HYBRIDPAR_SYNC") or None
    parse(sync or "allreduce")  # a wish that cannot be read is told before anything starts
    mesh = Mesh.fit(comm.size, **degrees)
    patience = (_seconds("HYBRIDPAR_SILENT_SECONDS", SILENT_SECONDS), _seconds("HYBRIDPAR_LINK_SECONDS", LINK_SECONDS))
    stop_earlier_horovod(comm)
    torch.manual_seed(seed)
    carrier = os.environ.get("HYBRIDPAR_CARRIER") or carrier or "mpi"
    waiting = os.environ.get("HYBRIDPAR_SYNCHRONOUS_SENDS") == "1"
    opened = open_world(comm, mesh, seed, carrier, waiting, sync, _told("HYBRIDPAR_COLUMNS", None))
    atexit.register(opened.leave)  # after the ending has waited for all ranks: exit functions run last in, first out
    ending.watch(comm, opened.data.ranks, *patience)
    atexit.register(opened.rest)
    return opened


def _told(name: str, given: int | None) -> int | None:
    told = os.environ.get(name, "")
    if told and not told.isdigit():
        raise ValueError(f"{name}={told!r} is not a whole number")
    return int(told) if told else given


def _seconds(name: str, usual: float) -> float:
    told = os.environ.get(name, "")
    if told and not told.replace(".", "", 1).isdigit():
        raise ValueError(f"{name}={told!r} is not a number of seconds")
    return float(told) if told else usual


def _script() -> dict[str, str]:
    """What this process runs, by content: hosts with different copies of a script is a mistake made often."""
    path = sys.argv[0] if sys.argv and os.path.isfile(sys.argv[0]) else None
    if path is None:
        return {}
    with open(path, "rb") as file:
        return {"script": os.path.basename(path), "its content": hashlib.sha256(file.read()).hexdigest()[:12]}


def _agree(told: Sequence[dict[str, object]]) -> None:
    """Raise where ranks were not asked for the same."""
    for rank, other in enumerate(told):
        for key, value in told[0].items():
            if other.get(key) != value:
                raise ValueError(
                    f"rank {rank} was started with {key}={other.get(key)} and rank 0 with {key}={value}: "
                    "start all ranks with the same script and the same settings"
                )
