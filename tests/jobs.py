"""Jobs that are started as users start them, and seen to their end: exit code, what was said, who is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hybridpar.install import mpi
from tests.ranks.launch import CHECKOUT, environment

PRELUDE = """\
import os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
import hybridpar as hp
"""
_VANISH_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """What was seen of a job that has ended."""

    code: int
    out: str
    said: str  # on stderr
    left: tuple[int, ...]  # processes that outlived it

    def lines(self, text: str) -> list[str]:
        """The lines of stderr that hold `text`."""
        return [line for line in self.said.splitlines() if text in line]


def run(
    folder: Path, body: str, ranks: int | None = None, seconds: float = 100.0, env: Mapping[str, str] | None = None
) -> Job:
    """Run PRELUDE and `body` as a script on so many ranks, or without mpirun if `ranks` is None.

    A job that has not ended after `seconds` hangs: it is ended, and the test fails.
    """
    script = folder / "script.py"
    script.write_text(PRELUDE + body)
    return run_command(folder, [sys.executable, str(script)], ranks, seconds, env)


def run_command(
    folder: Path, command: list[str], ranks: int | None, seconds: float = 100.0, env: Mapping[str, str] | None = None
) -> Job:
    """The same for any command; a mark is added to its arguments, by which its processes are found."""
    mark = f"mark-{uuid.uuid4()}"
    line = [*command, mark] if ranks is None else mpi.mpirun(ranks, [*command, mark])
    ready = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "MARK": mark, **(env or {})}
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen(
            line, cwd=folder, env=ready, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(marked(mark))
            process.kill()
            process.wait()
            raise AssertionError(
                f"the job hung for {seconds:.0f} s\n" + (folder / "err").read_text() + (folder / "out").read_text()
            ) from None
    limit = time.monotonic() + _VANISH_SECONDS
    while marked(mark) and time.monotonic() < limit:
        time.sleep(0.05)
    left = marked(mark)
    _kill(left)
    return Job(code, (folder / "out").read_text(), (folder / "err").read_text(), left)


def marked(mark: str) -> tuple[int, ...]:
    """The living processes that have `mark` among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has just ended
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return tuple(found)


def _kill(processes: tuple[int, ...]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
