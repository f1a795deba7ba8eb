"""What becomes of each architecture on each layout, and the table of it.

    python -m tests.hf_table > table.md          starts mpirun for each layout, and prints the table

A cell is "equal" (losses of 3 steps, all parameters after them, and the evaluation loss are those of plain PyTorch, in
fp64 to 1e-10), or the reason why not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.architectures import KINDS, NAMES, batch, build

LAYOUTS = {"tensor 2": (2, 1, 1), "pipeline 2": (1, 2, 1), "2x2x2": (2, 2, 2)}  # tensor, pipeline, data
STEPS, TOLERANCE = 3, 1e-10
# Their own code computes norms or scans in fp32 whatever the dtype, and AdamW magnifies its rounding.
ROUGH = ("gemma", "gemma2", "cohere", "mamba")
_BATCH_NORM = "BatchNorm normalises over one microbatch of one replica"


def outcome(name: str, layout: str) -> str:
    """Called by every rank of the layout."""
    import hybridpar as hp

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tensor, pipeline, data = LAYOUTS[layout]
    mesh = hp.init(tensor=tensor, pipeline=pipeline)
    model, (inputs, targets) = build(name), batch(name)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if norms and data > 1:
        return _BATCH_NORM
    losses, reference = _plain(name)
    try:
        parallel = hp.parallelize(model, mesh, loss=hp.CrossEntropy(), example=inputs)
        optimizer = hp.DistributedOptimizer(torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-6), parallel)
        mine = _part((inputs, targets), mesh.place.data, data)
        microbatches = 1 if norms else 2
        found = []
        for _ in range(STEPS):
            found.append(parallel.train_step(mine, microbatches=microbatches))
            optimizer.step()
            optimizer.zero_grad()
        found.append(parallel.eval_step(mine, microbatches=microbatches))
        state = parallel.full_state_dict()
    except ValueError as refusal:
        return str(refusal).splitlines()[0]
    errors = {f"loss {step}": abs(a - b) for step, (a, b) in enumerate(zip(found, losses, strict=True))}
    errors |= {key: _apart(state[key], value) for key, value in reference.items() if value.is_floating_point()}
    worst = max(errors, key=lambda key: errors[key])
    if errors[worst] <= TOLERANCE:
        return "equal"
    if name in ROUGH and errors[worst] <= 1e-5:
        return "equal to 1e-5"
    return f"{worst} differs by {errors[worst]:.0e}"


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if b.numel() else 0.0


def _part(batch: tuple[dict[str, Tensor], Tensor], index: int, count: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs, targets = batch
    return {key: x.chunk(count)[index] for key, x in inputs.items()}, targets.chunk(count)[index]


@lru_cache(maxsize=2)
def _plain(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state of plain PyTorch."""
    model, (inputs, targets) = build(name), batch(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)

    def loss() -> Tensor:
        logits = model(**inputs).logits
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    losses = []
    model.train()
    for _ in range(STEPS):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value))
    model.eval()
    with torch.no_grad():
        losses.append(float(loss()))
    return losses, model.state_dict()


def read(path: Path) -> dict[str, dict[str, str]]:
    """The cells of the table in `path`, by architecture and layout."""
    rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows if row[0].strip() in NAMES]
    return {row[0]: dict(zip(LAYOUTS, row[2:], strict=True)) for row in cells}


def _all(layout: str) -> None:
    from mpi4py import MPI

    for name in NAMES:
        cell = outcome(name, layout)
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps([name, cell]), flush=True)


def _write() -> None:
    cells: dict[str, list[str]] = {name: [name, KINDS[name]] for name in NAMES}
    for layout, degrees in LAYOUTS.items():
        count = degrees[0] * degrees[1] * degrees[2]
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(count)]
        command += [sys.executable, "-m", "tests.hf_table"]
        env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        done = subprocess.run([*command, layout], env=env, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith('["'):
                name, cell = json.loads(line)
                cells[name].append(cell)
    print("| architecture | kind |", *(f"{layout} |" for layout in LAYOUTS))
    print("| --- | --- |", *("--- |" for _ in LAYOUTS))
    for row in cells.values():
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    _all(sys.argv[1]) if len(sys.argv) > 1 else _write()
