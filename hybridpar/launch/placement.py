"""Which host takes which ranks: the ranks of a tensor group stay on one host.

    tensor=2, -H a:4,b:3        a: ranks 0 1 | 2 3        b: ranks 4 5        (b's third slot stays free)

Ranks fill host after host, as they are numbered, so a host takes whole groups as long as its count is a multiple of the
tensor degree. Tensor peers exchange activations within every layer; pipeline stages and replicas do so once per
microbatch and once per step (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 3.2 "Takeaway #1").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridpar.launch.hosts import Host
from hybridpar.mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """How many ranks each host takes, hosts without ranks left out, and a warning, "" where all is well."""

    hosts: tuple[Host, ...]
    warning: str = ""

    def host_of(self, rank: int) -> str:
        """The name of the host on which `rank` stands."""
        for host in self.hosts:
            if rank < host.slots:
                return host.name
            rank -= host.slots
        raise ValueError(f"rank {rank} is beyond the last host")

    def __str__(self) -> str:
        return ",".join(str(host) for host in self.hosts)


def place(mesh: Mesh, hosts: Sequence[Host]) -> Placement:
    """Lay the ranks of `mesh` on `hosts`, in their order.

    Where the tensor degree is larger than every host the groups must cross hosts: that is allowed, with a warning.

    Raises ValueError where the ranks do not fit the slots, or where groups would be torn that need not be.

    Example:
        >>> from hybridpar.launch.hosts import parse
        >>> str(place(Mesh(tensor=2, data=3), parse("a:5,b:3")))
        'a:4,b:2'
    """
    room = sum(host.slots for host in hosts)
    if mesh.size > room:
        raise ValueError(
            f"{mesh.size} ranks do not fit into the {room} slots of {_shown(hosts)}: give the hosts more slots, or "
            f"start at most {room} ranks"
        )
    whole = [Host(host.name, host.slots // mesh.tensor * mesh.tensor) for host in hosts]
    held = sum(host.slots for host in whole)
    if held >= mesh.size:
        return Placement(_filled(whole, mesh.size))
    most = max(host.slots for host in hosts)
    if mesh.tensor <= most:
        groups = " + ".join(str(host.slots // mesh.tensor) for host in hosts)
        raise ValueError(
            f"{mesh.size} ranks in tensor groups of {mesh.tensor} need {mesh.size // mesh.tensor} groups, and "
            f"{_shown(hosts)} hold {groups} whole ones: give the hosts slots in multiples of {mesh.tensor}, or choose "
            "a tensor degree that divides them; a group torn between hosts would wait for the network in every layer"
        )
    return Placement(
        _filled(hosts, mesh.size),
        f"tensor={mesh.tensor} is more than the {most} slots of the largest host, so every layer waits for the network "
        f"between hosts: tensor={_largest(mesh, most)} with more pipeline stages would not",
    )


def _filled(hosts: Sequence[Host], ranks: int) -> tuple[Host, ...]:
    taken = []
    for host in hosts:
        n = min(host.slots, ranks)
        ranks -= n
        if n:
            taken.append(Host(host.name, n))
    return tuple(taken)


def _largest(mesh: Mesh, most: int) -> int:
    """The largest tensor degree that divides this one and fits a host."""
    return max(t for t in range(1, most + 1) if mesh.tensor % t == 0)


def _shown(hosts: Sequence[Host]) -> str:
    names = [str(host) for host in hosts]
    return ",".join(names if len(names) <= 8 else [*names[:7], f"... ({len(names)} hosts)"])
