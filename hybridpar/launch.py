"""Start a script on ranks of this machine over horovodrun, and see it to its end.

plan        the command line and environment, checked before anything starts
start       runs it in a session of its own, so that a signal reaches every process: horovodrun alone would leave
            mpirun and the ranks running
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from hybridpar.install import mpi
from hybridpar.mesh import Mesh

GRACE_SECONDS = 10.0  # mpirun needs about 3 to end its ranks


@dataclass(frozen=True)
class Job:
    """What is started: the mesh of its ranks, the command line, the environment, what of that was added here."""

    mesh: Mesh
    command: tuple[str, ...]
    environment: Mapping[str, str]
    added: Mapping[str, str]

    def __str__(self) -> str:
        sets = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.added.items())]
        return "\n".join([f"# {self.mesh}", *(f"{one} \\" for one in sets), shlex.join(self.command)])


def plan(
    ranks: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    scripts: Path,
    prefix: Path,
    cores: int,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    carrier: str | None = None,
    tag_output: bool = False,
) -> Job:
    """How `command` (a Python script and its arguments) is started on `ranks` ranks of this machine.

    `scripts` and `prefix` are those of the environment that holds horovodrun; degrees and carrier that
    are None are left to the script.

    Raises ValueError where the degrees do not fit the ranks or the script is not there, RuntimeError where Horovod or
    MPI is not installed.

    Example:
        >>> plan(8, ["train.py"], os.environ, scripts(), prefix(), cores=4, tensor=2).mesh  # doctest: +SKIP
        Mesh(data=4, pipeline=1, tensor=2)
    """
    if ranks < 1:
        raise ValueError(f"-np {ranks}: a job has at least 1 rank")
    mesh = Mesh.fit(ranks, data=data, pipeline=pipeline, tensor=tensor)
    if not command or not Path(command[0]).is_file():
        raise ValueError(f"there is no script {command[0] if command else ''!r} in {Path.cwd()}: give the path of one")
    told = {"TENSOR": tensor, "PIPELINE": pipeline, "DATA": data, "CARRIER": carrier}
    ready = mpi.settings(environment, scripts, prefix)
    for program in ("horovodrun", "mpirun"):
        if shutil.which(program, path=ready["PATH"]) is None:
            raise RuntimeError(f"{program} is missing in {scripts} and on PATH: run `hybridpar install`")
    ready.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    ready.update({f"HYBRIDPAR_{name}": str(value) for name, value in told.items() if value is not None})
    if ranks > cores:
        ready.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    line = mpi.horovodrun(ranks, scripts, [sys.executable, *command], tag_output)
    added = {name: value for name, value in ready.items() if environment.get(name) != value}
    return Job(mesh, tuple(line), ready, added)


def start(job: Job, grace_seconds: float = GRACE_SECONDS) -> int:
    """Run `job` and return its exit code, 128 + n where signal n ended it.

    SIGINT, SIGTERM and SIGHUP are passed on to all of its processes, and what is still there after `grace_seconds`
    is killed. Call it in the main thread.
    """
    process = subprocess.Popen(job.command, env=dict(job.environment), start_new_session=True)
    caught: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise InterruptedError

    before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    except InterruptedError:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        _end(process, grace_seconds)
        return 128 + caught[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Ask the launcher to end the job, then kill what is left: ranks are in process groups of their own."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    os.killpg(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=grace_seconds)
    for one in alive:
        one.kill()
    process.wait()
