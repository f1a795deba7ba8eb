"""What the ranks on several hosts run: train a small GPT in fp64, and tell where each rank was and what came of it.

    train.py FOLDER [STEPS] [SCHEDULE]      degrees come from the environment, FOLDER is seen by all hosts
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch

import hybridpar as hp
from tests.models import gpt, mine, tokens

STEPS = 3
LR, EPS, DECAY = 1e-2, 1e-6, 0.1  # see tests/test_equality.py for eps


def main(folder: Path, steps: int = STEPS, schedule: str = "1f1b") -> None:
    """Writes FOLDER/place-R.json on each rank, and FOLDER/trained.pt on rank 0."""
    import horovod.torch as hvd

    torch.set_num_threads(1)
    mesh = hp.init()
    told = {
        "host": socket.gethostname(),
        "place": [mesh.place.data, mesh.place.pipeline, mesh.place.tensor],
        "local rank": int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or os.environ["SLURM_LOCALID"]),
        "horovod": [hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()],
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    (folder / f"place-{mesh.rank}.json").write_text(json.dumps(told))
    model = hp.parallelize(gpt(), mesh, hp.CrossEntropy(), schedule=schedule)
    stepper = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=DECAY)
    optimizer = hp.DistributedOptimizer(stepper, model)
    losses = []
    for step in range(steps):
        losses.append(model.train_step(tuple(mine(x, mesh.data) for x in tokens(step % STEPS)), microbatches=4))
        optimizer.step()
        optimizer.zero_grad()
        if mesh.rank == 0:
            print(f"step {step}", flush=True)
    state = model.full_state_dict()
    if mesh.rank == 0:
        torch.save({"losses": losses, "state": state}, folder / "trained.pt")
    mesh.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]), *sys.argv[3:4])
