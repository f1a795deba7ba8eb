"""Plan a job: from a wish (ranks, degrees, hosts, options) to a command line and its environment, all checked."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridpar.install import mpi
from hybridpar.install.probe import output
from hybridpar.launch import lines
from hybridpar.launch.hosts import Allocation, Host, allocated, parse, read_file
from hybridpar.launch.placement import Placement, place
from hybridpar.launch.wishes import Wishes
from hybridpar.mesh import Mesh
from hybridpar.optim.sync import wish

_NO_SHELL = "false"  # as mpi.settings writes it where there is no ssh
_INSIDE = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK")


@dataclass(frozen=True)
class Job:
    """What is started: the mesh of its ranks, the command line, the environment, what of that was added here.

    `reach` is the remote shell with its options where hosts have to be reached through one, else (); `program` is the
    launcher's path. `shares_cores` if the threads of a rank were not asked for, but follow from the cores. `interface`
    is that of the network to keep to, or several with commas between, "" where none was named.
    """

    mesh: Mesh
    command: tuple[str, ...]
    environment: Mapping[str, str]
    added: Mapping[str, str]
    placement: Placement | None = None
    reach: tuple[str, ...] = ()
    script: str = ""
    program: str = ""
    shares_cores: bool = True
    interface: str = ""

    def __str__(self) -> str:
        sets = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.added.items())]
        where = f" on {self.placement}" if self.placement else ""
        return "\n".join([f"# {self.mesh}{where}", *(f"{one} \\" for one in sets), shlex.join(self.command)])


def plan(
    ranks: int | None,
    command: Sequence[str],
    environment: Mapping[str, str],
    scripts: Path,
    prefix: Path,
    cores: int,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    carrier: str | None = None,
    sync: str | None = None,
    wishes: Wishes | None = None,
) -> Job:
    """How `command` (a Python script and its arguments) is started on `ranks` ranks.

    `scripts` and `prefix` are those of the environment that holds Horovod; degrees, carrier and sync that are None are
    left to the script. `ranks` that are None are as many as the hosts have slots, or without hosts as the degrees
    multiply to.

    Raises ValueError where the degrees do not fit the ranks, the ranks the hosts, or the script is not there;
    RuntimeError where Horovod or MPI is not installed.

    Example:
        >>> plan(8, ["train.py"], os.environ, scripts(), prefix(), cores=4, tensor=2).mesh  # doctest: +SKIP
        Mesh(data=4, pipeline=1, tensor=2)
    """
    wishes = wishes if wishes is not None else Wishes()
    _check_outside(environment)
    given = allocated(environment)
    if not command or not Path(command[0]).is_file():
        raise ValueError(f"there is no script {command[0] if command else ''!r} in {Path.cwd()}: give the path of one")
    hosts = _hosts(wishes, given)
    ranks = _count(ranks, hosts, (tensor, pipeline, data))
    mesh = Mesh.fit(ranks, data=data, pipeline=pipeline, tensor=tensor)
    placement = place(mesh, hosts) if hosts is not None else None
    if placement is not None and is_here([host.name for host in placement.hosts]):
        placement = None
    cores = given.cores if given is not None and given.cores else cores
    local = max(host.slots for host in placement.hosts) if placement else ranks
    threads = wishes.threads or max(1, cores // local)
    if sync is not None:
        wish.parse(sync)  # what cannot be read is told here, once
    told = {"TENSOR": tensor, "PIPELINE": pipeline, "DATA": data, "CARRIER": carrier, "SYNC": sync}
    ready = _environment(mpi.settings(environment, scripts, prefix), told, wishes, placement is not None, threads)
    if placement is None and ranks > cores:
        ready.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    reach = _reach(placement, wishes, given, ready)
    line = _line(ranks, placement, wishes, given, ready, scripts, threads)
    tag = "tag" if wishes.tag_output else "plain"
    whole = (*line, sys.executable, "-m", "hybridpar.launch.rank", tag, wishes.output_dir or "", *command)
    added = {name: value for name, value in ready.items() if environment.get(name) != value}
    shares = "OMP_NUM_THREADS" not in environment and wishes.threads is None
    interface = wishes.network_interface or ""
    return Job(mesh, whole, ready, added, placement, reach, command[0], line[0], shares, interface)


def _check_outside(environment: Mapping[str, str]) -> None:
    inside = [name for name in _INSIDE if environment.get(name)]
    if inside:
        raise ValueError(
            f"this process is itself a rank of a job ({inside[0]}={environment[inside[0]]}), and MPI starts no job "
            "inside a job: start `hybridpar run` once, from the shell or the batch script"
        )


def _count(ranks: int | None, hosts: Sequence[Host] | None, degrees: Sequence[int | None]) -> int:
    """How many ranks are started."""
    if ranks is None and hosts is None:
        known = [degree for degree in degrees if degree is not None]
        if not known:
            raise ValueError("how many ranks? give -np, degrees as in --tensor 2, or hosts as in -H a:4,b:4")
        return max(1, math.prod(known))  # a degree below 1 is refused with the mesh
    ranks = ranks if ranks is not None else sum(host.slots for host in hosts or ())
    if ranks < 1:
        raise ValueError(f"-np {ranks}: a job has at least 1 rank")
    return ranks


def _environment(
    ready: dict[str, str], told: Mapping[str, object], wishes: Wishes, several: bool, threads: int
) -> dict[str, str]:
    """`ready` with what the user sets, what hp.init() is told, and what is known of the cores and the network."""
    for name, value in wishes.sets:
        if value is None and name not in ready:
            raise ValueError(f"--env {name}: {name} is not set here: export it first, or write --env {name}=value")
    ready.update({name: value for name, value in wishes.sets if value is not None})
    ready.update({f"HYBRIDPAR_{name}": str(value) for name, value in told.items() if value is not None})
    if wishes.threads:
        ready["OMP_NUM_THREADS"] = str(threads)
    ready.setdefault("OMP_NUM_THREADS", str(threads))
    ready.setdefault("PYTHONHASHSEED", "0")  # a forward that goes through a set of names goes the same way on all ranks
    chosen = lines.network(wishes.network_interface) if wishes.network_interface else {}
    return {**(lines.keepalive() if several else {}), **ready, **chosen}


def _hosts(wishes: Wishes, given: Allocation | None) -> tuple[Host, ...] | None:
    if wishes.hosts is not None:
        return parse(wishes.hosts)
    if wishes.hostfile is not None:
        return read_file(Path(wishes.hostfile))
    return given.hosts if given is not None else None


def is_here(names: Sequence[str]) -> bool:
    """Whether all `names` mean this host."""
    own = socket.gethostname()
    return set(names) <= {"localhost", "127.0.0.1", "[::1]", own, own.partition(".")[0]}


def _reach(
    placement: Placement | None, wishes: Wishes, given: Allocation | None, ready: dict[str, str]
) -> tuple[str, ...]:
    """The remote shell that MPI is to use; it is told through `ready`. () where the batch system does it."""
    if placement is None or (given is not None and given.system == "Slurm"):
        return ()
    agents = {"LSF": "blaunch", "PBS": "pbs_tmrsh"}
    agent = agents.get(given.system, "") if given is not None else ""
    if agent and shutil.which(agent, path=ready["PATH"]):
        ready["OMPI_MCA_plm_rsh_agent"] = agent
        return ()
    if ready.get("OMPI_MCA_plm_rsh_agent", _NO_SHELL) != _NO_SHELL:
        return (*shlex.split(ready["OMPI_MCA_plm_rsh_agent"]), *shlex.split(ready.get("OMPI_MCA_plm_rsh_args", "")))
    options = [*lines.ssh(wishes), *shlex.split(ready.get("OMPI_MCA_plm_rsh_args", ""))]
    ready["OMPI_MCA_plm_rsh_args"] = shlex.join(options)
    return ("ssh", *options)


def _line(
    ranks: int, placement: Placement | None, wishes: Wishes, given: Allocation | None,
    ready: Mapping[str, str], scripts: Path, threads: int,
) -> list[str]:  # fmt: skip
    launcher = wishes.launcher
    if launcher == "auto":
        launcher = "srun" if given is not None and given.system == "Slurm" and _offers_pmix(ready) else "mpirun"
    if launcher == "srun":
        if given is None or given.system != "Slurm":
            raise ValueError("--launcher srun needs a Slurm allocation: use salloc or sbatch, or leave it out")
        return lines.srun(ranks, placement or Placement((Host(socket.gethostname(), ranks),)), wishes, threads)
    found = {name: shutil.which(name, path=ready["PATH"]) for name in {"mpirun", launcher}}
    for program, path in found.items():
        if path is None:
            raise RuntimeError(f"{program} is missing in {scripts} and on PATH: run `hybridpar install`")
    _check_mpi(found["mpirun"] or "", launcher, ready)
    if launcher == "horovodrun":
        home = Path(found["mpirun"] or "").parent.parent
        return lines.horovodrun(found[launcher] or "", ranks, placement, wishes, home)
    names = lines.exported(ready, [name for name, _ in wishes.sets])
    return lines.mpirun(found["mpirun"] or "", ranks, placement, wishes, names, os.getcwd())


def _check_mpi(program: str, launcher: str, environment: Mapping[str, str]) -> None:
    """Raise where `program` belongs to an MPI whose options are others than Open MPI's."""
    vendor, version = mpi.parse(output([program, "--version"], environment) or "")
    if vendor not in ("Open MPI", mpi.UNKNOWN):
        raise RuntimeError(
            f"{program} is that of {vendor} {version}, and Horovod and this launcher work with Open MPI: run "
            "`hybridpar install`, or start the ranks with that MPI's own mpirun"
        )
    if launcher == "horovodrun" and not version.startswith("4."):
        raise ValueError(
            f"horovodrun passes options that {vendor} {version} does not know: use --launcher mpirun, or Open MPI 4"
        )


def _offers_pmix(environment: Mapping[str, str]) -> bool:
    told = output(["srun", "--mpi=list"], environment) if shutil.which("srun", path=environment["PATH"]) else None
    return "pmix" in (told or "")
