"""What each rank of the installer's smoke test runs: one real allreduce over Horovod. Rank 0 prints a line of JSON."""

from __future__ import annotations

import json
import sys


def main() -> int:
    """Sum rank + 1 over the world and say what Horovod is built with; 1 where the sum is wrong."""
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    hvd.init()
    total = hvd.allreduce(torch.full((1000,), hvd.rank() + 1.0), name="smoke", op=hvd.Sum)
    right = sum(range(1, hvd.size() + 1))
    told = {
        "size": hvd.size(),
        "right": bool((total == right).all()),
        "mpi": bool(hvd.mpi_built()),
        "gloo": bool(hvd.gloo_built()),
        "nccl": bool(hvd.nccl_built()),
    }
    if hvd.rank() == 0:
        print("smoke " + json.dumps(told), flush=True)
    hvd.barrier()
    return 0 if told["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
