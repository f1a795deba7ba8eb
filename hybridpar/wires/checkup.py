"""What each rank of `hybridpar doctor`'s own job runs. Rank 0 prints one line of JSON.

ring        rank -> rank + 1, all at once: seconds per message of 8 bytes, bytes per second at 16 MiB
ranks       host, cores it may run on, GPU, threads of torch
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

SMALL, LARGE = 8, 16 * 2**20  # bytes
ROOM = 512  # bytes for what one rank tells of itself


def main() -> int:
    """Look, and print `checkup {...}`; what cannot be is told as {"error": sentence} with exit code 1."""
    from hybridpar.wires.boot import start_mpi

    try:
        told = look(start_mpi())
    except (RuntimeError, ImportError) as error:
        print("checkup " + json.dumps({"error": " ".join(str(error).split())}), flush=True)
        return 1
    if told is not None:
        print("checkup " + json.dumps(told), flush=True)
    return 0


def look(comm: MPI.Intracomm) -> dict[str, Any] | None:
    """All there is to know about this job, on rank 0; None on the others."""
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    hvd.init()
    total = hvd.allreduce(torch.ones(1000), name="checkup", op=hvd.Sum)
    facts = {
        "library": MPI.Get_library_version().split(",")[0],
        "threads": {v: k for k, v in _levels(MPI).items()}[MPI.Query_thread()],
        "world": comm.size,
        "horovod": {
            "size": hvd.size(),
            "sum": float(total[0]),
            "mpi": bool(hvd.mpi_built()),
            "gloo": bool(hvd.gloo_built()),
            "nccl": bool(hvd.nccl_built()),
            "cuda": bool(hvd.cuda_built()),
        },
        "seconds": ring(comm, SMALL, 100),
        "bytes_per_second": LARGE / ring(comm, LARGE, 2),
        "cuda_aware": _cuda_aware(),
        "ranks": _tell(comm),
    }
    hvd.shutdown()
    return facts if comm.rank == 0 else None


def ring(comm: MPI.Intracomm, size: int, times: int) -> float:
    """Seconds that one message of `size` bytes to the next rank takes, all ranks sending at once.

    The best of 5 rounds of `times` messages: the others tell more of what else the machine does.
    """
    out, into = bytearray(size), bytearray(size)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    comm.Sendrecv(out, right, 0, into, left, 0)  # the first message opens the connection
    seconds = []
    for _ in range(5):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(times):
            comm.Sendrecv(out, right, 0, into, left, 0)
        seconds.append((time.perf_counter() - start) / times)
    return min(seconds)


def _tell(comm: MPI.Intracomm) -> list[dict[str, Any]]:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    mine = {"host": socket.gethostname()[:100], "cores": sorted(os.sched_getaffinity(0))[:64], "gpu": gpu}
    text = json.dumps(mine, separators=(",", ":")).encode()[:ROOM].ljust(ROOM)
    everyone = bytearray(ROOM * comm.size)
    comm.Allgather(text, everyone)
    return [json.loads(everyone[i : i + ROOM].decode()) for i in range(0, len(everyone), ROOM)]


def _cuda_aware() -> bool:
    from hybridpar.wires.mpi import cuda_aware

    return cuda_aware()


def _levels(module: Any) -> dict[str, int]:
    return {name: getattr(module, f"THREAD_{name}") for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}


if __name__ == "__main__":
    sys.exit(main())
