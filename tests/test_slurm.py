"""The same scripts under Slurm: srun with PMIx, srun without it, and mpirun in an allocation.

A Slurm of one node is started for these tests and ended after them; no other Slurm is asked. That takes root and the
daemons. On Debian: `apt-get install slurm-wlm munge libpmix-dev` (srun loads libpmix.so, which only -dev has).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hybridpar.install import mpi
from tests.jobs import PRELUDE, Job, run_command
from tests.ranks.launch import environment
from tests.test_bad_input import refused
from tests.test_ending import ended

pytestmark = pytest.mark.timeout(240)  # the first test starts the daemons too

_NEEDED = ("munged", "slurmctld", "slurmd", "srun", "salloc", "sinfo", "scancel")
_START_SECONDS = 30.0
_CPUS = 8  # more than many machines have: Slurm then lets ranks share cores
_MUNGE_FILES = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
_OTHERS = ("SLURM", "PMI", "OMPI_", "OPAL_")  # how variables of another Slurm or an MPI begin

CONFIGURATION = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
TmpFS={folder}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
FirstJobId={first}
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of a Slurm of one node."""
    missing = [name for name in _NEEDED if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"no Slurm to start for these tests: {', '.join(missing)} not found")
    if os.geteuid() != 0:
        pytest.skip("only root can start a Slurm for these tests")
    folder = tmp_path_factory.mktemp("slurm")
    user = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{Path(sys.executable).parent}:{_path()}"}
    _configure(folder)
    with ExitStack() as stack:
        files = [f"--{file}={folder}/munge.{end}" for file, end in _MUNGE_FILES.items()]
        stack.enter_context(_daemon(["munged", "--foreground", "--force", *files], folder, user))
        _await(lambda: (folder / "munge.socket").exists(), "munged", folder)
        stack.enter_context(_daemon(["slurmctld", "-D", "-c"], folder, user))
        stack.enter_context(_daemon(["slurmd", "-D"], folder, user))
        _await(lambda: "idle" in _told(["sinfo", "--noheader", "--format=%t"], user), "slurmd", folder)
        yield user
        _told(["scancel", "--user=root"], user)


@pytest.fixture(scope="module")
def pmix(slurm: dict[str, str]) -> dict[str, str]:
    """The same, if srun's PMIx works."""
    if "here" not in _told(["srun", "--mpi=pmix", "--ntasks=1", "echo", "here"], slurm):
        pytest.skip("this Slurm cannot load PMIx (on Debian: apt-get install libpmix-dev)")
    return slurm


def _path() -> str:
    """PATH with the folders of daemons, which not every shell searches."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        controller, node = one.getsockname()[1], other.getsockname()[1]
    first = 1000 + secrets.randbelow(60_000_000)  # jobs of two runs must not be taken for one
    text = CONFIGURATION.format(host=host, controller=controller, node=node, folder=folder, first=first, cpus=_CPUS)
    (folder / "slurm.conf").write_text(text)
    version = re.search(r"(\d+)\.(\d+)", subprocess.check_output(["slurmd", "-V"], text=True, env={"PATH": _path()}))
    groups = "disabled" if version and (int(version[1]), int(version[2])) >= (23, 11) else "autodetect"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={groups}\nIgnoreSystemd=yes\n")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)


@contextmanager
def _daemon(command: list[str], folder: Path, user: dict[str, str]) -> Iterator[None]:
    """`command` in the background; what it says goes to a log of its name."""
    with open(folder / f"{command[0]}.said", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=_plain() | user, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(true: Callable[[], bool], name: str, folder: Path) -> None:
    limit = time.monotonic() + _START_SECONDS
    while not true():
        if time.monotonic() > limit:
            said = (folder / f"{name}.said").read_text().strip().splitlines()
            pytest.skip(f"Slurm did not come up here; {name} said: {said[-1] if said else 'nothing'}")
        time.sleep(0.2)


def _told(command: list[str], user: dict[str, str]) -> str:
    asked = subprocess.run(
        command, env=_plain() | user, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return asked.stdout


def _plain() -> dict[str, str]:
    """Our environment without what another Slurm or an MPI has put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}


def srun(folder: Path, user: dict[str, str], body: str, *options: str) -> Job:
    """PRELUDE and `body` under srun, from a shell in which nothing has been prepared for MPI."""
    (folder / "script.py").write_text(PRELUDE + body)
    plain = ["env", *(f"--unset={name}" for name in environment() if name.startswith(_OTHERS) and name not in user)]
    return run_command(folder, [*plain, "srun", "--quiet", *options, sys.executable, "script.py"], ranks=None, env=user)


TRAIN = """
mesh = hp.init(tensor=2)
import horovod.torch as hvd
from hybridpar.models.gpt import GPT
assert (hvd.rank(), hvd.size()) == (mesh.rank // 2, 2)
sums = [getattr(mesh, axis).allreduce(torch.tensor([mesh.rank])).item() for axis in ("data", "pipeline", "tensor")]
def gpt():
    torch.manual_seed(0)
    return GPT(vocabulary=12, width=8, depth=2, heads=2, context=8)
ids = torch.randint(12, (4, 9), generator=torch.Generator().manual_seed(0))
loss = torch.nn.functional.cross_entropy(gpt()(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
mine = ids[2 * mesh.place.data:][:2]
assert abs(model.train_step((mine[:, :-1], mine[:, 1:])) - loss) < 1e-5
optimizer.step()
sys.stdout.write(f"{mesh.rank} {sums}\\n")  # one write: mpirun may put another rank's between two
"""
ONE_FAILS = """
mesh = hp.init()
if mesh.rank == 1:
    raise KeyError("boom")
mesh.everyone.barrier()
"""
ONE_EXITS = """
mesh = hp.init()
if mesh.rank == 1:
    sys.exit(3)
mesh.everyone.barrier()
"""


def test_srun_with_pmix_runs_a_script_as_mpirun_does(tmp_path: Path, pmix: dict[str, str]) -> None:
    job = srun(tmp_path, pmix, TRAIN, "--mpi=pmix", "--ntasks=4")
    assert job.code == 0 and job.left == (), job.said
    assert sorted(job.out.splitlines()) == ["0 [2, 0, 1]", "1 [4, 1, 1]", "2 [2, 2, 5]", "3 [4, 3, 5]"]


def test_an_exception_ends_an_srun_and_is_told_once(tmp_path: Path, pmix: dict[str, str]) -> None:
    ended(srun(tmp_path, pmix, ONE_FAILS, "--mpi=pmix", "--ntasks=2"), 1, "KeyError: 'boom'")


def test_an_exit_code_ends_an_srun(tmp_path: Path, pmix: dict[str, str]) -> None:
    ended(srun(tmp_path, pmix, ONE_EXITS, "--mpi=pmix", "--ntasks=2"), 3, "[rank 1] hybridpar: sys.exit(3)")


def test_a_mistake_is_told_once_under_srun(tmp_path: Path, pmix: dict[str, str]) -> None:
    job = srun(tmp_path, pmix, "hp.init(tensor=3)\n", "--mpi=pmix", "--ntasks=2")
    refused(job, 2, "2 ranks cannot .*tensor=3.*start 3 ranks")


@pytest.mark.parametrize("kind", ["none", "pmi2"])
def test_srun_without_pmix_is_refused(tmp_path: Path, slurm: dict[str, str], kind: str) -> None:
    job = srun(tmp_path, slurm, "hp.init()\n", f"--mpi={kind}", "--ntasks=2")
    refused(job, 1, "started 2 processes .*MPI world of 1: srun .*`srun --mpi=pmix`, or mpirun inside")


def test_one_process_needs_no_pmix(tmp_path: Path, slurm: dict[str, str]) -> None:
    body = "mesh = hp.init()\nprint(mesh.mesh, 'SLURM_STEP_ID' in os.environ)\n"
    job = srun(tmp_path, slurm, body, "--mpi=none", "--ntasks=1")
    assert (job.code, job.said, job.left) == (0, "", ())
    assert job.out == "data=1 x pipeline=1 x tensor=1 True\n"


def test_mpirun_runs_a_script_in_an_allocation(tmp_path: Path, slurm: dict[str, str]) -> None:
    (tmp_path / "script.py").write_text(PRELUDE + "mesh = hp.init()\nsys.stdout.write(f'{mesh.rank} {mesh.mesh}\\n')\n")
    command = ["salloc", "--quiet", "--ntasks=2", *mpi.mpirun(2, [sys.executable, "script.py"])]
    job = run_command(tmp_path, command, ranks=None, env=slurm)
    assert job.code == 0 and job.left == (), job.said
    assert sorted(job.out.splitlines()) == [f"{rank} data=2 x pipeline=1 x tensor=1" for rank in (0, 1)]
