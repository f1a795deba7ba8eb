"""Which hosts a job has, and how many ranks each may take.

    -H a:4,b:4                                          the command line
    a slots=4 | a:4 | a                                 a line of a hostfile: Open MPI and Horovod, MPICH, a plain list
    SLURM_JOB_NODELIST, SLURM_TASKS_PER_NODE            Slurm
    PBS_NODEFILE                                        PBS and Torque
    LSB_MCPU_HOSTS, LSB_DJOB_HOSTFILE, LSB_HOSTS        LSF
    PE_HOSTFILE                                         Grid Engine
    OMPI_MCA_orte_default_hostfile                      Kubernetes' MPI operator

A slot is room for one rank. A host that is named several times has the sum of its slots, in the first place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True)
class Host:
    """A host by the name that the others reach it by, and how many ranks it may take."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


@dataclass(frozen=True)
class Allocation:
    """What a batch system has given: its name, the hosts, the fewest cores of one of them (0: it does not say)."""

    system: str
    hosts: tuple[Host, ...]
    cores: int = 0


def parse(text: str) -> tuple[Host, ...]:
    """The hosts of `-H`: names with slots, separated by commas; a name alone has one slot.

    Raises ValueError for what is no host.

    Example:
        >>> parse("a:4,b:4")
        (Host(name='a', slots=4), Host(name='b', slots=4))
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"-H {text!r} names no host: give hosts with their slots, as in -H a:4,b:4")
    return merged(_host(word, f"-H {text}") for word in words)


def read(text: str, where: str) -> tuple[Host, ...]:
    """The hosts of a hostfile's `text`; `where` is its path, for errors.

    Each line is one of `a slots=4 [max_slots=8]` (Open MPI, Horovod), `a:4` (MPICH), and `a` (one slot for each time
    that it is named, as PBS writes). What follows # is a comment.

    Raises ValueError with the line that is none of them.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not words:
            continue
        place = f"{where}, line {number}"
        said = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        unknown = [w for w in words[1:] if w.partition("=")[0] not in ("slots", "max_slots", "max-slots", "sockets")]
        if unknown or (":" in words[0].rpartition("]")[2] and "slots" in said):
            raise ValueError(f"{place}: {line.strip()!r} is no host: write `name slots=4`, `name:4` or `name`")
        found.append(_host(f"{words[0]}:{said['slots']}" if "slots" in said else words[0], place))
    if not found:
        raise ValueError(f"{where} names no host: write one line `name slots=4` for each")
    return merged(found)


def read_file(path: Path) -> tuple[Host, ...]:
    """The hosts of the hostfile at `path`. Raises ValueError where it cannot be read."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"the hostfile {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the hostfile {path} is no text: write one line `name slots=4` for each host") from None
    return read(text, str(path))


def allocated(environment: Mapping[str, str]) -> Allocation | None:
    """What the batch system that has started this process has given to it; None where there is none.

    Example:
        >>> allocated({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)"})
        Allocation(system='Slurm', hosts=(Host(name='n1', slots=4), Host(name='n2', slots=4)), cores=0)
    """
    told = environment.get
    if told("SLURM_JOB_ID") and told("SLURM_JOB_NODELIST"):
        cores = _counts(environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
        return Allocation("Slurm", _slurm(environment), min(cores, default=0))
    if told("PBS_JOBID") and told("PBS_NODEFILE"):
        return Allocation("PBS", read_file(Path(environment["PBS_NODEFILE"])))
    if told("LSB_JOBID"):
        return _lsf(environment)
    if told("JOB_ID") and told("PE_HOSTFILE"):
        lines = [line.split()[:2] for line in Path(environment["PE_HOSTFILE"]).read_text().splitlines() if line.strip()]
        return Allocation("Grid Engine", merged(_host(":".join(pair), "PE_HOSTFILE") for pair in lines))
    if told("OMPI_MCA_orte_default_hostfile"):
        return Allocation("MPI operator", read_file(Path(environment["OMPI_MCA_orte_default_hostfile"])))
    return None


def expand(text: str) -> list[str]:
    """The names in Slurm's short way of writing them.

    Example:
        >>> expand("n[01-03,7]x,login")
        ['n01x', 'n02x', 'n03x', 'n7x', 'login']
    """
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        made = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            made = [a + b for a in made for b in ([plain] if plain else list(_numbers(ranges)))]
        names += made
    return names


def merged(hosts: Iterable[Host]) -> tuple[Host, ...]:
    """Each host once, with the sum of its slots."""
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return tuple(Host(name, n) for name, n in slots.items())


def _host(word: str, where: str) -> Host:
    name, colon, slots = word.rpartition(":")
    if not colon or word.endswith("]"):
        name, slots = word, "1"
    if "@" in name:
        raise ValueError(f"{where}: {name!r} names a user, which mpirun does not take: put it into ~/.ssh/config")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} is no host name: write name:slots, as in a:4")
    if not slots.isdigit() or int(slots) < 1:
        raise ValueError(f"{where}: {word!r} has no number of slots: write name:slots with at least 1 slot")
    return Host(name, int(slots))


def _numbers(text: str) -> Iterable[str]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        for n in range(int(first), int(last or first) + 1):
            yield str(n).zfill(len(first))


def _slurm(environment: Mapping[str, str]) -> tuple[Host, ...]:
    names = expand(environment["SLURM_JOB_NODELIST"])
    told = environment.get("SLURM_TASKS_PER_NODE") or environment.get("SLURM_JOB_CPUS_PER_NODE") or "1"
    slots = _counts(told)
    slots += [slots[-1]] * (len(names) - len(slots))
    return tuple(Host(name, n) for name, n in zip(names, slots))


def _counts(told: str) -> list[int]:
    """4(x2),3 -> 4 4 3"""
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", told) for _ in range(int(times or 1))]


def _lsf(environment: Mapping[str, str]) -> Allocation | None:
    if environment.get("LSB_MCPU_HOSTS"):
        words = environment["LSB_MCPU_HOSTS"].split()
        return Allocation("LSF", merged(_host(f"{a}:{n}", "LSB_MCPU_HOSTS") for a, n in zip(words[::2], words[1::2])))
    if environment.get("LSB_DJOB_HOSTFILE"):
        return Allocation("LSF", read_file(Path(environment["LSB_DJOB_HOSTFILE"])))
    if environment.get("LSB_HOSTS"):
        return Allocation("LSF", merged(Host(name, 1) for name in environment["LSB_HOSTS"].split()))
    return None
