"""A rank: `mpirun -np N python -m tests.ranks.worker FOLDER`, started by launch.py.

Collects the plan's tests with a pytest of its own, then runs each when it is ordered to, and writes down what came out.
All coordination is in files: a rank that is stuck in MPI can still be seen, asked where it waits, and ended.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from types import ModuleType


class RankPlugin:
    """Makes this process's pytest run what it is ordered to."""

    __name__ = "ranks-worker"  # tests/ranks/plugin.py looks for it

    def __init__(self, folder: Path, plan: dict[str, Any], rank: int) -> None:
        self._plan = plan
        self._rank = rank
        self._orders = folder / "orders.jsonl"
        self._records = open(folder / f"records-{rank}.jsonl", "a")
        self._log = folder / f"rank-{rank}.log"
        self._broken: list[str] = []
        self._order: dict[str, Any] = {}
        self._reports: list[pytest.TestReport] = []
        self._printed = 0

    def say(self, record: dict[str, Any]) -> None:
        self._records.write(json.dumps(record) + "\n")
        self._records.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        # The reporter has no reader here, but pytest's assertions ask it for its colours.
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(pytest.TerminalReporter(config, open(os.devnull, "w")), "terminalreporter")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._broken.append(str(report.longrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        self._broken += [f"{test} is not collected here" for test in self._plan["tests"] if test not in found]
        items[:] = [found[test] for test in self._plan["tests"] if test in found]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self._broken:
            self.say({"broken": "\n".join(self._broken)})
            return True
        self.say({"pid": os.getpid(), "thread": threading.main_thread().ident})
        following = {item.nodeid: after for item, after in zip(session.items, [*session.items[1:], None])}
        found = {item.nodeid: item for item in session.items}
        for order in self._ordered():
            test, self._order = order["test"], order
            self._reports, self._printed = [], self._log.stat().st_size
            session.config.hook.pytest_runtest_protocol(item=found[test], nextitem=following[test])
            self.say(self._record(session.config))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        sys.stdout.flush()
        with open(self._log, "rb") as log:
            log.seek(self._printed)
            text = log.read().decode(errors="replace")
        self._printed = self._log.stat().st_size
        if text:
            report.sections.append((f"Captured output of rank {self._rank} in its {call.when}", text))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    @pytest.fixture
    def tmp_path(self) -> Path:
        """One folder for all ranks of the test."""
        return Path(self._order["folder"])

    def _ordered(self) -> Iterator[dict[str, Any]]:
        text = ""
        with open(self._orders) as orders:
            while True:
                text += orders.readline()
                if not text.endswith("\n"):
                    time.sleep(0.005)
                    continue
                yield json.loads(text)
                text = ""

    def _record(self, config: pytest.Config) -> dict[str, Any]:
        failed = [report for report in self._reports if report.failed]
        crash = getattr(failed[0].longrepr, "reprcrash", None) if failed else None
        skipped = any(report.skipped for report in self._reports)
        return {
            "outcome": "failed" if failed else "skipped" if skipped else "passed",
            "seconds": failed[0].stop if failed else 0.0,
            "place": f"{crash.path}:{crash.lineno}" if crash else "",
            "reports": [config.hook.pytest_report_to_serializable(config=config, report=r) for r in self._reports],
        }


def start_mpi() -> ModuleType:
    """MPI with all threads, before torch or Horovod could load it with fewer."""
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    from mpi4py import MPI

    return MPI


def main(folder: Path) -> NoReturn:
    MPI = start_mpi()
    plan, rank = json.loads((folder / "plan.json").read_text()), MPI.COMM_WORLD.rank
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = open(folder / f"stack-{rank}.txt", "w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack)
    threading.Thread(target=_leave_with, args=(plan["parent"],), daemon=True).start()
    plugin = RankPlugin(folder, plan, rank)
    size, level = MPI.COMM_WORLD.size, MPI.Query_thread()
    if (size, level) != (plan["size"], MPI.THREAD_MULTIPLE):
        plugin.say({"broken": f"MPI has {size} ranks and thread level {level}: mpirun is of another MPI than mpi4py"})
        sys.exit(1)
    code = pytest.main([f"--basetemp={folder / f'tmp-{rank}'}", *plan["arguments"]], plugins=[plugin])
    sys.exit(0 if code == pytest.ExitCode.OK else int(code))


def _leave_with(parent: int) -> None:
    """A pytest that was killed cannot end its launch: then the ranks must leave by themselves."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
