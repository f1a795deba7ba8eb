"""Two hosts with a slow link between them, made of namespaces: where the policies are measured.

The hosts are those of tests/hosts: on one machine, with the kernel's own limit on what each may send, and a switch that
holds frames back. What a rank's host has sent is read from its network interface.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.hosts.cluster import cluster, missing

HOSTS = ("hpa", "hpb")
SECONDS = 1200
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

Run = Callable[[Sequence[str]], str]  # the arguments of a script -> what it printed


def no_link() -> str:
    """Why this machine cannot make hosts, as a sentence; "" if it can."""
    return missing()


@contextmanager
def slow_link(rate: str, delay: str, replicas: int, script: Path, shared: Path) -> Iterator[Run]:
    """Starts `script` on so many ranks, half of them on each host; `shared` is a folder that both see."""
    shared.mkdir(parents=True, exist_ok=True)
    places = ",".join(f"{host}:{replicas // len(HOSTS)}" for host in HOSTS)
    line = [sys.executable, "-m", "hybridpar", "run", "-H", places, "--network-interface", "eth0", str(script)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="link-")))
        hosts = stack.enter_context(cluster(folder, HOSTS, [shared], seconds(delay)))
        hosts.limit(rate)

        def run(arguments: Sequence[str]) -> str:
            seen = hosts.run(HOSTS[0], [*line, *arguments], env={"OMP_NUM_THREADS": "1"}, seconds=SECONDS)
            if seen.code:
                raise RuntimeError(f"{' '.join(arguments)}: {seen.said[-2000:]}")
            return seen.out

        yield run


def seconds(delay: str) -> float:
    """What a delay is as `tc` writes it.

    Example:
        >>> seconds("5ms")
        0.005
    """
    number = delay.rstrip("musn")
    return float(number) * _UNITS[delay[len(number) :] or "ms"]


def bytes_sent() -> int:
    """What this host has sent over its link; 0 where it has no eth0."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0
