"""Ranks that fall silent, and launchers that are killed: real jobs on this host. tests/test_hosts.py cuts links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hybridpar.install import mpi
from tests.jobs import PRELUDE, marked, run
from tests.ranks.launch import CHECKOUT, environment

RUN = [sys.executable, "-m", "hybridpar", "run", "-np", "2"]
MPIRUN = mpi.mpirun(2, [sys.executable])
TURNS = """
mesh = hp.init()
x = torch.ones(1000)
open(f"{os.path.dirname(os.path.abspath(__file__))}/{mesh.rank}.pid", "w").write(str(os.getpid()))
while True:
    mesh.everyone.allreduce(x)
    time.sleep(0.05)
"""
BEFORE_INIT = """
open(f"{os.environ['OMPI_COMM_WORLD_RANK']}.pid.new", "w").write(str(os.getpid()))
os.rename(f"{os.environ['OMPI_COMM_WORLD_RANK']}.pid.new", f"{os.environ['OMPI_COMM_WORLD_RANK']}.pid")
time.sleep(1000)
"""
HOLDS_THE_LOCK = """
import ctypes
mesh = hp.init()
if mesh.rank == 1:
    ctypes.PyDLL(None).sleep(4)  # as C code does that never lets go of Python
mesh.everyone.barrier()
"""


class Started:
    """A job whose two ranks are up."""

    def __init__(self, folder: Path, line: list[str], body: str, env: dict[str, str]) -> None:
        (folder / "script.py").write_text(PRELUDE + body)
        self._errors = folder / "errors"
        self.mark = f"mark-{folder.name}-{os.getpid()}"
        ready = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), **env}
        with open(self._errors, "w") as errors:
            self.process = subprocess.Popen(
                [*line, "script.py", self.mark], cwd=folder, env=ready, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
        limit = time.monotonic() + 60
        while len(found := [p.read_text() for p in sorted(folder.glob("*.pid"))]) < 2 or not all(found):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < limit, f"the ranks did not start\n{self.said}"
            time.sleep(0.1)
        self.ranks = [int(pid) for pid in found]

    @property
    def said(self) -> str:
        return self._errors.read_text()

    def code(self, seconds: float = 40) -> int:
        """Its exit code; nobody may be left soon after it."""
        code = self.process.wait(seconds)
        limit = time.monotonic() + 15
        while marked(self.mark):
            assert time.monotonic() < limit, marked(self.mark)
            time.sleep(0.05)
        return code


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a job, and sees that nothing of it is left."""
    jobs: list[Started] = []

    def start(line: list[str], body: str = TURNS, **env: str) -> Started:
        jobs.append(Started(tmp_path, line, body, env))
        return jobs[-1]

    yield start
    for job in jobs:
        for pid in (job.process.pid, *marked(job.mark)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.wait()


@pytest.mark.parametrize("line", [RUN, MPIRUN], ids=["hybridpar run", "mpirun"])
def test_a_rank_that_is_stopped_is_named_and_ends_the_job(started: Callable[..., Started], line: list[str]) -> None:
    job = started(line, HYBRIDPAR_SILENT_SECONDS="3")
    os.kill(job.ranks[1], signal.SIGSTOP)
    assert job.code() == 75
    assert len([one for one in job.said.splitlines() if "hybridpar: rank 1 on " in one]) == 1, job.said
    assert "has given no sign of life for" in job.said


def test_a_job_that_is_stopped_as_a_whole_goes_on_where_it_was(started: Callable[..., Started]) -> None:
    job = started(MPIRUN, HYBRIDPAR_SILENT_SECONDS="1")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in job.ranks:
            os.kill(rank, number)
        time.sleep(3)
    assert job.process.poll() is None, job.said


def test_a_rank_that_holds_python_s_lock_is_not_taken_for_stopped(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PRELUDE + HOLDS_THE_LOCK)
    ready = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "HYBRIDPAR_LINK_SECONDS": "1"}
    done = subprocess.run([*MPIRUN, "script.py"], cwd=tmp_path, env=ready, timeout=100, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("body", [TURNS, BEFORE_INIT], ids=["in training", "before hp.init"])
def test_kill_of_mpirun_leaves_no_rank(started: Callable[..., Started], body: str) -> None:
    job = started(RUN, body)
    [mpirun] = [one for one in psutil.Process(job.process.pid).children() if "mpirun" in one.cmdline()[0]]
    mpirun.kill()
    assert job.code() == 137
    assert "hybridpar: mpirun was killed (signal 9)" in job.said


def test_kill_of_hybridpar_run_leaves_nobody(started: Callable[..., Started]) -> None:
    job = started(RUN)
    job.process.kill()
    assert job.code() == -signal.SIGKILL


def test_a_rank_that_is_killed_is_named(started: Callable[..., Started]) -> None:
    job = started(RUN)
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.code() == 137
    [sentence] = [one for one in job.said.splitlines() if "hybridpar" in one]
    assert sentence.startswith("hybridpar: rank 1 on ") and sentence.endswith(" was ended by signal 9 (Killed)")


def test_patience_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PRELUDE + "hp.init()\n")
    ready = {**environment(), "PYTHONPATH": str(CHECKOUT), "HYBRIDPAR_SILENT_SECONDS": "soon"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=ready, capture_output=True, text=True)
    assert done.returncode == 2 and "HYBRIDPAR_SILENT_SECONDS='soon' is not a number of seconds" in done.stderr


CHATTER = """
mesh = hp.init()
watchdog, = (one.native_id for one in threading.enumerate() if one.name == "hybridpar-watchdog")

def slept():
    told = open(f"/proc/self/task/{watchdog}/status").read()
    return int(told.split("voluntary_ctxt_switches:")[1].split()[0])

mesh.everyone.barrier()
before = slept()
time.sleep(1.5)
assert slept() - before < 20, f"{slept() - before} wake-ups in 1.5 s"
"""


def test_a_beat_is_sent_every_so_often_and_not_as_soon_as_one_comes(tmp_path: Path) -> None:
    """Each beat that came was once answered by one at once: they chased each other round the ring, 9,000 a second,

    and took a third of both cores from the training.
    """
    job = run(tmp_path, CHATTER, ranks=2)
    assert job.code == 0, job.said
