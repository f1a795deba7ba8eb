"""`python -m benchmarks.zero`: the memory of a rank by stage of ZeRO, beside what is predicted.

    peak of a rank = VmHWM after three steps of AdamW - VmRSS after three steps of a tiny model
    predicted      = weights + gradients + AdamW's two moments, of which each stage cuts some by the data degree D,
                     and buckets of 4 MiB that are under way

        zero   weights   gradients                                   moments     buckets
        0      W         W of microbatches + W to be averaged        2 W         0
        1      W         W of microbatches, and the averages after   2 W / D     6
        2      W         W / D                                       2 W / D     6
        3      W / D     W / D                                       2 W / D     6, and 3 of weights

Four microbatches; W are the bytes of this rank's weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.machine import environment
from hybridpar.install import mpi

MESHES = {"data 2": (2, 1, 1), "data 4": (4, 1, 1), "data 2 x tensor 2": (2, 1, 2), "data 2 x pipeline 2": (2, 2, 1)}
BUCKETS, GATHERED = 6 * (4 << 20), 3 * (4 << 20)
SECONDS = 300
# What is freed is given back, or peaks would be of the allocator; Horovod's own buffer, 128 MiB at most, is left out.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "HOROVOD_FUSION_THRESHOLD": "0"}


@click.command(help=__doc__.splitlines()[0])
@click.option("--only", default="", help="A mesh, such as 'data 4'.")
@click.option("--rank", default="", hidden=True)
def main(only: str, rank: str) -> None:
    if rank:
        _measure(*map(int, rank.split(",")))
        return
    table = Table("mesh", "zero", "weights", "predicted", "measured", title="MB of the largest rank")
    for name, degrees in MESHES.items():
        for zero in (0, 1, 2, 3):
            if only in ("", name):
                told = _launch(degrees, zero)
                table.add_row(name, str(zero), *(f"{told[key]:.0f}" for key in ("weights", "predicted", "measured")))
    Console().print(table)


def predicted(weights: float, zero: int, data: int) -> float:
    """Bytes of one rank that holds `weights` bytes of the model.

    Example:
        >>> predicted(100e6, 0, 4) / 1e6
        500.0
    """
    if zero == 0:
        return 5 * weights
    if zero == 3:
        return weights * 4 / data + BUCKETS + GATHERED
    return weights * (2 + 2 / data if zero == 1 else 1 + 3 / data) + BUCKETS


def _launch(degrees: tuple[int, int, int], zero: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.zero", "--rank", ",".join(map(str, (*degrees, zero)))]
    ready = {**mpi.settings(os.environ, *environment()), "OMP_NUM_THREADS": "1", **MEMORY}
    size = degrees[0] * degrees[1] * degrees[2]
    done = subprocess.run(
        mpi.mpirun(size, command), env=ready, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def _measure(data: int, pipeline: int, tensor: int, zero: int) -> None:
    """One rank: the tiny model, then the big one."""
    from pathlib import Path

    import torch

    import hybridpar as hp
    from benchmarks.memory import _status

    torch.set_num_threads(1)
    mesh = hp.init(tensor, pipeline, data, keep_memory=False)
    _train(mesh, zero, 8)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    weights = _train(mesh, zero, 1024)
    told = mesh.everyone.objects((_status("VmHWM") - before, weights))
    if mesh.rank == 0:
        most = max(weights for _, weights in told)
        shown = {"weights": most, "predicted": predicted(most, zero, data), "measured": max(p for p, _ in told) * 1024}
        print(json.dumps({key: value / 1e6 for key, value in shown.items()}))
    mesh.close()


def _train(mesh: Any, zero: int, width: int) -> int:
    """Bytes of this rank's weights."""
    import torch
    from torch import nn

    import hybridpar as hp

    plan = {f"{i}": "row" if i % 2 else "column" for i in range(24)}
    # No name for the module: it would keep the layers of the other stages, which this rank then has for nothing.
    made = (nn.Linear(width, width, bias=False) for _ in range(24))
    model = hp.parallelize(nn.Sequential(*made), mesh, nn.MSELoss(), plan=plan)
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), foreach=False), model, zero=zero)
    x = torch.ones(8, width)
    for _ in range(3):
        model.train_step((x, x), microbatches=4)
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() * p.element_size() for p in model.parameters())


if __name__ == "__main__":
    main()
