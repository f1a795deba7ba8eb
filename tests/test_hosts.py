"""Training on several hosts: where ranks stand, and that the numbers are those of one process.

The hosts are namespaces of this machine (tests/hosts/cluster.py): names, addresses, processes and ssh daemons are their
own.
Tolerances are those of tests/test_equality.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.hosts import train
from tests.hosts.cluster import Cluster, Seen, cluster, missing
from tests.jobs import marked
from tests.models import IGNORED, gpt, tokens
from tests.ranks.launch import CHECKOUT

pytestmark = pytest.mark.timeout(240)

HYBRIDPAR = [sys.executable, "-m", "hybridpar", "run"]
TRAIN = str(CHECKOUT / "tests" / "hosts" / "train.py")
CLOSE = 1e-10
PREFIX = Path(sys.prefix)
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # a plain mpirun else refuses
PYPI_MPI = (PREFIX / "lib" / "libmpi.so").exists()  # MPI from PyPI: it has to be told where it is


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path_factory.mktemp("four"), ["hpa", "hpb", "hpc", "hpd"]) as made:
        yield made


@pytest.fixture
def hosts(four: Cluster) -> Iterator[Cluster]:
    """Four hosts on which nothing runs, with quick and whole links."""
    yield four
    four.clear()


@pytest.fixture
def folder(four: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all hosts see."""
    made = four.folder / request.node.name
    made.mkdir()
    yield made
    shutil.rmtree(made)


@lru_cache(maxsize=1)
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same training in one process, in PyTorch alone."""
    model, losses = gpt(), []
    stepper = torch.optim.AdamW(model.parameters(), lr=train.LR, eps=train.EPS, weight_decay=train.DECAY)
    for step in range(train.STEPS):
        ids, targets = tokens(step)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def equal(seen: Seen, folder: Path, hosts: Cluster) -> None:
    """The job ended well, left nobody, and trained what one process trains."""
    assert seen.code == 0, seen
    assert hosts.left() == []
    trained = torch.load(folder / "trained.pt", weights_only=True)
    losses, weights = plain()
    assert max(abs(a - b) for a, b in zip(trained["losses"], losses, strict=True)) <= CLOSE
    assert trained["state"].keys() == weights.keys()
    for name, x in weights.items():
        assert (trained["state"][name] - x).abs().max() <= CLOSE, name


def places(folder: Path) -> list[dict[str, Any]]:
    """What each rank told of where it stands."""
    count = len(list(folder.glob("place-*")))
    return [json.loads((folder / f"place-{rank}.json").read_text()) for rank in range(count)]


def on(told: list[dict[str, Any]]) -> str:
    """The hosts of the ranks, by their last letters."""
    return "".join(place["host"][-1] for place in told)


def test_hosts_are_hosts(hosts: Cluster) -> None:
    seen = hosts.run("hpa", ["sh", "-c", "hostname; ls /tmp | wc -l; for h in hpb hpc hpd; do ssh $h hostname; done"])
    assert seen.out.split()[:1] + seen.out.split()[2:] == ["hpa", "hpb", "hpc", "hpd"], seen
    hosts.start("hpb", ["sleep", "100"])
    limit = time.monotonic() + 10
    while not hosts.find("hpb", "sleep", "100"):
        assert time.monotonic() < limit
    assert hosts.find("hpa", "sleep") == []
    hosts.cut("hpb")
    cut = hosts.run("hpa", ["ssh", "-o", "ConnectTimeout=1", "hpb", "true"])
    assert cut.code == 255 and "timed out" in cut.said
    hosts.mend("hpb")
    assert hosts.run("hpa", ["ssh", "hpb", "hostname"]).out == "hpb\n"
    hosts.clear()
    assert hosts.left(2) == []


def test_hosts_do_not_outlive_the_process_that_made_them(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    body = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.hosts.cluster import cluster\n"
        "folder = Path(sys.argv[1])\n"
        "with cluster(folder, ['hpa', 'hpb']) as made:\n"
        "    made.start('hpb', ['sh', '-c', f': {folder}; sleep 1000; :'])\n"
        "    print('up', flush=True)\n    time.sleep(1000)\n"
    )
    line = [sys.executable, "-c", body, str(tmp_path)]
    with subprocess.Popen(line, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert len(marked(str(tmp_path))) > 3
        process.kill()
    limit = time.monotonic() + 10
    while marked(str(tmp_path)):
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_tensor_peers_share_a_host_and_training_equals_one_process(hosts: Cluster, folder: Path) -> None:
    line = [*HYBRIDPAR, "-H", "hpa:2,hpb:2", "--tensor", "2", TRAIN, str(folder)]
    equal(hosts.run("hpa", line, folder), folder, hosts)
    told = places(folder)
    assert on(told) == "aabb"
    assert [place["place"] for place in told] == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert [place["local rank"] for place in told] == [0, 1, 0, 1]
    # rank, size, local rank, local size, cross rank, cross size on the data axis, whose ranks are on two hosts
    assert [place["horovod"] for place in told] == [[0, 2, 0, 1, 0, 2]] * 2 + [[1, 2, 0, 1, 1, 2]] * 2


def test_plain_horovodrun_trains_on_two_hosts(hosts: Cluster, folder: Path) -> None:
    """As docs/clusters.md says it; one pipeline of four stages, which crosses the link once."""
    prefix = ["--mpi-args", f"--prefix {PREFIX}"] if PYPI_MPI else []
    line = ["horovodrun", "-np", "4", "-H", "hpa:2,hpb:2", "--mpi", *prefix, "python", TRAIN, str(folder)]
    env = {"OPAL_PREFIX": str(PREFIX)} if PYPI_MPI else {}
    seen = hosts.run("hpa", line, folder, {**env, "HYBRIDPAR_PIPELINE": "4"})
    equal(seen, folder, hosts)
    assert on(places(folder)) == "aabb"


def test_eight_ranks_as_two_by_two_by_two_on_two_hosts(hosts: Cluster, folder: Path) -> None:
    line = [*HYBRIDPAR, "-H", "hpa:4,hpb:4", "--tensor", "2", "--pipeline", "2", TRAIN, str(folder)]
    equal(hosts.run("hpa", line, folder), folder, hosts)
    told = places(folder)
    assert on(told) == "aaaabbbb"
    assert [place["horovod"][:2] for place in told] == [[0, 2]] * 4 + [[1, 2]] * 4


def test_four_hosts_from_a_hostfile_take_a_pipeline_each_its_own_number_of_ranks(hosts: Cluster, folder: Path) -> None:
    (folder / "hosts").write_text("hpb slots=2\nhpa slots=1  # where we start\nhpd slots=3\nhpc\n")
    line = [*HYBRIDPAR, "--hostfile", "hosts", "-np", "4", "--pipeline", "2", TRAIN, str(folder)]
    equal(hosts.run("hpc", line, folder), folder, hosts)
    assert on(places(folder)) == "bbad"


def test_gloo_finds_the_other_hosts(hosts: Cluster, folder: Path) -> None:
    line = [*HYBRIDPAR, "-H", "hpa:2,hpb:2", "--pipeline", "4", "--carrier", "gloo", TRAIN, str(folder)]
    equal(hosts.run("hpa", line, folder), folder, hosts)


def test_the_commands_of_the_page_lead_to_a_run_on_two_hosts(tmp_path: Path) -> None:
    """Those that need no other network: copying the project to the other host, and each way to start the script."""
    if missing():
        pytest.skip(missing())
    page = (CHECKOUT / "docs" / "clusters.md").read_text()
    words = ("tar", ".", "hybridpar run -H", *(("export", "mpirun") if PYPI_MPI else ()))
    lines = re.findall(rf"^    ((?:{'|'.join(map(re.escape, words))}) .*)$", page, re.MULTILINE)
    here = with_venv(tmp_path / "project")
    (here / "train.py").write_text(re.search(r"`train.py`:\n\n```python\n(.*?)```", page, re.DOTALL)[1])
    commands = ["set -e", f"cp -r {here} /tmp/project", "cd /tmp/project", *lines]
    with cluster(tmp_path, ["node1", "node2"]) as hosts:  # each has a /tmp of its own
        seen = hosts.run("node1", ["sh", "-c", "\n".join(commands)], env=AS_ROOT, seconds=200)
        assert seen.code == 0, seen
        told = re.findall(r"(data=\d) x pipeline=1 x (tensor=\d): loss [\d.]+$", seen.out, re.MULTILINE)
        assert told == [("data=2", "tensor=2")] + [("data=4", "tensor=1")] * PYPI_MPI, seen.out
        assert hosts.left() == []


def test_a_function_is_called_on_other_hosts_too(hosts: Cluster) -> None:
    body = (
        "import socket, hybridpar as hp\n"
        "told = hp.run(lambda add: (socket.gethostname(), hp.init().rank + add), [5], hosts='hpa:1,hpb:2')\n"
        "print(told, flush=True)\n"
    )
    seen = hosts.run("hpa", [sys.executable, "-c", body])
    assert (seen.code, seen.out) == (0, "[('hpa', 5), ('hpb', 6), ('hpb', 7)]\n"), seen
    assert hosts.left() == []


def with_venv(folder: Path) -> Path:
    """`folder` with a .venv that leads to ours, and in it a `hybridpar` even where that is not installed."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    paths = f'export VIRTUAL_ENV={PREFIX} PATH="{programs}:{Path(sys.executable).parent}:$PATH"\n'
    (programs / "activate").write_text(paths)
    (programs / "hybridpar").write_text(f'#!/bin/sh\nexec {sys.executable} -m hybridpar "$@"\n')
    (programs / "hybridpar").chmod(0o755)
    return folder


def test_a_narrow_link_trains_the_same(hosts: Cluster, folder: Path) -> None:
    hosts.limit("20mbit")
    line = [*HYBRIDPAR, "-H", "hpa:1,hpb:1", "--pipeline", "2", TRAIN, str(folder), "3", "interleaved"]
    equal(hosts.run("hpa", line, folder), folder, hosts)


def test_a_long_link_trains_the_same(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path, ["hpa", "hpb"], delay_seconds=0.005) as hosts:
        line = [*HYBRIDPAR, "-H", "hpa:1,hpb:1", "--network-interface", "eth0", TRAIN, str(tmp_path)]
        equal(hosts.run("hpa", line, tmp_path), tmp_path, hosts)
