"""`python -m benchmarks.policies`: what sync policies learn from the same text, and what they send for it.

    loss       of the text held back, after the same tokens for all; replicas have met before
    megabytes  that a rank hands to the data axis
    wire       seconds that these take at 100 Mbit/s: computed, not measured
    seconds    of the training when each replica pauses now and then, by turns: measured

The model is the GPT of examples/gpt.py, small; the text is Python's standard library. Each policy trains it from the
same weights on the same batches, with the same AdamW. The plot shows the loss on the way, each replica with its own
weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, environment
from hybridpar.install import mpi

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
POLICIES = (
    "allreduce", "local_sgd(8)", "diloco(8)", "diloco(8, delay=4)", "diloco(8, inside=2)", "easgd(4)", "async_ps(2)",
)  # fmt: skip
WIRE = 100e6 / 8  # bytes per second
MEGABYTES = 2.0  # of text
SECONDS = 1200


@click.command(help=__doc__.splitlines()[0])
@click.option("--steps", default=192, show_default=True, help="Of training; a multiple of 8.")
@click.option("--replicas", default=4, show_default=True)
@click.option("--folder", default=Path("runs/policies"), type=click.Path(path_type=Path), help="Of the tokens.")
@click.option("--json", "to_json", type=click.Path(path_type=Path), help="Write the figures there.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write the plot there.")
@click.option("--rank", default="", hidden=True)
def main(steps: int, replicas: int, folder: Path, to_json: Path | None, svg: Path | None, rank: str) -> None:
    if rank:
        told = trained(rank, steps, folder)
        if told is not None:
            print(json.dumps(told))
        return
    found = {name: _launch(name, steps, replicas, folder) for name in POLICIES}
    Console(width=None if sys.stdout.isatty() else 120).print(table(found))
    if to_json:
        told = {"machine": describe(), "steps": steps, "replicas": replicas, "policies": found}
        to_json.write_text(json.dumps(told, indent=2) + "\n")
    if svg:
        plot(found, svg)


def _launch(policy: str, steps: int, replicas: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.policies", "--rank", policy, "--steps", str(steps)]
    ready = {**mpi.settings(os.environ, *environment()), "OMP_NUM_THREADS": "1"}
    line = mpi.mpirun(replicas, [*command, "--folder", str(folder)])
    done = subprocess.run(line, env=ready, capture_output=True, text=True, timeout=SECONDS, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not told:
        raise RuntimeError(f"{policy}: {done.stderr[-2000:]}")
    return told[0]


def trained(policy: str, steps: int, folder: Path) -> dict[str, Any] | None:
    """The figures of one policy, on the first rank."""
    sys.path.insert(0, str(EXAMPLES))
    import torch
    from text import Windows, standard_library

    import hybridpar as hp
    from hybridpar.models.gpt import GPT

    torch.set_num_threads(1)
    mesh = hp.init()
    if mesh.rank == 0:
        standard_library(512, MEGABYTES, folder)  # one rank prepares the text for all
    mesh.everyone.barrier()
    text = standard_library(512, MEGABYTES, folder)
    model = hp.parallelize(
        GPT(vocabulary=512, width=48, depth=2, heads=2, context=32), mesh, hp.CrossEntropy()
    )
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, sync=policy, clip=1.0)
    later = Windows(text.validation, 32)
    held_back = [_batch(later, range(i, i + 64), mesh) for i in range(0, min(256, len(later) - 63), 64)]
    windows, curve, handed = Windows(text.train, 32), [], Handed(mesh, optimizer)

    def step(number: int) -> None:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(number))[:32].tolist()
        model.train_step(_batch(windows, order, mesh))
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            handed.watch()

    for number in range(steps):
        step(number)
        if (number + 1) % 16 == 0:
            curve.append((number + 1, sum(model.eval_step(one) for one in held_back) / len(held_back)))
    optimizer.meet()
    loss = sum(model.eval_step(one) for one in held_back) / len(held_back)
    megabytes = handed.bytes / 1e6 * steps / (steps - 1)  # the first step was not watched
    seconds = _with_pauses(mesh, step, steps)
    optimizer.meet()
    told = {"loss": loss, "megabytes": megabytes, "seconds": seconds, "curve": curve}
    return told if mesh.rank == 0 else None


def _with_pauses(mesh: Any, step: Any, first: int) -> float:
    """Seconds of 32 steps, of the slowest replica; in each step one of them, by turns, pauses for 50 ms."""
    import torch

    mesh.everyone.barrier()
    began = time.perf_counter()
    for number in range(32):
        if number % mesh.data.size == mesh.data.index:
            time.sleep(0.05)
        step(first + number)
    took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
    return mesh.everyone.allreduce(took, "max").item()


def _batch(windows: Any, order: Any, mesh: Any) -> Any:
    """This replica's part of the windows in `order`."""
    import torch

    order = list(order)
    start, stop = mesh.data.piece(len(order))
    inputs, targets = zip(*(windows[i] for i in order[start:stop]))
    return torch.stack(inputs), torch.stack(targets)


class Handed:
    """How many bytes of gradients and weights this rank hands to the axes between replicas, since `watch`."""

    def __init__(self, mesh: Any, optimizer: Any) -> None:
        self.bytes = 0
        self._mesh, self._policy = mesh, optimizer.policy

    def watch(self) -> None:
        """Some axes are made in the first step, so it begins after that."""
        axes = [getattr(self._policy, name, None) for name in ("company", "_between", "_axis")]
        for axis in {id(axis): axis for axis in axes if axis is not None}.values():
            for method in ("start_allreduce", "send"):
                setattr(axis, method, self._counting(getattr(axis, method)))

    def _counting(self, own: Any) -> Any:
        def counted(x: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += x.numel() * x.element_size()
            return own(x, *args, **kwargs)

        return counted


def table(found: dict[str, dict[str, Any]]) -> Table:
    """A row for each policy."""
    shown = Table(title="The same tokens under each sync policy")
    for name in ("sync", "loss", "megabytes", "wire", "seconds"):
        shown.add_column(name, justify="left" if name == "sync" else "right")
    for name, one in found.items():
        wire = one["megabytes"] * 1e6 / WIRE
        shown.add_row(name, f"{one['loss']:.3f}", f"{one['megabytes']:.2f}", f"{wire:.2f}", f"{one['seconds']:.2f}")
    return shown


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss over steps."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, one in found.items():
        axes.plot(*zip(*one["curve"]), label=name)
    axes.set(xlabel="steps", ylabel="loss of the text held back")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
