"""One `mpirun` that carries many tests, seen from the pytest that started it.

    folder/plan.json          what the ranks collect
    folder/orders.jsonl       pytest -> ranks: run this test
    folder/records-R.jsonl    rank R -> pytest: ready, then one record per test
    folder/rank-R.log         what rank R printed
    folder/stack-R.txt        where rank R was when it was asked (SIGUSR1) or when it crashed
"""

from __future__ import annotations

import json
import linecache
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridpar.install import mpi

CHECKOUT = Path(__file__).resolve().parents[2]
_START_SECONDS = 120.0
_GRACE_SECONDS = 3.0  # for the others, once a rank has failed
_END_SECONDS = 10.0
_POLL_SECONDS = 0.005
_TAIL_LINES = 30


class LaunchFailed(Exception):
    """The ranks did not come up."""


@dataclass
class Run:
    """What was seen of one test: a rank is either in `ended` or in `waiting`."""

    size: int
    timeout: float
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)  # rank -> its record
    waiting: dict[int, str] = field(default_factory=dict)  # rank -> its stack, "" if it had none to show
    printed: dict[int, str] = field(default_factory=dict)  # rank -> the end of what it printed
    crash: str = ""  # how the launch ended under the test, if it did

    @property
    def alike(self) -> bool:
        """Whether all ranks ended in the same way at the same place: then none waits for a message of another."""
        ways = {(record["outcome"], record["place"]) for record in self.ended.values()}
        return len(self.ended) == self.size and len(ways) == 1


def environment() -> dict[str, str]:
    """Ours, with what MPI jobs need here."""
    return mpi.settings(os.environ, Path(sys.executable).parent, Path(sys.prefix))


class Launch:
    """`size` ranks that wait for tests to run. Raises LaunchFailed where they do not come up."""

    def __init__(self, size: int, folder: Path, root: Path, plan: dict[str, Any]) -> None:
        self.size = size
        self._folder = folder
        self._pids: dict[int, int] = {}
        self._threads: dict[int, int] = {}  # rank -> ident of its main thread
        (folder / "plan.json").write_text(json.dumps({**plan, "size": size, "parent": os.getpid()}))
        self._orders = open(folder / "orders.jsonl", "w")
        for rank in range(size):
            (folder / f"records-{rank}.jsonl").touch()
        self._records = [_Lines(folder / f"records-{rank}.jsonl") for rank in range(size)]
        self._process = self._started(root)
        self._await_ready()

    def run(self, test: str, folder: Path, timeout: float) -> Run:
        """Have all ranks run `test`; returns when they have, or it is clear that they will not."""
        run = Run(self.size, timeout)
        printed = [self._log(rank).stat().st_size for rank in range(self.size)]
        stacks = [self._stack(rank).stat().st_size for rank in range(self.size)]
        self._order({"test": test, "folder": str(folder)})
        limit = time.monotonic() + timeout
        while len(run.ended) < self.size and time.monotonic() < limit:
            alive = self._process.poll() is None
            for rank, record in self._told():
                run.ended[rank] = record
                if record["outcome"] != "passed":
                    limit = min(limit, time.monotonic() + _GRACE_SECONDS)
            if not alive:
                run.crash = self._death()
                break
            time.sleep(_POLL_SECONDS)
        missing = [rank for rank in range(self.size) if rank not in run.ended]
        if missing and not run.crash:
            self._ask_for_stacks(missing)
        run.waiting = {rank: self._shown_stack(rank, stacks[rank]) for rank in missing}
        run.printed = {rank: _tail(self._log(rank), printed[rank]) for rank in range(self.size)}
        return run

    def end(self) -> None:
        """End the ranks by force: a failed test may have left them unable to leave, and MPI_Finalize takes a second."""
        if self._process.poll() is None:  # else the numbers may be other processes' by now
            for pid in self._pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if len(self._pids) < self.size:
            self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._orders.close()
        for lines in self._records:
            lines.close()

    def _started(self, root: Path) -> subprocess.Popen[bytes]:
        command = mpi.mpirun(self.size, [sys.executable, "-m", "tests.ranks.worker", str(self._folder)])
        env = environment() | {
            "OMP_NUM_THREADS": "1",  # torch's threads too, without the seconds that importing it here would cost
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "HYBRIDPAR_SYNCHRONOUS_SENDS": "1",  # eager buffering hides wrong orders
            "PYTHONUNBUFFERED": "1",  # a crash must not take the last lines with it
        }
        env["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [env.get("PYTHONPATH")])])
        with open(self._folder / "mpirun.log", "w") as log:
            # A session of its own: Ctrl-C reaches pytest alone, which ends the launch in order.
            try:
                return subprocess.Popen(
                    command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except FileNotFoundError as error:
                raise LaunchFailed(f"no mpirun beside {sys.executable} nor on PATH: `make test` sets one up") from error

    def _await_ready(self) -> None:
        limit, broken = time.monotonic() + _START_SECONDS, ""
        while len(self._pids) < self.size:
            alive = self._process.poll() is None
            for rank, record in self._told():
                if "broken" in record:
                    broken = broken or f"rank {rank} of {self.size} cannot run tests:\n{record['broken']}"
                else:
                    self._pids[rank], self._threads[rank] = record["pid"], record["thread"]
            if not alive:
                broken = broken or f"{self._death()} before its {self.size} ranks were ready"
            elif time.monotonic() > limit:
                late = sorted(set(range(self.size)) - set(self._pids))
                broken = broken or f"ranks {late} of {self.size} were not ready after {_START_SECONDS:.0f} s"
            if broken:
                printed = "".join(_tail(path, 0) for path in sorted(self._folder.glob("rank-*.log")))
                self.end()
                raise LaunchFailed(f"{broken}\n{printed}")
            time.sleep(_POLL_SECONDS)

    def _order(self, order: dict[str, Any]) -> None:
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()

    def _told(self) -> Iterable[tuple[int, dict[str, Any]]]:
        for rank, lines in enumerate(self._records):
            for line in lines:
                yield rank, json.loads(line)

    def _death(self) -> str:
        return f"mpirun ended with code {self._process.returncode}\n{_tail(self._folder / 'mpirun.log', 0)}"

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _stack(self, rank: int) -> Path:
        return self._folder / f"stack-{rank}.txt"

    def _ask_for_stacks(self, ranks: list[int]) -> None:
        before = {rank: self._stack(rank).stat().st_size for rank in ranks}
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGUSR1)
        _until(lambda: all(self._stack(rank).stat().st_size > before[rank] for rank in ranks), 2.0)
        time.sleep(0.1)  # a dump is written in several pieces

    def _shown_stack(self, rank: int, start: int) -> str:
        return shown_stack(_read(self._stack(rank), start), self._threads[rank])


def shown_stack(dump: str, thread: int) -> str:
    """The frames of `thread` in a faulthandler dump, innermost first, from the test inwards, each with its line."""
    threads = {
        int(ident, 16): frames
        for ident, frames in re.findall(r"hread (0x[0-9a-f]+)[^\n]*first\):\n((?:  [^\n]*\n)*)", dump)
    }
    shown = []
    for path, line, name in re.findall(r'File "(.*)", line (\d+) in (.*)', threads.get(thread, "")):
        if f"{os.sep}_pytest{os.sep}" in path or f"{os.sep}pluggy{os.sep}" in path:
            break
        shown.append(f"{path}:{line} in {name}\n    {linecache.getline(path, int(line)).strip()}")
    return "\n".join(shown) or dump.strip()


class _Lines:
    """The whole lines that another process has added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._file = open(path)
        self._begun = ""
        self.close = self._file.close

    def __iter__(self) -> Iterable[str]:
        *lines, self._begun = (self._begun + self._file.read()).split("\n")
        return iter(lines)


def _until(true: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(_POLL_SECONDS)


def _read(path: Path, start: int) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _tail(path: Path, start: int) -> str:
    return "".join(_read(path, start).splitlines(keepends=True)[-_TAIL_LINES:])
