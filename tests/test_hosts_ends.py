"""How jobs on several hosts end: nobody is left on any host, it takes seconds, and the code and the words say why.

Each is a job as users start it, on hosts made of namespaces (tests/hosts/cluster.py). What holds on one host is in
tests/test_ending.py.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.hosts.cluster import Cluster, Running, Seen, cluster, missing
from tests.test_hosts import HYBRIDPAR, TRAIN

pytestmark = pytest.mark.timeout(200)

ON_TWO = [*HYBRIDPAR, "-H", "hpa:1,hpb:1"]
FOR_EVER = "1000000"
START = "import sys\nimport hybridpar as hp\nmesh = hp.init()\n"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path_factory.mktemp("two"), ["hpa", "hpb"]) as made:
        yield made


@pytest.fixture
def hosts(two: Cluster) -> Iterator[Cluster]:
    """Two hosts on which nothing runs."""
    yield two
    two.clear()


@pytest.fixture
def folder(two: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that both hosts see."""
    made = two.folder / request.node.name
    made.mkdir()
    yield made
    shutil.rmtree(made)


def training(hosts: Cluster, folder: Path, *options: str) -> Running:
    """A job that trains for ever, a rank on each host, and has begun to."""
    running = hosts.start("hpa", [*ON_TWO, *options, TRAIN, str(folder), FOR_EVER], folder)
    running.await_line("step 3")
    return running


def the(hosts: Cluster, host: str, which: str) -> psutil.Process:
    """One process of the job on `host`: its "rank", "orted", "mpirun", or the "launcher"."""
    found = []
    for one in hosts.processes(host):
        line = one.cmdline()
        program, launches = Path(line[0]).name, line[1:4] == ["-m", "hybridpar", "run"]
        is_rank = program.startswith("python") and TRAIN in line and not launches
        found += [one] if which == ("launcher" if launches else "rank" if is_rank else program) else []
    (process,) = found
    return process


def ended(hosts: Cluster, seen: Seen, *codes: int, said: str = "", times: int = 1) -> None:
    """It ended with one of these codes, told `said` so many times at most, and left nobody on any host."""
    assert seen.code in codes, seen
    ours = [line for line in seen.lines(said) if not re.match(r"\[hp.\]\[\[", line)]  # Open MPI has pages of its own
    assert not said or 1 <= len(ours) <= times, seen.said
    assert hosts.left() == []


def script(folder: Path, body: str) -> str:
    path = folder / "script.py"
    path.write_text(START + body)
    return str(path)


def test_a_cut_link_ends_the_job_on_both_sides(hosts: Cluster, folder: Path) -> None:
    running = training(hosts, folder)
    hosts.cut("hpb")
    ended(hosts, running.end(60), 75, said="hpb", times=2)  # a rank and the launcher may both notice


def test_a_job_outlives_a_short_cut_and_a_signal_ends_it_everywhere(hosts: Cluster, folder: Path) -> None:
    running = training(hosts, folder)
    hosts.cut("hpb")
    with pytest.raises(AssertionError, match="no 'step 1000000"):
        running.await_line("step 1000000", seconds=2)
    hosts.mend("hpb")
    steps = running.out.count("step")
    running.await_line("step", times=steps + 20)
    launcher = the(hosts, "hpa", "launcher")
    launcher.send_signal(signal.SIGTERM)
    ended(hosts, running.end(60), 143)


@pytest.mark.parametrize(
    ("host", "which", "codes"),
    [
        ("hpb", "rank", (137,)),
        ("hpb", "orted", (1, 75, 205)),
        ("hpa", "mpirun", (137,)),
        ("hpa", "launcher", (137,)),
    ],
    ids=["rank", "orted", "mpirun", "launcher"],
)
def test_a_kill_leaves_nobody(hosts: Cluster, folder: Path, host: str, which: str, codes: tuple[int, ...]) -> None:
    running = training(hosts, folder)
    the(hosts, host, which).kill()
    ended(hosts, running.end(60), *codes)


def test_a_stopped_rank_ends_the_job(hosts: Cluster, folder: Path) -> None:
    running = training(hosts, folder, "--env", "HYBRIDPAR_SILENT_SECONDS=10")
    the(hosts, "hpb", "rank").suspend()
    ended(hosts, running.end(60), 75, said="hpb")


def test_an_exception_on_another_host_is_told_once(hosts: Cluster, folder: Path) -> None:
    body = "if mesh.rank == 1:\n    raise KeyError('boom')\nmesh.everyone.barrier()\n"
    seen = hosts.run("hpa", [*ON_TWO, script(folder, body)], folder)
    ended(hosts, seen, 1, said="[rank 1] KeyError: 'boom'")


def test_the_same_exception_on_all_hosts_is_told_once(hosts: Cluster, folder: Path) -> None:
    line = [*HYBRIDPAR, "-H", "hpa:2,hpb:2", script(folder, "raise KeyError('boom')\n")]
    ended(hosts, hosts.run("hpa", line, folder), 1, said="KeyError: 'boom'")


def test_an_exit_code_comes_from_another_host(hosts: Cluster, folder: Path) -> None:
    body = "if mesh.rank == 1:\n    sys.exit(7)\nmesh.everyone.barrier()\n"
    ended(hosts, hosts.run("hpa", [*ON_TWO, script(folder, body)], folder), 7)


def test_a_host_that_is_not_there_is_told_in_a_sentence(hosts: Cluster, folder: Path) -> None:
    line = [*HYBRIDPAR, "-H", "hpa:1,nowhere:1", script(folder, "")]
    seen = hosts.run("hpa", line, folder, seconds=30)
    ended(hosts, seen, 69, said="nowhere")
    assert len(seen.said.splitlines()) == 1, seen.said
    hosts.cut("hpb")
    seen = hosts.run("hpa", [*ON_TWO, script(folder, "")], folder, seconds=30)
    ended(hosts, seen, 69, said="hpb")
    assert len(seen.said.splitlines()) == 1, seen.said


def test_a_folder_that_only_one_host_has_is_told_in_a_sentence(hosts: Cluster, folder: Path) -> None:
    hosts.run("hpa", ["cp", "-r", str(folder), "/tmp/mine"])
    hosts.run("hpa", ["sh", "-c", "echo pass > /tmp/mine/script.py"])
    seen = hosts.run("hpa", [*ON_TWO, "script.py"], Path("/tmp/mine"))
    ended(hosts, seen, 69, said="/tmp/mine")
    assert len(seen.said.splitlines()) == 1, seen.said


def test_a_tensor_group_is_not_torn_between_hosts(hosts: Cluster, folder: Path) -> None:
    line = [*HYBRIDPAR, "-H", "hpa:3,hpb:1", "--tensor", "2", script(folder, "")]
    ended(hosts, hosts.run("hpa", line, folder), 2, said="hpa:3,hpb:1 hold 1 + 0 whole ones")


def test_a_host_without_power_ends_the_job_on_the_other(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path, ["hpa", "hpb"]) as hosts:
        running = training(hosts, tmp_path)
        hosts.switch_off("hpb")
        ended(hosts, running.end(60), 75, said="hpb", times=2)
