"""The launcher's command line, and the environment in which it stands. Nothing is started here.

    mpirun        the default: over ssh, or as the batch system starts processes
    srun          in a Slurm allocation that offers PMIx: no ssh, and Slurm sees the ranks
    horovodrun    on request: it starts mpirun, and looks for common network interfaces first
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hybridpar.launch.placement import Placement
from hybridpar.launch.wishes import Wishes

CONNECT_SECONDS = 8
# Seconds until an idle link is asked, between questions, and questions until it counts as cut: 5 + 3 * 2 in all. The
# ranks, who can say which host it is, notice a little earlier (wires/watchdog.py).
KEEPALIVE = {"time": 5, "intvl": 2, "probes": 3}

# What belongs to one host, one terminal or one login, and what launchers set and pass on themselves.
_OWN = re.compile(
    r"HOSTNAME|HOST|PWD|OLDPWD|SHLVL|SHELL|HOME|USER|LOGNAME|MAIL|TERM|TMPDIR|TMP|TEMP|DISPLAY|XAUTHORITY|LS_COLORS|_"
    r"|(SSH|XDG|DBUS|BASH_FUNC|SLURM|SRUN|SBATCH|PBS|LSB|LSF|OMPI|PMIX|PMI|PRTE|ORTE|OPAL|TMUX|STY|KUBERNETES)(_.*)?"
)


def ssh(wishes: Wishes) -> list[str]:
    """What ssh is given besides the host and the command: it asks nobody, and does not wait long."""
    line = ["-x", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    if wishes.ssh_config:
        line += ["-F", wishes.ssh_config]
    else:
        line += ["-o", "StrictHostKeyChecking=accept-new"]  # a host that is new is taken, one that has changed is not
    if wishes.ssh_port:
        line += ["-p", str(wishes.ssh_port)]
    if wishes.ssh_identity:
        line += ["-i", wishes.ssh_identity]
    return line


def exported(environment: Mapping[str, str], wanted: Iterable[str] = ()) -> list[str]:
    """The names that the ranks on other hosts are given, `wanted` ones always.

    Example:
        >>> exported({"PATH": "/bin", "HOSTNAME": "a", "SLURM_JOB_ID": "1", "LANG": "C"})
        ['LANG', 'PATH']
    """
    fit = {name for name in environment if name.isidentifier() and not _OWN.fullmatch(name)}
    return sorted(fit | {name for name in wanted if name in environment})


def keepalive() -> dict[str, str]:
    """What makes Open MPI's daemons notice a cut link."""
    return {f"OMPI_MCA_oob_tcp_keepalive_{name}": str(n) for name, n in KEEPALIVE.items()}


def network(interface: str) -> dict[str, str]:
    """What makes MPI, Horovod, NCCL and gloo use this network interface."""
    names = ["OMPI_MCA_oob_tcp_if_include", "OMPI_MCA_btl_tcp_if_include", "HOROVOD_GLOO_IFACE"]
    return dict.fromkeys([*names, "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"], interface)


def mpirun(
    program: str, ranks: int, placement: Placement | None, wishes: Wishes, names: Sequence[str], folder: str
) -> list[str]:
    """`program` (of Open MPI 4 or 5) and its options; `placement` is None for a job on this host, where ranks may share
    cores.

    `names` of the environment are passed on to the ranks, which start in `folder`.
    """
    line = [program, "-np", str(ranks), *_binding(wishes, shared=placement is None)]
    if placement is not None:
        line += ["-H", str(placement), "--wdir", folder]
        home = Path(program).parent.parent
        if home != Path("/usr"):
            line += ["--prefix", str(home)]  # else another MPI of that host may answer
        for name in names:
            line += ["-x", name]
    return [*line, *shlex.split(wishes.mpi_args)]


def horovodrun(program: str, ranks: int, placement: Placement | None, wishes: Wishes, home: Path) -> list[str]:
    """The same over horovodrun; `home` is that of MPI."""
    line = [program, "-np", str(ranks), "--mpi", "--disable-cache"]
    # It asks for tags always, and Open MPI takes the later setting.
    more = ["--mca", "orte_tag_output", "0"]
    if placement is not None:
        line += ["-H", str(placement)]
        line += ["-p", str(wishes.ssh_port)] if wishes.ssh_port else []
        line += ["-i", wishes.ssh_identity] if wishes.ssh_identity else []
        line += ["--network-interfaces", wishes.network_interface] if wishes.network_interface else []
        more += ["--prefix", str(home)] if home != Path("/usr") else []
    if wishes.bind_to != "none":
        line += [f"--binding-args={shlex.join(_binding(wishes))}"]
    return [*line, f"--mpi-args={' '.join([shlex.join(more), wishes.mpi_args]).strip()}"]


def srun(ranks: int, placement: Placement, wishes: Wishes, threads: int) -> list[str]:
    """srun inside an allocation.

    Raises ValueError where the hosts take different numbers of ranks, which srun cannot be told on its line.
    """
    counts = {host.slots for host in placement.hosts}
    if len(counts) > 1:
        raise ValueError(
            f"srun cannot give {placement} different numbers of ranks: use --launcher mpirun, or as many on each host"
        )
    line = ["srun", "--mpi=pmix", f"--ntasks={ranks}", f"--nodes={len(placement.hosts)}"]
    line += [f"--ntasks-per-node={counts.pop()}", f"--cpus-per-task={threads}", "--distribution=block"]
    line += [f"--nodelist={','.join(host.name for host in placement.hosts)}", "--kill-on-bad-exit=1"]
    line += ["--cpu-bind=none" if wishes.bind_to == "none" else f"--cpu-bind={_SLURM_BINDINGS[wishes.bind_to]}"]
    return [*line, *shlex.split(wishes.mpi_args)]


_SLURM_BINDINGS = {"core": "cores", "socket": "sockets", "numa": "ldoms"}


def _binding(wishes: Wishes, shared: bool = False) -> list[str]:
    many = wishes.bind_to == "core" and (wishes.threads or 1) > 1
    how = [f"PE={wishes.threads}"] * many + ["OVERSUBSCRIBE"] * shared
    return ["--map-by", f"slot:{','.join(how)}" if how else "slot", "--bind-to", wishes.bind_to]
