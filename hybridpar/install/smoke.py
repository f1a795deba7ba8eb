"""Does Horovod work here? Two real ranks say so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridpar.install.mpi import mpirun

RANKS = 2
SECONDS = 180.0


@dataclass(frozen=True)
class Outcome:
    """Whether the two ranks did it, why not otherwise, and what Horovod is built with."""

    works: bool
    reason: str
    nccl: bool = False


def built_for() -> tuple[str, str] | None:
    """The installed Horovod's version and the torch it was built for, or None; nothing is imported."""
    found = importlib.util.find_spec("horovod")
    if found is None or not found.submodule_search_locations:
        return None
    try:
        told = json.loads(Path(found.submodule_search_locations[0], "metadata.json").read_text())
        return importlib.metadata.version("horovod"), told.get("pytorch", "no torch")
    except (OSError, ValueError, importlib.metadata.PackageNotFoundError):
        return "unknown", "no torch"


def torch_version() -> str | None:
    """The installed torch's exact version with its local tag (2.13.0+cpu), or None; nothing is imported.

    The package's metadata may lack the tag.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    text = Path(found.submodule_search_locations[0], "version.py").read_text()
    told = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    return told.group(1) if told else importlib.metadata.version("torch")


def launcher(environment: Mapping[str, str]) -> Outcome:
    """Whether mpirun starts processes at all: worth a second before minutes of compiling."""
    code, told = captured(mpirun(RANKS, ["true"]), environment, SECONDS)
    return Outcome(code == 0, f"`mpirun -np {RANKS} true` ended with code {code}: {_shown(told)}")


def run(environment: Mapping[str, str]) -> Outcome:
    """Start the two ranks with `environment`, which `mpi.settings` made, and judge what they say."""
    package = str(Path(__file__).parents[2])
    path = ":".join(p for p in (package, environment.get("PYTHONPATH")) if p)
    command = mpirun(RANKS, [sys.executable, "-W", "ignore", "-m", "hybridpar.wires.smoke"])
    code, told = captured(command, {**environment, "PYTHONPATH": path}, SECONDS)
    return judge(code, told)


def judge(code: int | None, told: str) -> Outcome:
    """What exit code `code` (None: it took too long) and output `told` of the two ranks mean.

    Example:
        >>> judge(0, 'smoke {"size": 1, "right": true, "mpi": true}').works
        False
    """
    lines = [line for line in told.splitlines() if line.startswith("smoke ")]
    if code is None:
        return Outcome(False, f"two ranks did not finish an allreduce in {SECONDS:.0f} s")
    if code or not lines:
        return Outcome(False, f"two ranks ended with code {code}: {_shown(told)}")
    facts = json.loads(lines[0].removeprefix("smoke "))
    if not facts["mpi"]:
        return Outcome(False, "the installed Horovod is built without MPI")
    if facts["size"] != RANKS:
        return Outcome(
            False,
            f"mpirun started {RANKS} ranks but Horovod saw a world of {facts['size']}: mpirun and Horovod belong to "
            "different MPIs",
        )
    return Outcome(bool(facts["right"]), "the sum of two ranks came out wrong", facts.get("nccl", False))


def captured(command: list[str], environment: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit code and output of `command`, which is ended with all it started after `seconds` (code None then)."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, cwd=tempfile.gettempdir(),
            )  # fmt: skip
        except OSError as error:
            return 127, f"{command[0]} cannot be started: {error}"
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                _end(process)
        file.seek(0)
        return code, file.read()


def _shown(told: str) -> str:
    lines = [line.strip() for line in told.splitlines() if set(line.strip()) - set("-")]
    return " | ".join(lines[-6:])[:900]


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue
