"""What importing does, and what it must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hybridpar

ROOT = Path(__file__).parents[1]


def test_no_public_name_starts_mpi() -> None:
    # Importing mpi4py.MPI starts MPI, and hp.init() must set what has to be set before that.
    names = [name for name in hybridpar.__all__ if name != "__version__"]
    script = f"import sys\nfrom hybridpar import {', '.join(names)}\nsys.exit('mpi4py.MPI' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "mpi4py.MPI was imported"


def test_importing_hybridpar_imports_no_torch() -> None:
    script = "import sys\nimport hybridpar\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
