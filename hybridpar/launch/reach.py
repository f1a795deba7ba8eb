"""Ask every host of a job before it starts, all at once: a host that cannot take ranks is named in a sentence.

MPI itself would tell of it in a page, or wait.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from hybridpar.launch import interfaces
from hybridpar.launch.job import Job, is_here
from hybridpar.launch.lines import CONNECT_SECONDS

_ANSWER_SECONDS = 30.0  # also for a folder on a slow network file system
_AT_ONCE = 32
_INCLUDE = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include")
_EXCLUDE = ("OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_oob_tcp_if_exclude")


class Unreachable(RuntimeError):
    """A host cannot take the ranks it was given; the message is one sentence with the way out."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


@dataclass(frozen=True)
class Told:
    """What a host has told: its cores, its addresses with their networks, the names of its network interfaces."""

    cores: int
    addresses: tuple[str, ...]
    interfaces: tuple[str, ...] = ()


def checked(job: Job) -> Job:
    """`job` as its hosts let it be: threads for the cores that they have, and the networks that they share.

    Raises Unreachable where a host does not answer, or lacks the working folder, the script or hybridpar; ValueError
    where one has no such network interface as the job is to keep to.
    """
    here = Told(len(os.sched_getaffinity(0)), tuple(interfaces.interfaces()), tuple(interfaces.names()))
    if job.placement is None or any(is_here([host.name]) for host in job.placement.hosts):
        _check_interface(job.interface, "this host", here)
    if not job.reach or job.placement is None:
        return job
    names = [host.name for host in job.placement.hosts if not is_here([host.name])]
    files = (os.path.abspath(job.script), sys.executable, job.program)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        told = dict(zip(names, pool.map(lambda name: _ask(job.reach, name, os.getcwd(), files), names)))
    for name, one in told.items():
        _check_interface(job.interface, f"host {name}", one)
    return _fitted(job, told, here)


def _check_interface(asked: str, where: str, told: Told) -> None:
    for name in filter(None, asked.split(",")):
        if name not in told.interfaces:
            raise ValueError(
                f"--network-interface {asked}: {where} has no interface {name} with an address: it has "
                f"{', '.join(told.interfaces)}"
            )


def _fitted(job: Job, told: Mapping[str, Told], here: Told) -> Job:
    assert job.placement is not None
    more: dict[str, str] = {}
    if job.shares_cores:
        share = min(told.get(host.name, here).cores // host.slots for host in job.placement.hosts)
        more["OMP_NUM_THREADS"] = str(max(1, share))
    if not any(job.environment.get(name) for name in (*_INCLUDE, *_EXCLUDE)):
        everyone = {name: one.addresses for name, one in told.items()} | {"": here.addresses}
        networks = ",".join(interfaces.shared_networks(everyone))
        more |= dict.fromkeys(_INCLUDE, networks) if networks else {}
    return replace(job, environment={**job.environment, **more}, added={**job.added, **more})


def _ask(reach: Sequence[str], name: str, folder: str, files: Sequence[str]) -> Told:
    words = [sys.executable, "-I", interfaces.__file__, folder, *files]
    try:
        asked = subprocess.run(
            [*reach, name, shlex.join(words)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_ANSWER_SECONDS,
        )  # fmt: skip
    except OSError as error:
        raise Unreachable(
            f"{reach[0]}, which reaches the other hosts, cannot be started ({error.strerror}): on Debian and Ubuntu "
            "`apt-get install openssh-client`"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(
            f"host {name} was reached but did not answer within {_ANSWER_SECONDS:.0f} s: look whether {folder} and "
            f"{sys.prefix} can be read there"
        ) from None
    return _understood(asked, reach, name, folder)


def _understood(asked: subprocess.CompletedProcess[str], reach: Sequence[str], name: str, folder: str) -> Told:
    words = [line.strip() for line in asked.stderr.splitlines() if line.strip()]
    last = words[-1] if words else f"exit code {asked.returncode}"
    if asked.returncode == 255:
        raise Unreachable(
            f"host {name} cannot be reached over {reach[0]} within {CONNECT_SECONDS} s ({last}): see that "
            f"`{shlex.join([*reach, name, 'true'])}` works without a question"
        )
    if asked.returncode:
        raise Unreachable(
            f"host {name} cannot run {sys.executable} with the hybridpar of this host ({last}): install the same "
            "environment at the same path on every host, or share it"
        )
    told = json.loads(asked.stdout.splitlines()[-1])
    if not told["folder"]:
        raise Unreachable(f"host {name} has no folder {folder}: start in one that all hosts have, or copy it there")
    if told["lacking"]:
        raise Unreachable(f"host {name} has no {told['lacking'][0]}: every host needs the same files at the same paths")
    return Told(told["cores"], tuple(told["addresses"]), tuple(told["interfaces"]))
