"""`python -m benchmarks.memory`: the memory of a rank, by family and mesh, for models that are built on no rank whole.

    peak of a rank = VmHWM after three steps of AdamW - VmRSS after three steps of a tiny model of the same family

The tiny model goes first so that libraries, kernels and MPI's buffers are in the second number as well. VmHWM is set
back in between (proc(5), clear_refs). A mesh's figure is that of its largest rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, environment
from hybridpar.install import mpi

MESHES = {"1": (1, 1), "tensor 2": (2, 1), "pipeline 2": (1, 2), "2 x 2": (2, 2)}  # tensor, pipeline
SECONDS = 400


@click.command(help=__doc__.splitlines()[0])
@click.option("--only", default="", help="Families, with commas between.")
@click.option("--json", "to_json", type=click.Path(path_type=Path), help="Write the figures there.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them there (SVG or PNG; needs matplotlib).")
@click.option("--rank", default="", hidden=True)
def main(only: str, to_json: Path | None, plot: Path | None, rank: str) -> None:
    if rank:
        family, tensor, pipeline = rank.split(",")
        _measure(family, int(tensor), int(pipeline))
        return
    from benchmarks.families import FAMILIES

    wanted = only.split(",") if only else [name for name, family in FAMILIES.items() if family.available]
    found = {"machine": describe(), "families": {name: _family(name) for name in wanted}}
    Console().print(_table(found["families"]))
    if to_json:
        to_json.write_text(json.dumps(found, indent=2) + "\n")
    if plot:
        _draw(found["families"], plot)


def _family(name: str) -> dict[str, Any]:
    """{mesh: the largest rank's figures, or why there are none}"""
    return {mesh: _launch(name, *degrees) for mesh, degrees in MESHES.items()}


def _launch(name: str, tensor: int, pipeline: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--rank", f"{name},{tensor},{pipeline}"]
    ready = {**mpi.settings(os.environ, *environment()), "OMP_NUM_THREADS": "1"}
    line = mpi.mpirun(tensor * pipeline, command)
    try:
        done = subprocess.run(line, env=ready, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"refused": f"not done after {SECONDS} s"}
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not told:
        return {"refused": next((line for line in done.stderr.splitlines() if "Error: " in line), done.stderr[-300:])}
    return told[0]


def _measure(name: str, tensor: int, pipeline: int) -> None:
    """One rank: the tiny model, then the big one."""
    import torch

    import hybridpar as hp
    from benchmarks.families import FAMILIES

    torch.set_num_threads(1)
    mesh, family = hp.init(tensor=tensor, pipeline=pipeline, keep_memory=False), FAMILIES[name]
    _train(family, mesh, small=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    parameters, held = _train(family, mesh, small=False)
    told = mesh.everyone.objects((_status("VmHWM") - before, held))
    if mesh.rank == 0:
        peaks = [round(peak / 1024, 1) for peak, _ in told]
        shards = [round(16 * count / 2**20, 1) for _, count in told]  # weights, gradients, AdamW's two moments
        print(json.dumps({"parameters": parameters, "peak_mb": max(peaks), "ranks_mb": peaks, "state_mb": max(shards)}))
    mesh.close()


def _train(family: Any, mesh: Any, small: bool) -> tuple[int, int]:
    """(parameters of the whole model, parameters of this rank)"""
    import torch

    import hybridpar as hp

    with torch.device("meta"):
        module = family.build(small)
    count = sum(p.numel() for p in module.parameters())
    inputs, targets = family.batch()
    watched = inputs if mesh.pipeline.size > 1 and not hasattr(module, "chain") else None
    model = hp.parallelize(module, mesh, family.loss(), weights=1, example=watched)
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    for _ in range(3):
        model.train_step((inputs, targets), microbatches=4)
        optimizer.step()
        optimizer.zero_grad()
    return count, sum(p.numel() for p in model.parameters())


def _status(field: str) -> int:
    """KiB, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _table(families: dict[str, Any]) -> Table:
    table = Table("", "parameters", *MESHES, title="MB of the largest rank, beside what an idle one has")
    for name, meshes in families.items():
        count = next((f"{f['parameters'] / 1e6:.1f} M" for f in meshes.values() if "parameters" in f), "")
        table.add_row(name, count, *(f"{f['peak_mb']:.0f}" if "peak_mb" in f else "refused" for f in meshes.values()))
    for name, meshes in families.items():
        for mesh, figures in meshes.items():
            if "refused" in figures:
                table.caption = "\n".join(filter(None, [table.caption, f"{name}, {mesh}: {figures['refused']}"]))
    return table


def _draw(families: dict[str, Any], path: Path) -> None:
    """Bars of the peaks; a dash of what weights, gradients and moments alone take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    width = 0.8 / len(MESHES)
    for i, mesh in enumerate(MESHES):
        known = [(x, meshes[mesh]) for x, meshes in enumerate(families.values()) if "peak_mb" in meshes[mesh]]
        places = [x + (i - (len(MESHES) - 1) / 2) * width for x, _ in known]
        axes.bar(places, [figures["peak_mb"] for _, figures in known], width * 0.9, label=mesh)
        for place, (_, figures) in zip(places, known):
            axes.hlines(figures["state_mb"], place - width * 0.45, place + width * 0.45, colors="black")
    axes.set_xticks(range(len(families)), families)
    axes.set_ylabel("MB of the largest rank")
    axes.legend(title="mesh (line: weights, gradients, AdamW)", ncols=4, fontsize="small", title_fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
