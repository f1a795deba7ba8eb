"""What the ranks on two hosts with a slow link between them run: steps of 50 ms each under several sync policies.

slow.py POLICY...       prints {"sync": ..., "seconds": ..., "lags": ..., "bytes": ...} for each, from rank 0
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn

import hybridpar as hp

STEPS, SECONDS, WIDTH = 16, 0.05, 384


def main(*policies: str) -> None:
    """Each policy makes two steps to begin with, which are not counted."""
    torch.set_num_threads(1)
    mesh = hp.init()
    x = torch.ones(2, WIDTH)
    for policy in policies:
        torch.manual_seed(0)
        model = hp.parallelize(nn.Linear(WIDTH, WIDTH, bias=False), mesh, nn.MSELoss())
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sync=policy)
        for step in range(2 + STEPS):
            if step == 2:
                mesh.everyone.barrier()
                began = time.perf_counter()
            time.sleep(SECONDS)  # in the place of a large model's arithmetic
            model.train_step((x, x))
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
        optimizer.meet()
        if mesh.rank == 0:
            lags = getattr(optimizer.policy, "lags", {})
            told = {"sync": policy, "seconds": seconds, "lags": list(lags), "bytes": 4 * WIDTH**2}
            print(json.dumps(told), flush=True)
    mesh.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
