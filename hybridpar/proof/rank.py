"""A rank of `hybridpar verify`: runs the user's script under `hp.verify`; rank 0 writes the report.

    python rank.py REPORT STEPS fp64|as-is SECONDS SCRIPT [ARGUMENT ...]

What the script prints goes to stderr: stdout is the report's.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Run it. The report of each stage takes the place of the one before, so that a stage that fails leaves one."""
    path, steps, how, seconds, script, *rest = arguments
    os.dup2(2, 1)
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    from hybridpar.proof.patience import patience
    from hybridpar.proof.report import Report
    from hybridpar.proof.verify import verify
    from hybridpar.wires.ending import Ending

    def keep(report: Report) -> None:
        beside = Path(f"{path}.new")
        beside.write_text(report.as_json())
        beside.replace(path)

    def say(text: str) -> None:
        print(f"verify: {text}", file=sys.stderr, flush=True)

    def train() -> None:
        with patience(float(seconds), script, Ending.installed().rank):
            runpy.run_path(script, run_name="__main__")

    verify(train, int(steps), how == "fp64", say, keep)


if __name__ == "__main__":
    main(sys.argv[1:])
