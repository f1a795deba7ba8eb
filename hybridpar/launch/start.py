"""Run a planned job and see it to its end: in a session of its own, so that a signal reaches every process."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType

import psutil

from hybridpar.launch.job import Job

GRACE_SECONDS = 10.0  # mpirun needs about 3 to end its ranks


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
