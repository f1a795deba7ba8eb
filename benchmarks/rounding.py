"""`python -m benchmarks.rounding`: what training in bf16 learns, by where the weights' bits are lost.

    fp32 weights           precision="bf16": products in bf16, weights, gradients and moments in fp32
    bf16, to the nearest   a module in bf16 and torch's AdamW
    bf16, by chance        the same with rounding="stochastic"

The model is the GPT of examples/gpt.py, small; the text is Python's standard library. All see the same batches, with
the same learning rate, which rises for 20 steps and then falls to a fiftieth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WAYS: dict[str, dict[str, Any]] = {
    "fp32 weights": {"precision": "bf16"},
    "bf16, to the nearest": {},
    "bf16, by chance": {"rounding": "stochastic"},
}


@click.command(help=__doc__.splitlines()[0])
@click.option("--steps", default=384, show_default=True, help="Of training.")
@click.option("--seeds", default=2, show_default=True, help="Trainings of each kind.")
@click.option("--folder", default=Path("runs/rounding"), type=click.Path(path_type=Path), help="Of the tokens.")
def main(steps: int, seeds: int, folder: Path) -> None:
    shown = Table(title=f"The loss of the text held back, after {steps} steps")
    for name in ("weights", *(f"seed {seed}" for seed in range(seeds)), "bytes a weight"):
        shown.add_column(name, justify="left" if name == "weights" else "right")
    for name, how in WAYS.items():
        found = [trained(seed, steps, folder, **how) for seed in range(seeds)]
        shown.add_row(name, *(f"{loss:.3f}" for loss, _ in found), f"{found[0][1]:.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def trained(
    seed: int, steps: int, folder: Path, precision: str | None = None, rounding: str | None = None
) -> tuple[float, float]:
    """The loss of the text held back, and the bytes of weights, gradients and moments for each weight."""
    sys.path.insert(0, str(EXAMPLES))
    import torch
    from text import Windows, standard_library

    import hybridpar as hp
    from hybridpar.models.gpt import GPT

    torch.set_num_threads(1)
    mesh = hp.init(seed=seed)
    text = standard_library(512, 2.0, folder)
    module = GPT(vocabulary=512, width=48, depth=2, heads=2, context=32)
    module = module if precision else module.bfloat16()
    model = hp.parallelize(module, mesh, hp.CrossEntropy(), precision=precision)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = hp.DistributedOptimizer(adam, model, clip=1.0, rounding=rounding)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * max(0.02, 1 - s / steps))
    loader = hp.DataLoader(Windows(text.train, 32), mesh, batch_size=32, drop_last=True)
    for _, batch in zip(range(steps), loader):
        model.train_step(batch)
        optimizer.step()
        rate.step()
        held = sum(_bytes(p) + _bytes(p.grad) for p in model.parameters())
        optimizer.zero_grad()
    held += sum(_bytes(x) for state in optimizer.state.values() for x in state.values() if x.dim())
    later = hp.DataLoader(Windows(text.validation, 32), mesh, batch_size=64, shuffle=False, drop_last=True)
    losses = [model.eval_step(batch) for _, batch in zip(range(16), later)]
    count = sum(p.numel() for p in model.parameters())
    mesh.close()
    return sum(losses) / len(losses), held / count


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size()


if __name__ == "__main__":
    main()
