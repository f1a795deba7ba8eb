"""`hybridpar doctor`: what is installed, whether it fits together, and how to mend what does not.

versions        looked up, nothing imported
fit             Horovod's torch against the installed one, mpirun on PATH against Horovod's MPI
a job           some ranks really started, as `hybridpar run` would: world sizes, threads, ring, binding, GPUs
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hybridpar.install import mpi, smoke
from hybridpar.install.cache import HOROVOD
from hybridpar.install.probe import Missing, prefix, scripts

SECONDS = 120.0
INSTALL = "run `python -m hybridpar.install`"


class Level(Enum):
    """How a finding is."""

    FINE = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, what was found, how it is, and how to mend it."""

    name: str
    found: str
    level: Level = Level.FINE
    mend: str = ""


def examine(ranks: int, environment: Mapping[str, str]) -> list[Finding]:
    """Look at everything; `ranks` ranks are started on this machine. Never raises for what it finds.

    Example:
        >>> print(render(examine(2, os.environ)))  # doctest: +SKIP
    """
    if ranks < 1:
        raise ValueError(f"-np {ranks}: the doctor's job has at least 1 rank")
    findings = [*versions(), *carrier_library(environment), *horovod_fit()]
    if any(f.level is Level.WRONG for f in findings):
        return [*findings, Finding("job", "not started, because of the above", Level.NOTE)]
    return [*findings, *job(ranks, environment)]


def versions() -> list[Finding]:
    """Python and the packages, by their metadata."""
    old = sys.version_info < (3, 10)
    found = [
        Finding("python", f"{platform.python_version()} in {sys.prefix}")
        if not old
        else Finding("python", platform.python_version(), Level.WRONG, "hybridpar needs Python 3.10 or newer")
    ]
    mends = {
        "hybridpar": None,
        "torch": "run `pip install torch==2.13.0`",
        "mpi4py": "run `pip install 'mpi4py>=4'`",
    }
    for name, mend in mends.items():
        try:
            version = (smoke.torch_version() if name == "torch" else None) or importlib.metadata.version(name)
            found.append(Finding(name, version))
        except importlib.metadata.PackageNotFoundError:
            here = Path(__file__).parent
            level, text = (Level.WRONG, "not installed") if mend else (Level.NOTE, f"not installed, used from {here}")
            found.append(Finding(name, text, level, mend or "run `pip install .` in the checkout"))
    return found


def carrier_library(environment: Mapping[str, str]) -> list[Finding]:
    """The MPI that Horovod uses, and whether `mpirun` means the same one."""
    try:
        inside, machine = mpi.find(environment, scripts(), prefix())
        chosen = mpi.choose(inside, machine).mpi
    except Missing as error:
        return [Finding("mpi", str(error), Level.WRONG, INSTALL)]
    if chosen is None:
        seen = f"{machine}, which Horovod cannot use" if machine else "none"
        return [Finding("mpi", seen, Level.WRONG, f"{INSTALL}: it brings {mpi.FROM_PYPI}, without root")]
    found = [Finding("mpi", str(chosen))]
    users = shutil.which("mpirun", path=environment.get("PATH"))
    if users and Path(users).parent.resolve() != Path(chosen.folder).resolve():
        mend = f"start jobs with `hybridpar run`, or put {chosen.folder} first on PATH"
        found.append(Finding("mpirun", f"{users} on PATH belongs to another MPI", Level.NOTE, mend))
    return found


def horovod_fit() -> list[Finding]:
    """Whether Horovod is there, and built for the torch that is there."""
    built = smoke.built_for()
    if built is None:
        return [Finding("horovod", "not installed", Level.WRONG, INSTALL)]
    torch = smoke.torch_version() or "none"
    if built[1] != torch:
        text = f"{built[0]}, built for torch {built[1]}, and torch {torch} is installed"
        return [Finding("horovod", text, Level.WRONG, INSTALL)]
    found = [Finding("horovod", f"{built[0]}, built for torch {built[1]}")]
    if built[0] != HOROVOD:
        found.append(Finding("horovod", f"hybridpar is tested with {HOROVOD}", Level.NOTE))
    if sys.version_info >= (3, 12) and importlib.util.find_spec("setuptools") is None:
        text = "missing, and horovodrun imports distutils"
        found.append(Finding("setuptools", text, Level.WRONG, "run `pip install setuptools`"))
    return found


def job(ranks: int, environment: Mapping[str, str]) -> list[Finding]:
    """Start `ranks` ranks and judge what they tell."""
    ready = mpi.settings(environment, scripts(), prefix())
    ready["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    package = str(Path(__file__).parents[1])
    ready["PYTHONPATH"] = ":".join(p for p in (package, environment.get("PYTHONPATH")) if p)
    command = [sys.executable, "-W", "ignore", "-m", "hybridpar.wires.checkup"]
    code, told = smoke.captured(mpi.horovodrun(ranks, scripts(), command), ready, SECONDS)
    lines = [line for line in told.splitlines() if line.startswith("checkup ")]
    facts = json.loads(lines[0].removeprefix("checkup ")) if lines else {}
    if "ranks" not in facts:
        return [broken(code, facts.get("error"), told)]
    return judge(ranks, facts, len(os.sched_getaffinity(0)))


def broken(code: int | None, error: str | None, told: str) -> Finding:
    """What to say of a job that told nothing."""
    if error:
        return Finding("job", error, Level.WRONG)
    shown = [line.strip() for line in told.splitlines() if line.strip() and set(line.strip()) - set("-= ")]
    how = f"did not end in {SECONDS:.0f} s" if code is None else f"ended with code {code}"
    mend = f"{INSTALL} --force" if "horovod" in told else INSTALL
    return Finding("job", f"{how}: " + " | ".join(shown[-5:])[:700], Level.WRONG, mend)


def judge(ranks: int, facts: Mapping[str, Any], cores: int) -> list[Finding]:
    """Findings from what the job's rank 0 told (`wires/checkup.py`); `cores` is how many this machine lets us use."""
    horovod, people = facts["horovod"], facts["ranks"]
    names = [name for name in ("mpi", "gloo", "nccl") if horovod[name]]
    level = Level.FINE if horovod["mpi"] else Level.WRONG
    return [
        Finding(
            "horovod's build", ", ".join(names) or "nothing", level, "" if horovod["mpi"] else f"{INSTALL} --force"
        ),
        Finding("mpi library", facts["library"]),
        _threads(facts["threads"]),
        _world(ranks, facts["world"], horovod),
        Finding("ring", f"{facts['seconds'] * 1e6:.1f} us a message, {facts['bytes_per_second'] / 1e9:.2f} GB/s"),
        *_binding(people, cores),
        _gpu(people, horovod, facts["cuda_aware"]),
    ]


def _threads(level: str) -> Finding:
    if level == "MULTIPLE":
        return Finding("mpi threads", level)
    mend = "unset HOROVOD_MPI_THREADS_DISABLE and mpi4py.rc.thread_level; else this MPI is built without threads"
    return Finding("mpi threads", f"{level}, and Horovod beside mpi4py needs MULTIPLE", Level.WRONG, mend)


def _world(ranks: int, world: int, horovod: Mapping[str, Any]) -> Finding:
    text = f"{ranks} started, MPI sees {world}, hvd.size() is {horovod['size']}, the sum of ones {horovod['sum']:g}"
    if ranks == world == horovod["size"] == horovod["sum"]:
        return Finding("world", text)
    mend = f"mpirun, mpi4py and Horovod belong to different MPIs: {INSTALL} --force, and start with `hybridpar run`"
    return Finding("world", text, Level.WRONG, mend)


def _binding(people: Sequence[Mapping[str, Any]], cores: int) -> list[Finding]:
    found = []
    for host in dict.fromkeys(p["host"] for p in people):
        there = [(rank, p["cores"]) for rank, p in enumerate(people) if p["host"] == host]
        text = "; ".join(f"rank {rank} on cores {ranges(cores)}" for rank, cores in there)
        tight = len({tuple(c) for _, c in there}) == 1 and len(there[0][1]) < min(len(there), cores)
        mend = "the ranks share cores although there are others: start with `--bind-to none`" if tight else ""
        found.append(Finding(f"host {host}", text, Level.NOTE if tight else Level.FINE, mend))
    if len(people) > cores:
        text = f"{cores} for {len(people)} ranks: they take turns, which is right for a test and slow for training"
        found.append(Finding("cores", text, Level.NOTE))
    return found


def _gpu(people: Sequence[Mapping[str, Any]], horovod: Mapping[str, Any], cuda_aware: bool) -> Finding:
    names = sorted({p["gpu"] for p in people if p["gpu"]})
    if not names:
        return Finding("gpu", "none; tensors travel over MPI, gradients over Horovod on MPI")
    how = "NCCL" if horovod["nccl"] else "MPI through the CPU"
    way = "directly" if cuda_aware else "through the CPU (this MPI is not CUDA-aware; `--carrier nccl` goes directly)"
    text = f"{', '.join(names)}; tensors travel over MPI {way}, gradients over Horovod on {how}"
    if horovod["nccl"]:
        return Finding("gpu", text)
    mend = f"install the CUDA toolkit and NCCL's headers, then HOROVOD_GPU_OPERATIONS=NCCL and {INSTALL} --force"
    return Finding("gpu", text, Level.NOTE, mend)


def ranges(cores: Sequence[int]) -> str:
    """Core numbers, runs of them written as one.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0-2,5'
    """
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(str(n) for n in run) for run in runs)


def exit_code(findings: Sequence[Finding]) -> int:
    """0, or 1 where something is wrong."""
    return int(any(f.level is Level.WRONG for f in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON object `{"ok": bool, "findings": [...]}`."""
    rows = [{**asdict(f), "level": f.level.value} for f in findings]
    return json.dumps({"ok": exit_code(findings) == 0, "findings": rows}, indent=2)


def render(findings: Sequence[Finding]) -> str:
    """The findings as a table, each with its mend below it."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.level.value:5}  {f.name:{width}}  {f.found}")
        if f.mend:
            lines.append(f"{'':5}  {'':{width}}    -> {f.mend}")
    wrong = sum(f.level is Level.WRONG for f in findings)
    lines.append(f"\n{wrong} to mend" if wrong else "\nall is well")
    return "\n".join(lines)
