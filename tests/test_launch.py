"""The launch, without a job: hosts, placement, lines, what hosts tell, what mpirun's pages become. Then small jobs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hybridpar as hp
from hybridpar.install.probe import prefix, scripts
from hybridpar.launch import lines
from hybridpar.launch.hosts import Host, allocated, expand, parse, read, read_file
from hybridpar.launch.interfaces import shared_networks
from hybridpar.launch.job import Job, plan
from hybridpar.launch.pages import Pages
from hybridpar.launch.placement import Placement, place
from hybridpar.launch.reach import checked
from hybridpar.launch.wishes import Wishes, setting
from hybridpar.mesh import Mesh

CHECKOUT = Path(__file__).parents[1]
A4_B4 = (Host("a", 4), Host("b", 4))
EDGE = "-" * 74


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("print('hello')\n")
    return path


def planned(script: Path, ranks: int | None = None, env: dict[str, str] | None = None, **asked: object) -> Job:
    """A plan for a machine with 16 cores; what is no degree is a wish."""
    degrees = {name: asked.pop(name) for name in ("tensor", "pipeline", "data") if name in asked}
    wishes = Wishes(**asked)  # type: ignore[arg-type]
    return plan(ranks, [str(script)], env or {}, scripts(), prefix(), 16, **degrees, wishes=wishes)  # type: ignore[arg-type]


# ---- hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a:4,b:4", A4_B4),
        (" a:4 , b:4 ,", A4_B4),
        ("a,a,b:4,a:2", A4_B4),
        ("10.0.0.1:2", (Host("10.0.0.1", 2),)),
        ("[fd00::1]:2,n1.site-x.org", (Host("[fd00::1]", 2), Host("n1.site-x.org", 1))),
    ],
)
def test_hosts_of_the_command_line_are_read(text: str, hosts: tuple[Host, ...]) -> None:
    assert parse(text) == hosts


@pytest.mark.parametrize(
    "text",
    ["a slots=4\nb slots=4", "# all\na slots = 4 max_slots=8 # first\n\nb slots=4\n", "a:4\nb:4", "a\nb\n" * 4],
    ids=["Open MPI and Horovod", "with comments", "MPICH", "a line for each slot"],
)
def test_hostfiles_of_every_kind_are_read(text: str) -> None:
    assert read(text, "hosts") == A4_B4


@pytest.mark.parametrize(
    ("environment", "system", "hosts"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[08-09],x", "SLURM_TASKS_PER_NODE": "4(x2),1"}, "Slurm",
         "n08:4,n09:4,x:1"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_CPUS_PER_NODE": "8"}, "Slurm", "n1:8"),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "a 4 b 2"}, "LSF", "a:4,b:2"),
        ({"LSB_JOBID": "1", "LSB_HOSTS": "a a b"}, "LSF", "a:2,b:1"),
        ({"PBS_JOBID": "1", "PBS_NODEFILE": "nodes"}, "PBS", "a:2,b:1"),
        ({"LSB_JOBID": "1", "LSB_DJOB_HOSTFILE": "nodes"}, "LSF", "a:2,b:1"),
        ({"JOB_ID": "1", "PE_HOSTFILE": "engine"}, "Grid Engine", "a:4,b:2"),
        ({"OMPI_MCA_orte_default_hostfile": "operator"}, "MPI operator", "w-0:2,w-1:2"),
    ],
)  # fmt: skip
def test_what_a_batch_system_has_given_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], system: str, hosts: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nodes").write_text("a\na\nb\n")
    Path("engine").write_text("a 4 all.q@a UNDEFINED\nb 2 all.q@b UNDEFINED\n")
    Path("operator").write_text("w-0 slots=2\nw-1 slots=2\n")
    found = allocated(environment)
    assert found is not None and (found.system, found.hosts) == (system, parse(hosts))


def test_without_a_batch_system_nothing_is_given() -> None:
    assert allocated({"SLURM_CONF": "/etc/slurm.conf", "PBS_HOME": "/x"}) is None


def test_slurm_s_short_names_are_expanded() -> None:
    assert expand("r[1-2]c[01-02],login") == ["r1c01", "r1c02", "r2c01", "r2c02", "login"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:0", "'a:0' has no number of slots"),
        ("a:x", "'a:x' has no number of slots"),
        ("me@a:1", "names a user"),
        ("a b:1", "no host name"),
        (",", "names no host"),
    ],
)
def test_what_is_no_host_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(text)


def test_a_line_of_a_hostfile_that_is_no_host_is_named() -> None:
    with pytest.raises(ValueError, match="my hosts, line 2: 'b with 4' is no host"):
        read("a slots=4\nb with 4\n", "my hosts")
    with pytest.raises(ValueError, match="my hosts names no host"):
        read("# nothing\n", "my hosts")


# ---- placement


def test_a_hostfile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\x7fELF\xd0\xd0")
    with pytest.raises(ValueError, match="hosts is no text"):
        read_file(tmp_path / "hosts")


@given(tensor=st.integers(1, 8), groups=st.integers(1, 12), slots=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_no_tensor_group_is_torn_unless_it_must_be_and_then_it_is_told(
    tensor: int, groups: int, slots: list[int]
) -> None:
    mesh, hosts = Mesh(data=groups, tensor=tensor), [Host(f"h{i}", n) for i, n in enumerate(slots)]
    try:
        placed = place(mesh, hosts)
    except ValueError:
        assert sum(n // tensor for n in slots) < groups and tensor <= max(slots) or sum(slots) < mesh.size
        return
    assert sum(host.slots for host in placed.hosts) == mesh.size
    room = {host.name: host.slots for host in hosts}
    assert all(host.slots <= room[host.name] for host in placed.hosts)
    torn = [r for r in range(0, mesh.size, tensor) if len({placed.host_of(q) for q in range(r, r + tensor)}) > 1]
    assert bool(placed.warning) == (tensor > max(slots))
    assert placed.warning or not torn


def test_ranks_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="8 ranks do not fit into the 6 slots of a:4,b:2"):
        place(Mesh(data=8), parse("a:4,b:2"))
    with pytest.raises(ValueError, match="need 4 groups, and a:3,b:5 hold 1 [+] 2 whole ones"):
        place(Mesh(data=4, tensor=2), parse("a:3,b:5"))


# ---- lines


def test_the_line_for_several_hosts_names_them_and_passes_the_environment_on(script: Path) -> None:
    job = planned(script, env={"WANDB_MODE": "offline", "SSH_TTY": "/dev/pts/1"}, hosts="a:4,b:4", tensor=2)
    line = list(job.command)
    assert line[line.index("-H") + 1] == "a:4,b:4"
    assert line[line.index("--wdir") + 1] == os.getcwd()
    named = [word for before, word in zip(line, line[1:]) if before == "-x"]
    assert {"PATH", "WANDB_MODE", "HYBRIDPAR_TENSOR", "OMP_NUM_THREADS"} <= set(named)
    assert not [name for name in named if name.startswith(("SSH_", "OMPI_"))]
    assert "offline" not in shlex.join(line)  # values may be secret, and lines are seen by all
    assert job.environment["OMP_NUM_THREADS"] == "4"
    assert job.environment["OMPI_MCA_oob_tcp_keepalive_time"] == "5"
    assert "BatchMode=yes" in job.environment["OMPI_MCA_plm_rsh_args"]


def test_hosts_take_fewer_ranks_than_they_have_slots_for(script: Path) -> None:
    line = planned(script, 6, hosts="a:3,b:8", tensor=2).command
    assert line[line.index("-H") + 1] == "a:2,b:4"


def test_options_of_ssh_and_of_the_network_reach_mpi(script: Path) -> None:
    job = planned(
        script, hosts="a,b", ssh_port=2222, ssh_identity="/k", network_interface="eth1", threads=3,
        sets=(("A", "b c"), ("SSH_ASKPASS", None)), env={"SSH_ASKPASS": "x"}, mpi_args="--mca pml ob1",
    )  # fmt: skip
    assert shlex.split(job.environment["OMPI_MCA_plm_rsh_args"])[-4:] == ["-p", "2222", "-i", "/k"]
    assert job.environment["OMPI_MCA_btl_tcp_if_include"] == "eth1"
    assert job.environment["A"] == "b c" and job.environment["OMP_NUM_THREADS"] == "3"
    assert {"A", "SSH_ASKPASS"} <= set(job.command)
    assert "--mca pml ob1" in shlex.join(job.command)


def test_this_host_alone_needs_no_ssh(script: Path) -> None:
    job = planned(script, 3, hosts="localhost:4")
    assert job.reach == () and "-H" not in job.command


def test_a_batch_system_s_own_start_is_used(script: Path, tmp_path: Path) -> None:
    for name in ("blaunch", "pbs_tmrsh"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nodes").write_text("a\nb\n")
    lsf = planned(script, env={"LSB_JOBID": "1", "LSB_HOSTS": "a b", "PATH": str(tmp_path)})
    assert lsf.environment["OMPI_MCA_plm_rsh_agent"] == "blaunch" and lsf.reach == ()
    pbs = planned(script, env={"PBS_JOBID": "1", "PBS_NODEFILE": str(tmp_path / "nodes"), "PATH": str(tmp_path)})
    assert pbs.environment["OMPI_MCA_plm_rsh_agent"] == "pbs_tmrsh" and pbs.reach == ()


def test_a_slurm_allocation_that_offers_pmix_is_started_by_srun(script: Path, tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)"}
    slurm |= {"SLURM_JOB_CPUS_PER_NODE": "32(x2)", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "srun").write_text("#!/bin/sh\necho 'MPI plugin types are...'; echo 'pmix'\n")
    (tmp_path / "srun").chmod(0o755)
    line = planned(script, env=slurm, tensor=4).command
    assert line[:2] == ("srun", "--mpi=pmix")
    assert {"--ntasks=8", "--nodes=2", "--ntasks-per-node=4", "--nodelist=n1,n2", "--cpus-per-task=8"} <= set(line)
    (tmp_path / "srun").write_text("#!/bin/sh\necho none\n")
    job = planned(script, env=slurm)
    assert Path(job.command[0]).name == "mpirun" and job.reach == ()
    with pytest.raises(ValueError, match="srun cannot give n1:4,n2:1 different numbers"):
        planned(script, 5, env=slurm, launcher="srun")
    with pytest.raises(ValueError, match="needs a Slurm allocation"):
        planned(script, 2, launcher="srun")


def test_horovodrun_is_used_on_request(script: Path) -> None:
    line = planned(script, hosts="a:2,b:2", launcher="horovodrun", ssh_port=2222, network_interface="eth0").command
    assert Path(line[0]).name == "horovodrun"
    options = "-np 4 --mpi --disable-cache -H a:2,b:2 -p 2222 --network-interfaces eth0"
    assert options in shlex.join(line)


@pytest.mark.parametrize(
    ("version", "launcher", "sentence"),
    [
        (
            "HYDRA build details:\n    Version:                                 4.3.2",
            "auto",
            "is that of MPICH .*, and .* Open MPI",
        ),
        ("mpirun (Open MPI) 5.0.11", "horovodrun", "horovodrun .* Open MPI 5.0.11 does not know: .*--launcher mpirun"),
    ],
)
def test_another_mpi_is_refused_in_a_sentence(
    script: Path, tmp_path: Path, version: str, launcher: str, sentence: str
) -> None:
    for name in ("mpirun", "horovodrun"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{version}'\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises((RuntimeError, ValueError), match=sentence):
        plan(2, [str(script)], {"PATH": "/usr/bin"}, tmp_path, tmp_path, 2, wishes=Wishes(launcher=launcher))


def test_binding_leaves_each_rank_the_cores_of_its_threads() -> None:
    there, core = Placement((Host("a", 2),)), Wishes(bind_to="core", threads=4)
    bound = shlex.join(lines.mpirun("/usr/bin/mpirun", 2, there, core, [], "/"))
    assert bound == "/usr/bin/mpirun -np 2 --map-by slot:PE=4 --bind-to core -H a:2 --wdir /"
    bound = shlex.join(lines.mpirun("/usr/bin/mpirun", 2, None, core, [], "/"))
    assert bound == "/usr/bin/mpirun -np 2 --map-by slot:PE=4,OVERSUBSCRIBE --bind-to core"
    free = shlex.join(lines.mpirun("/usr/bin/mpirun", 2, None, Wishes(), [], "/"))
    assert free == "/usr/bin/mpirun -np 2 --map-by slot:OVERSUBSCRIBE --bind-to none"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"launcher": "jsrun"}, "--launcher 'jsrun' is unknown: use auto, mpirun, srun, horovodrun"),
        ({"bind_to": "disk"}, "--bind-to 'disk'"),
        ({"hosts": "a", "hostfile": "h"}, "give one"),
        ({"threads": 0}, "--threads 0"),
        ({"ssh_port": 70000}, "--ssh-port 70000"),
        ({"mpi_args": '"open'}, "--mpi-args '\"open' cannot be split into options .no closing quotation"),
    ],
)
def test_wishes_that_cannot_be_are_refused(asked: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Wishes(**asked)  # type: ignore[arg-type]


def test_settings_of_the_environment_are_read() -> None:
    assert setting("A=b=c") == ("A", "b=c") and setting("A") == ("A", None) and setting("A=") == ("A", "")
    with pytest.raises(ValueError, match="has no name"):
        setting("=b")


def test_how_many_ranks_must_be_known(script: Path) -> None:
    with pytest.raises(ValueError, match="how many ranks"):
        planned(script)
    assert planned(script, hosts="a:2,b:2").mesh.size == 4
    assert planned(script, hosts="a:2,b:2", tensor=2).mesh.data == 2
    assert planned(script, tensor=2, pipeline=2).mesh == Mesh(pipeline=2, tensor=2)
    assert planned(script, data=3).mesh == Mesh(data=3)
    with pytest.raises(ValueError, match="tensor=0: a degree"):
        planned(script, tensor=0)


def test_a_variable_that_is_not_set_cannot_be_passed_on(script: Path) -> None:
    with pytest.raises(ValueError, match="--env FOO: FOO is not set here"):
        planned(script, 2, sets=(("FOO", None),))
    assert planned(script, 2, env={"FOO": "1"}, sets=(("FOO", None),)).environment["FOO"] == "1"


def test_a_rank_starts_no_job(script: Path) -> None:
    with pytest.raises(ValueError, match="itself a rank of a job .OMPI_COMM_WORLD_RANK=1."):
        planned(script, 2, env={"OMPI_COMM_WORLD_RANK": "1"})


# ---- what hosts tell


def test_networks_of_containers_are_left_out() -> None:
    a, b = ["10.0.0.1/24", "172.17.0.1/16"], ["10.0.0.2/24", "172.17.0.1/16"]
    assert shared_networks({"a": a, "b": b}) == ("10.0.0.0/24",)
    assert shared_networks({"a": a[:1], "b": b[:1]}) == ()  # nothing to leave out
    assert shared_networks({"a": ["10.0.0.1/24"], "b": ["10.9.0.1/24"]}) == ()  # routed: MPI knows better


def test_a_network_interface_that_is_not_there_is_refused_with_those_that_are(script: Path) -> None:
    with pytest.raises(ValueError, match="--network-interface eth77: this host has no interface eth77.*it has .*lo"):
        checked(planned(script, 2, network_interface="eth77"))
    assert checked(planned(script, 2, network_interface="lo")).interface == "lo"


# ---- mpirun's pages


def cleaned(text: str, piece: int = 10_000) -> str:
    """What becomes of `text`, given to a reader in pieces."""
    source, out = os.pipe(), os.pipe()
    pages = Pages(source[0], out[1])
    for start in range(0, len(text), piece):
        pages._take(text[start : start + piece].encode())
    pages._release()
    os.close(out[1])
    with os.fdopen(out[0], newline="") as read_end:
        for end in source:
            os.close(end)
        return read_end.read()


KILLED = f"{EDGE}\nmpirun noticed that process rank 3 with PID 7 on node b exited on signal 9 (Killed).\n{EDGE}\n"
ABORTED = f"{EDGE}\nMPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 1.\n\nNOTE\n{EDGE}\n"
ENDED = f"{EDGE}\nmpirun detected that one or more processes exited with non-zero status, thus causing\nthe job\n\n"
ENDED += f"  Process name: [[24312,1],2]\n  Exit code:    5\n{EDGE}\n"
LOST = f"{EDGE}\nORTE has lost communication with a remote daemon.\n\n  HNP daemon   : [[1,0],0] on node a\n"
LOST += f"  Remote daemon: [[1,0],1] on node b\n{EDGE}\n"
UNPACK = "Data unpack would read past end of buffer in file /openmpi-4.1.8/orte/"
UNKNOWN = "/usr/bin/mpirun: Error: unknown option \"--nonsense\"\nType '/usr/bin/mpirun --help' for usage.\n"
POLICY = f"{EDGE}\nThe specified mapping policy is not recognized:\n\n  Policy: odd\n\nPlease check it.\n{EDGE}\n"
OTHER = f"{EDGE}\nThere are not enough slots available in the system\n{EDGE}\n"


@pytest.mark.parametrize("piece", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        (KILLED, "hybridpar: rank 3 on b was ended by signal 9 (Killed)\n"),
        (LOST, "hybridpar: host b is lost: it or the network between is down\n"),
        (ENDED, "hybridpar: rank 2 was the first to end, with code 5\n"),
        ("[rank 1] KeyError: 'boom'\n" + ABORTED + ENDED, "[rank 1] KeyError: 'boom'\n"),
        (OTHER + KILLED, OTHER + "hybridpar: rank 3 on b was ended by signal 9 (Killed)\n"),
        ("  7%|#\r 14%|##\rlast words", "  7%|#\r 14%|##\rlast words"),
        (f"a\n{EDGE}\nmine\n-\n", f"a\n{EDGE}\nmine\n-\n"),
        (f"[a:07365] [[7365,0],0] ORTE_ERROR_LOG: {UNPACK}util/show_help.c at line 501\nmine\n", "mine\n"),
        (POLICY, "hybridpar: mpirun knows no mapping policy odd: see what --mpi-args and OMPI_MCA_* say\n"),
        ("[a:00250] 1 more process has sent help message x\n[a:00250] mine\n", "[a:00250] mine\n"),
    ],
)
def test_a_page_of_mpirun_becomes_a_sentence_and_all_else_is_passed_on(text: str, becomes: str, piece: int) -> None:
    assert cleaned(text, piece) == becomes


def test_an_option_that_mpirun_does_not_know_becomes_a_sentence() -> None:
    sentence = "hybridpar: mpirun has no option --nonsense: see what --mpi-args gives, and `mpirun --help`\n"
    assert cleaned(UNKNOWN) == sentence
    assert cleaned("[rank 0] hello\n" + UNKNOWN).count("Error: unknown option") == 1  # a script said it


# ---- small jobs


def test_output_is_tagged_and_kept_per_rank(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(
        "import os, sys\nrank = os.environ['OMPI_COMM_WORLD_RANK']\n"
        "print('out', rank)\nos.system('echo from a child')\nsys.stderr.write(f'err {rank}')\n"
        "assert sys.argv == ['talk.py', '-x', ''] and __name__ == '__main__' and sys.path[0] == os.getcwd()\n"
        "assert sys.modules['__main__'].__file__ == __file__ == os.path.abspath('talk.py')\n"
    )
    line = [sys.executable, "-m", "hybridpar", "run", "-np", "2", "--tag-output", "--output-dir", "logs"]
    done = subprocess.run(
        [*line, "talk.py", "-x", ""], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = sorted(f"[rank {rank}] {what}" for rank in (0, 1) for what in (f"out {rank}", "from a child"))
    assert sorted(done.stdout.splitlines()) == told
    for rank in (0, 1):
        assert f"[rank {rank}] err {rank}" in done.stderr
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert f"out {rank}\n" in log and f"err {rank}" in log and "[rank" not in log


def test_a_function_returns_what_each_rank_returned() -> None:
    def function(x: float, more: int = 0) -> tuple[int, float]:
        import torch

        world = hp.init()
        return world.rank, world.everyone.allreduce(torch.tensor(x + more)).item()

    assert hp.run(function, (1.5,), {"more": 1}, np=2, tensor=2, threads=1) == [(0, 5.0), (1, 5.0)]


def test_a_process_that_opened_a_world_of_its_own_can_start_jobs(tmp_path: Path) -> None:
    """A notebook that has called hp.init(): MPI had told it, and so its children, that it is rank 0 of a job."""
    script = tmp_path / "notebook.py"
    script.write_text(
        "import hybridpar as hp\nif __name__ == '__main__':\n    hp.init()\n"
        "    print(hp.run(lambda: hp.init(tensor=2).rank, np=2))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[0, 1]\n"), done.stderr


def test_a_function_that_fails_is_told_with_its_rank(capfd: pytest.CaptureFixture[str]) -> None:
    def function() -> None:
        if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
            raise KeyError("boom")

    with pytest.raises(RuntimeError, match="(?s)rank 1 failed:.*KeyError: 'boom'") as caught:
        hp.run(function, np=2)
    assert "call.py" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # it is told once


def test_what_a_function_cannot_return_is_told() -> None:
    with pytest.raises(
        RuntimeError, match="^rank .: the return value, a lock, cannot be pickled .TypeError.*return plain"
    ):
        hp.run(lambda: __import__("threading").Lock(), np=2)
    with pytest.raises(RuntimeError, match="^rank 0 called sys.exit.4., and so has no result"):
        hp.run(lambda: __import__("sys").exit(4), np=1)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"args": 1, "np": 2}, "args=1: give the function's arguments in a tuple"),
        ({"kwargs": 1, "np": 2}, "kwargs=1: .* dict"),
        ({"np": "2"}, "np='2': the number of ranks is a whole number"),
        ({"np": 0}, "np=0: the number"),
        ({"function": 3, "np": 2}, "and 3 is none"),
        ({"function": (one for one in "a").__next__, "np": 2}, "cannot be pickled .TypeError"),
        ({"np": 2, "threds": 1}, "hp.run has no argument threds"),
        ({}, "how many ranks. give np=2"),
    ],
)
def test_arguments_of_hp_run_are_checked_before_anything_starts(asked: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        hp.run(**{"function": print, **asked})  # type: ignore[arg-type]
