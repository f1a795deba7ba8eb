"""Run a planned job and see it to its end.

the job             in a session of its own, so that a signal can reach every process of it
a shell             waits for our end, and ends the job if we could not: kill -9 leaves nobody
mpirun's pages      become sentences (pages.py)
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from hybridpar.launch.job import Job
from hybridpar.launch.pages import Pages
from hybridpar.wires.ending import MISUSED

GRACE_SECONDS = 10.0  # mpirun needs about 3 to end its ranks
LOST = 75  # as ranks end where a host or a rank falls silent (wires/watchdog.py)
_DAEMON_LOST = 205  # mpirun's code where the connection to one of its daemons has ended
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Reads until we are gone. The group of the job is then asked to end, and killed if it does not.
_LEASH = 'read -r _; kill -s TERM -- "-$0"; sleep 6; kill -s KILL -- "-$0"'


def start(
    job: Job, grace_seconds: float = GRACE_SECONDS, output: int | None = None, errors: int = 2,
    elsewhere: Callable[[], bool] = bool,
) -> int:  # fmt: skip
    """Run `job` and return its exit code, 128 + n where signal n ended it.

    SIGINT, SIGTERM and SIGHUP end all of its processes, and what is still there after `grace_seconds` is killed. What
    it prints goes to the file numbers `output` (None: ours) and `errors`; `elsewhere` says whether a failure has
    been told in another way. In another thread than the main one signals are left alone.
    """
    process = subprocess.Popen(
        job.command, env=dict(job.environment), start_new_session=True, stdout=output, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    pages = Pages(process.stderr.fileno(), errors, elsewhere)
    reading = threading.Thread(target=pages.pass_on, daemon=True)
    reading.start()
    with _leash(process.pid):
        code = _awaited(process, grace_seconds)
    reading.join(2)
    if not reading.is_alive():  # else somebody has been left behind who holds it open
        process.stderr.close()
    if code == _DAEMON_LOST:
        return LOST
    if pages.misused:
        return MISUSED
    if code == -signal.SIGKILL:
        pages.say(f"{os.path.basename(job.command[0])} was killed (signal 9)")
    return code if code >= 0 else 128 - code


def _awaited(process: subprocess.Popen[bytes], grace_seconds: float) -> int:
    """The code of `process`; minus the number of a signal that ended it or us."""
    caught: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise InterruptedError

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, forward) for number in _SIGNALS} if main else {}
    try:
        return process.wait()
    except (InterruptedError, KeyboardInterrupt):
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        _end(process, grace_seconds)
        return -caught[0] if caught else -signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _leash(group: int) -> Iterator[None]:
    """Hold the job so that it ends when we do, however that happens."""
    holder = subprocess.Popen(
        ["sh", "-c", _LEASH, str(group)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        holder.kill()
        holder.wait()
        if holder.stdin is not None:
            holder.stdin.close()


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Ask the launcher to end the job, then kill what is left: ranks are in process groups of their own."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    os.killpg(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=grace_seconds)
    for one in alive:
        one.kill()
    process.wait()
