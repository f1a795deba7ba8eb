"""`python -m benchmarks.checkpoint`: saving and loading beside torch.distributed.checkpoint (DCP), on the same shards.

    save, load   seconds of the slowest rank, in turns within one job: hybridpar, DCP, hybridpar, ...; both sync files
    stall        what one asynchronous save costs the training: the call, and how much longer the steps are until the
                 checkpoint is on the disk

The state is a GPT with AdamW after its first steps. DCP gets each shard as a DTensor, which lies as ours do (Shard over
the tensor axis, Replicate over the data axis), so both write the same bytes from the same ranks. Files are read from
the page cache; hybridpar also verifies all checksums when it loads, which DCP has none of.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, environment
from hybridpar.install import mpi

MESHES = {"tensor 2": (1, 2), "data 2": (2, 1), "data 2 x tensor 2": (2, 2)}  # data, tensor
SECONDS = 900


@click.command(help=__doc__.splitlines()[0])
@click.option("--width", default=512, show_default=True, help="Of the GPT; its depth is 6.")
@click.option("--rounds", default=5, show_default=True, help="Saves and loads of each side.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; the temporary folder if left out.")
@click.option("--json", "to_json", type=click.Path(path_type=Path), help="Write the figures there.")
@click.option("--rank", default="", hidden=True)
def main(width: int, rounds: int, folder: Path | None, to_json: Path | None, rank: str) -> None:
    if rank:
        data, tensor = map(int, rank.split(","))
        told = Sides(data, tensor, width, Path(str(folder))).measured(rounds)
        if told is not None:
            print(json.dumps(told))
        return
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        found = {name: _launch(mesh, width, rounds, Path(inside) / name) for name, mesh in MESHES.items()}
    for table in (_bandwidth(found), _stalls(found)):
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    if to_json:
        to_json.write_text(json.dumps({"machine": describe(), "meshes": found}, indent=2) + "\n")


def _launch(mesh: tuple[int, int], width: int, rounds: int, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--rank", f"{mesh[0]},{mesh[1]}", "--width", str(width)]
    command += ["--rounds", str(rounds), "--folder", str(folder)]
    ready = {**mpi.settings(os.environ, *environment()), "OMP_NUM_THREADS": "1"}
    line = mpi.mpirun(mesh[0] * mesh[1], command)
    done = subprocess.run(line, env=ready, capture_output=True, text=True, timeout=SECONDS, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not told:
        raise RuntimeError(f"{mesh}: {done.stderr[-2000:]}")
    return told[0]


class Sides:
    """One rank with the same state for both."""

    def __init__(self, data: int, tensor: int, width: int, folder: Path) -> None:
        import torch
        from torch import distributed

        import hybridpar as hp
        from hybridpar.models.gpt import GPT

        torch.set_num_threads(1)
        self.folder, self.mesh = folder, hp.init(data=data, tensor=tensor)
        meeting = f"file://{folder / 'meeting'}"
        distributed.init_process_group("gloo", meeting, rank=self.mesh.rank, world_size=self.mesh.mesh.size)
        self.model = hp.parallelize(
            GPT(vocabulary=8192, width=width, depth=6, heads=8, context=64, tied=False), self.mesh, hp.CrossEntropy()
        )
        adam = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.optimizer = hp.DistributedOptimizer(adam, self.model)
        self.text = torch.randint(8192, (4, 65), generator=torch.Generator().manual_seed(self.mesh.place.data))
        self.step()
        self.count = 0

    def step(self) -> None:
        self.model.train_step((self.text[:, :-1], self.text[:, 1:]), microbatches=2)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """What DCP is given: the same tensors, as DTensors."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape, specs = (self.mesh.data.size, self.mesh.tensor.size), self.model.specs()
        device = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        found = {}
        for name, p in self.model.named_parameters():
            dim = specs[name].dim
            place = [Replicate(), Replicate() if dim is None else Shard(dim)]
            several = {"weight": p.detach(), **self.optimizer.inner.state[p]}
            for key, x in several.items():
                whole = x.dim() == 0
                found[f"{name}/{key}"] = x if whole else DTensor.from_local(x, device, place, run_check=False)
        return found

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of the slowest rank."""
        import torch

        self.mesh.everyone.barrier()
        began = time.perf_counter()
        work()
        took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        return self.mesh.everyone.allreduce(took, "max").item()

    def cleared(self) -> Path:
        """A new place to write to; the one before is removed, outside of the clock."""
        self.mesh.everyone.barrier()
        if self.mesh.rank == 0:
            for path in self.folder.glob("c*"):
                shutil.rmtree(path)
            os.sync()
        self.mesh.everyone.barrier()
        self.count += 1
        return self.folder / f"c{self.count}"

    def measured(self, rounds: int) -> dict[str, Any] | None:
        """The figures, on the first rank."""
        from torch.distributed import checkpoint as dcp

        import hybridpar as hp

        parts, state, found = (self.model, self.optimizer), self.state(), {}
        for turn in range(rounds + 1):  # the first warms up
            path, times = self.cleared(), {}
            times["save"] = self.seconds(partial(hp.save, path, *parts))
            times["load"] = self.seconds(partial(hp.load, path, *parts))
            times["load without verifying"] = self.seconds(partial(hp.load, path, *parts, verify=False))
            size = sum(file.stat().st_size for file in path.iterdir())
            path = self.cleared()
            times["DCP save"] = self.seconds(partial(dcp.save, state, checkpoint_id=path))
            times["DCP load"] = self.seconds(partial(dcp.load, state, checkpoint_id=path))
            for name, took in times.items() if turn else ():
                found.setdefault(name, []).append(took)
        stalls = {
            "hybridpar": [self.stall(lambda p: hp.save(p, *parts, asynchronous=True).wait) for _ in range(rounds)],
            "DCP": [self.stall(lambda p: dcp.async_save(state, checkpoint_id=p).result) for _ in range(rounds)],
        }
        bandwidth = {name: [size / took / 1e6 for took in times] for name, times in found.items()}
        told = {"megabytes": size / 1e6, "megabytes per second": bandwidth, "stalls": stalls}
        return told if self.mesh.rank == 0 else None

    def stall(self, begin: Callable[[Path], Callable[[], Any]]) -> dict[str, float]:
        """Seconds of a step, of the call, and of what the steps after it took longer, together."""
        path, waits = self.cleared(), []
        step = median(self.seconds(self.step) for _ in range(5))
        call = self.seconds(lambda: waits.append(begin(path)))
        after = [self.seconds(self.step) for _ in range(8)]
        rest = self.seconds(waits[0])
        return {"step": step, "call": call, "slower": sum(max(0.0, took - step) for took in after), "left": rest}


def _bandwidth(found: dict[str, Any]) -> Table:
    names = ("save", "DCP save", "load", "load without verifying", "DCP load")
    rows = []
    for mesh, told in found.items():
        speed = told["megabytes per second"]
        rows.append((mesh, f"{told['megabytes']:,.0f}", *(f"{median(speed[name]):,.0f}" for name in names)))
    return _table("MB/s, median", ("mesh", "MB", *names), rows)


def _stalls(found: dict[str, Any]) -> Table:
    rows = []
    for mesh, told in found.items():
        for side, several in told["stalls"].items():
            ms = [f"{median(one[key] for one in several) * 1e3:,.0f}" for key in ("step", "call", "slower")]
            rows.append((mesh, side, *ms))
    return _table("an asynchronous save, ms", ("mesh", "", "a step", "the call", "all steps after it, slower by"), rows)


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column in ("mesh", "") else "right")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
