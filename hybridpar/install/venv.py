"""The environment that `make` works in: `python3 -m hybridpar.install.venv .venv`, run by the Python it is made from.

Debian's Python cannot put pip into an environment unless python3-venv is installed, so others are tried in turn:

    python -m venv        virtualenv        uv venv --seed
    python -m venv --without-pip, filled by this Python's pip, or by the one in Debian's package
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hybridpar.install import debian
from hybridpar.install.probe import OLDEST_PYTHON, Missing

NOTE = "made-for"


def fits(folder: Path, any_python: bool) -> bool:
    """Whether `folder` holds a working environment that was made here, by this Python (or, `any_python`, by any)."""
    note = folder / NOTE
    if note.exists():
        place, python = (note.read_text().splitlines() + ["", ""])[:2]
        if place != str(folder.resolve()) or not (any_python or python == _this_python()):
            return False
    return _has_pip(folder)


def make(folder: Path) -> str:
    """Make an environment in `folder`, in place of what is there, and return what made it.

    Raises Missing where no way works, or where `folder` is something else.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise Missing(
            f"this is Python {sys.version.split()[0]} and hybridpar needs 3.10 or newer: choose another with "
            "`make PYTHON=python3.11`"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise Missing(f"{folder} is no Python environment and is not touched: move it away")
    failures = []
    for title, commands in _ways(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if all(_succeeds(command, failures) for command in commands) and _has_pip(folder):
            (folder / NOTE).write_text(f"{folder.resolve()}\n{_this_python()}\n")
            return title
    shutil.rmtree(folder, ignore_errors=True)
    raise Missing(
        "no Python environment can be made here: on Debian and Ubuntu `apt-get install python3-venv` "
        "(without root: put virtualenv or uv on PATH, both work too)\n  " + "\n  ".join(failures[-4:])
    )


def _ways(folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    python, place = sys.executable, str(folder)
    if importlib.util.find_spec("ensurepip"):
        yield "venv", [[python, "-m", "venv", place]]
    if importlib.util.find_spec("virtualenv"):
        yield "virtualenv", [[python, "-m", "virtualenv", "-q", place]]
    elif shutil.which("virtualenv"):
        yield "virtualenv", [["virtualenv", "-q", "-p", python, place]]
    if shutil.which("uv"):
        yield "uv", [["uv", "venv", "-q", "--seed", "--python", python, place]]
    if importlib.util.find_spec("pip"):
        fill = [python, "-m", "pip", "--python", f"{place}/bin/python", "install", "-q", "pip"]
        yield "venv and this pip", [[python, "-m", "venv", "--without-pip", place], fill]
    with tempfile.TemporaryDirectory() as work:
        wheel = debian.pip_wheel(Path(work))
        if wheel:
            fill = [f"{place}/bin/python", f"{wheel}/pip", "install", "-q", "--no-index", str(wheel)]
            yield "venv and Debian's pip", [[python, "-m", "venv", "--without-pip", place], fill]


def _succeeds(command: list[str], failures: list[str]) -> bool:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        failures.append(f"`{' '.join(command)}`: {last}")
    return done.returncode == 0


def _has_pip(folder: Path) -> bool:
    python = folder / "bin" / "python"
    try:
        return subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def _this_python() -> str:
    return f"{sys.base_prefix} {sys.version.split()[0]}"


def main() -> int:
    """`FOLDER` makes it unless it fits; `--fits FOLDER` only says so by the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridpar.install.venv", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fits", action="store_true", help="make nothing")
    parser.add_argument("--any-python", action="store_true", help="an environment of another Python fits too")
    options = parser.parse_args()
    fit = fits(options.folder, options.any_python)
    if fit or options.fits:
        return 0 if fit else 1
    try:
        print(f"{options.folder}: made by {make(options.folder)}, Python {sys.version.split()[0]}", flush=True)
    except Missing as error:
        print(f"hybridpar: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
