"""`python -m benchmarks.policies`: what sync policies learn from the same text, and what they cost.

    loss          of the text held back, after the same tokens for all; replicas have met before
    megabytes     that a rank hands to the data axis
    ms per step   of the slowest replica, measured after the training: the median of three times 16 steps and a meeting.
                  With --link between two hosts with that link between them; else each replica pauses by turns
    sent          megabytes that a host sends over the link in a step, read from its interface
    seconds to    the loss that all reach: steps until then, times the seconds of a step

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
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, environment
from hybridpar.install import mpi

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
POLICIES = (
    "allreduce", "allreduce + bf16", "allreduce + power_sgd(4)", "local_sgd(8)", "diloco(8)", "diloco(8, delay=4)",
    "diloco(8, inside=2)", "easgd(4)", "async_ps(8)", "async_ps(16)",
)  # fmt: skip
MEGABYTES = 2.0  # of text
SECONDS = 1200
WINDOWS, WINDOW_STEPS, PAUSE_SECONDS = 3, 16, 0.05


@click.command(help=__doc__.splitlines()[0])
@click.option("--steps", default=192, show_default=True, help="Of training; a multiple of 8.")
@click.option("--replicas", default=4, show_default=True)
@click.option("--link", default="", help="What two hosts of namespaces send each other at most, as in 50mbit.")
@click.option("--delay", default="5ms", show_default=True, help="Of that link, each way.")
@click.option("--width", default=48, show_default=True, help="Of the model.")
@click.option("--only", default="", help="Some of the policies, with ; between them.")
@click.option("--folder", default=Path("runs/policies"), type=click.Path(path_type=Path), help="Of the tokens.")
@click.option("--json", "to_json", type=click.Path(path_type=Path), help="Write the figures there.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write the plot there.")
@click.option("--rank", default="", hidden=True)
def main(
    steps: int, replicas: int, link: str, delay: str, width: int, only: str, folder: Path, to_json: Path | None,
    svg: Path | None, rank: str,
) -> None:  # fmt: skip
    if rank:
        told = trained(rank, steps, folder, width, bool(link))
        if told is not None:
            print(json.dumps(told))
        return
    names = [name.strip() for name in only.split(";")] if only else list(POLICIES)
    given = ["--steps", str(steps), "--width", str(width), "--folder", str(folder.absolute())]
    if link:
        from benchmarks.link import no_link, slow_link

        if no_link():
            print(f"No policies under a slow link: {no_link()}.")
            return
        with slow_link(link, delay, replicas, Path(__file__), folder) as run:
            found = _each(names, lambda name: _told(name, run(["--rank", name, "--link", link, *given])))
    else:
        found = _each(names, lambda name: _launch(name, replicas, given))
    Console(width=None if sys.stdout.isatty() else 120).print(table(found))
    if to_json:
        told = {"machine": describe(), "steps": steps, "replicas": replicas, "link": link, "delay": delay}
        to_json.write_text(json.dumps({**told, "load": os.getloadavg(), "policies": found}, indent=2) + "\n")
    if svg:
        plot(found, svg)


def _each(names: list[str], measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds; what fails is told and left out."""
    found = {}
    for name in names:
        try:
            found[name] = measure(name)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        print(f"{name}: {found[name]['ms']:.0f} ms per step", file=sys.stderr)
    return found


def _launch(policy: str, replicas: int, given: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.policies", "--rank", policy]
    ready = {**mpi.settings(os.environ, *environment()), "OMP_NUM_THREADS": "1"}
    line = mpi.mpirun(replicas, [*command, *given])
    done = subprocess.run(line, env=ready, capture_output=True, text=True, timeout=SECONDS, check=False)
    return _told(policy, done.stdout, done.stderr)


def _told(policy: str, out: str, said: str = "") -> dict[str, Any]:
    told = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if not told:
        raise RuntimeError(f"{policy}: {out[-1000:]}{said[-2000:]}")
    return told[0]


def trained(name: str, steps: int, folder: Path, width: int = 48, link: bool = False) -> dict[str, Any] | None:
    """The figures of one policy, or "policy + compression", on the first rank."""
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
    torch.manual_seed(0)
    shape = dict(vocabulary=512, width=width, depth=2, heads=2, context=32)
    model = hp.parallelize(GPT(**shape), mesh, hp.CrossEntropy())
    policy, _, wire = name.partition(" + ")
    asked = dict(sync=policy, compression=_compression(hp, wire), clip=1.0)
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, **asked)
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
        if (number + 1) % 8 == 0:
            curve.append((number + 1, sum(model.eval_step(one) for one in held_back) / len(held_back)))
    optimizer.meet()
    loss = sum(model.eval_step(one) for one in held_back) / len(held_back)
    megabytes = handed.bytes / 1e6 * steps / (steps - 1)  # the first step was not watched
    ms, sent = _timed(mesh, optimizer.meet, step, steps, 0.0 if link else PAUSE_SECONDS)
    told = {"loss": loss, "megabytes": megabytes, "ms": ms, "sent": sent, "curve": curve}
    return told if mesh.rank == 0 else None


def _compression(hp: Any, wire: str) -> Any:
    """What "bf16" names in `hp.Compression`, and "power_sgd(4)" makes there."""
    name, _, rank = wire.rstrip(")").partition("(")
    found = getattr(hp.Compression, name or "none")
    return found(int(rank)) if rank else found


def _timed(
    mesh: Any, meet: Callable[[], None], step: Callable[[int], None], first: int, pause: float
) -> tuple[float, float]:
    """Milliseconds of a step of the slowest replica, and megabytes that its host sends meanwhile.

    In each step one replica, by turns, pauses."""
    import torch

    from benchmarks.link import bytes_sent

    took, sent = [], bytes_sent()
    for window in range(WINDOWS):
        mesh.everyone.barrier()
        began = time.perf_counter()
        for number in range(window * WINDOW_STEPS, (window + 1) * WINDOW_STEPS):
            if number % mesh.data.size == mesh.data.index:
                time.sleep(pause)
            step(first + number)
        meet()
        mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        took.append(mesh.everyone.allreduce(mine, "max").item() / WINDOW_STEPS)
    return median(took) * 1e3, (bytes_sent() - sent) / 1e6 / (WINDOWS * WINDOW_STEPS)


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
    level = max(min(loss for _, loss in one["curve"]) for one in found.values())
    shown = Table(title="The same tokens under each sync policy")
    for name in ("sync", "loss", "megabytes", "ms per step", "sent", f"seconds to {level:.2f}"):
        shown.add_column(name, justify="left" if name == "sync" else "right")
    for name, one in found.items():
        steps = next(steps for steps, loss in one["curve"] if loss <= level)
        numbers = (one["loss"], one["megabytes"], one["ms"], one["sent"], steps * one["ms"] / 1e3)
        shown.add_row(name, *(f"{x:.{places}f}" for x, places in zip(numbers, (3, 2, 0, 2, 1))))
    return shown


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss over steps, and over the seconds that they take."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, one in found.items():
        steps, losses = zip(*one["curve"])
        left.plot(steps, losses, label=name)
        right.plot([count * one["ms"] / 1e3 for count in steps], losses, label=name)
    left.set(xlabel="steps", ylabel="loss of the text held back")
    right.set(xlabel="seconds")
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
