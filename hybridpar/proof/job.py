"""`hybridpar verify`: start the ranks, wait for their report, show it.

Exit codes: 0 equal, 1 different or the script failed, 2 wrong use.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hybridpar.launch.job import plan
from hybridpar.launch.start import start as run
from hybridpar.proof import rank
from hybridpar.proof.patience import HUNG
from hybridpar.proof.report import Report

WRONG_USE = 2


def start(
    script: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    scripts: Path,
    prefix: Path,
    cores: int,
    ranks: int | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    carrier: str | None = None,
    steps: int = 3,
    double: bool = True,
    timeout: float = 600.0,
) -> Report:
    """Run `script` under `hp.verify` and return the report. `ranks` default to the product of the degrees.

    Replicas average gradients, whatever sync policy the script has: what is verified is the mesh.

    Each of its runs may take `timeout` seconds for its `steps`.

    Raises ValueError for wrong use and RuntimeError where the script fails before there is anything to compare.
    """
    if not Path(script).is_file():
        raise ValueError(f"there is no script {script!r} in {Path.cwd()}: give the path of one")
    if timeout <= 0:
        raise ValueError(f"--timeout {timeout:g}: the script needs some seconds for its steps")
    if steps < 1:
        raise ValueError(f"--steps {steps}: there must be at least 1 to compare")
    ranks = ranks if ranks is not None else (tensor or 1) * (pipeline or 1) * (data or 1)
    with tempfile.TemporaryDirectory(prefix="hybridpar-verify-") as folder:
        path = Path(folder, "report.json")
        words = [rank.__file__, str(path), str(steps), "fp64" if double else "as-is", str(timeout), script, *arguments]
        job = plan(
            ranks, words, environment, scripts, prefix, cores,
            tensor=tensor, pipeline=pipeline, data=data, carrier=carrier, sync="allreduce",
        )  # fmt: skip
        print(f"verify: {job.mesh}, {steps} steps, against one process", file=sys.stderr, flush=True)
        code = run(job)
        report = Report.from_json(path.read_text()) if path.exists() else None
    if report is None and code == WRONG_USE:
        raise ValueError("there was nothing to compare; what is above tells why")
    if code == HUNG:
        raise RuntimeError(
            f"the script hangs, or its first {steps} steps need more than {timeout:g} s: where each rank is stands "
            "above; --timeout allows more"
        )
    if report is None:
        raise RuntimeError(f"the script ended with code {code} before there was anything to compare; see above")
    if code:
        note = f"a later run ended with code {code}, see above: this is the run as it is only (try --no-fp64)"
        report = replace(report, notes=(*report.notes, note))
    return report
