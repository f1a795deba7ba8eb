"""pytest's side of multi-rank tests: launches ranks when the first test needs them and has each test run there.

Tests run in order of their rank count, ordinary ones first, so that one launch carries all tests of one count. After
a test that did not end alike on all ranks they are launched anew: what it left in MPI's queues must not reach the next.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.launch import Launch, LaunchFailed
from tests.ranks.verdict import merged, refused

# A rank reads the same configuration as we do, but its output goes to a file, and its stacks to another.
_RANK_OPTIONS = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=no"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(*counts, timeout=60): run on each of these numbers of MPI ranks")
    if not config.pluginmanager.hasplugin("ranks-worker"):
        config.pluginmanager.register(_Launcher(config), "ranks-launcher")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is not None:
        if "rank_count" not in metafunc.fixturenames:
            metafunc.fixturenames.append("rank_count")
        metafunc.parametrize("rank_count", mark.args, ids=[f"{n}ranks" for n in mark.args])


def rank_count(item: pytest.Item) -> int:
    """On how many ranks `item` runs; 0 for an ordinary test."""
    ranked = item.get_closest_marker("ranks") is not None
    return item.callspec.params["rank_count"] if ranked else 0


class _Launcher:
    """Keeps at most one launch alive, and runs multi-rank tests in it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._launch: Launch | None = None
        self._folder: Path | None = None
        self._refusals: dict[int, str] = {}
        self._count = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=rank_count)
        for item in items:
            if rank_count(item) and self._config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(0))  # the launch has its own limit, and can say where ranks wait

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not rank_count(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        self._end()

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        size = rank_count(item)
        if size in self._refusals:
            return [refused(item, self._refusals[size])]
        try:
            launch = self._launched(item)
        except LaunchFailed as error:
            self._refusals[size] = str(error)  # it would fail again, after the same wait, for each test
            return [refused(item, str(error))]
        run = launch.run(item.nodeid, self._new_folder("test"), item.get_closest_marker("ranks").kwargs["timeout"])
        if not run.alike:
            self._end()
        return merged(self._config, item, run)

    def _launched(self, item: pytest.Item) -> Launch:
        size = rank_count(item)
        if self._launch is None or self._launch.size != size:
            self._end()
            items = item.session.items
            rest = [other for other in items[items.index(item) :] if rank_count(other) == size]
            plan = {
                "arguments": [*self._options(), *dict.fromkeys(str(other.path) for other in rest)],
                "tests": [other.nodeid for other in rest],
            }
            self._launch = Launch(size, self._new_folder("launch"), self._config.rootpath, plan)
        return self._launch

    def _options(self) -> list[str]:
        """What shapes a rank's tests and reports as it would shape ours."""
        option = self._config.option
        options = [*_RANK_OPTIONS, f"--rootdir={self._config.rootpath}", f"--tb={option.tbstyle}"]
        options += ["-c", str(self._config.inipath)] if self._config.inipath else []
        options += ["-v"] * max(option.verbose, 0) + ["--showlocals"] * option.showlocals
        options += [text for given in option.pythonwarnings or () for text in ("-W", given)]
        return options + [text for given in option.override_ini or () for text in ("-o", given)]

    def _new_folder(self, kind: str) -> Path:
        if self._folder is None:
            self._folder = self._config._tmp_path_factory.mktemp("ranks")  # pytest removes old ones
        self._count += 1
        folder = self._folder / f"{kind}-{self._count}"
        folder.mkdir()
        return folder

    def _end(self) -> None:
        if self._launch is not None:
            launch, self._launch = self._launch, None
            launch.end()
