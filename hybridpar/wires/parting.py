"""The data axis in two levels: replicas that are near each other, and one from each such group.

    inside=2        near     between            replicas 0 1 | 2 3
    index 0         0 1      0 2
    index 3         2 3      1 3
"""

from __future__ import annotations

import socket

from hybridpar.wires.axis import Alone, Axis
from hybridpar.wires.world import World


def neighbours(world: World, inside: int | str = 1) -> tuple[Axis, Axis]:
    """The axis of this replica's group of `inside` consecutive replicas, and the axis between the groups.

    `inside` "node": those that lie on the same hosts. All ranks call it together.

    Raises ValueError where the replicas do not make groups of one size.

    Example:
        >>> near, between = neighbours(world, inside=2)         # doctest: +SKIP
        >>> near.ranks, between.ranks                           # doctest: +SKIP
        ((0, 1), (0, 2))
    """
    size = _on_a_host(world) if inside == "node" else int(inside)
    replicas = world.peers.size
    if replicas % size:
        raise ValueError(
            f"inside={size}: {replicas} replicas cannot be put into groups of {size}: choose one of "
            f"{', '.join(str(n) for n in range(1, replicas + 1) if replicas % n == 0)}"
        )
    if size == 1:
        return Alone("near", world.rank), world.data
    if size == replicas:
        return world.data, Alone("between", world.rank)
    group, place = divmod(world.peers.index, size)
    return _part(world, "near", group), _part(world, "between", place)


def separate(world: World, name: str) -> Axis:
    """The data axis once more, for messages of a thread that no other can take. All ranks call it together."""
    return world.peers if isinstance(world.peers, Alone) else _part(world, name, 0)


def _part(world: World, name: str, colour: int) -> Axis:
    from hybridpar.wires.mpi import MpiAxis  # starts MPI, which hp.init has done by now

    axis = world.peers
    assert isinstance(axis, MpiAxis), "several replicas are ranks of an MPI communicator"
    part = axis.part(name, colour)
    world.on_close(part.free)
    return part


def _on_a_host(world: World) -> int:
    """How many consecutive replicas lie on the same hosts."""
    hosts = world.everyone.objects(socket.gethostname())
    places = [frozenset(hosts[r] for r in world.mesh.replica(world.mesh.rank(d))) for d in range(world.mesh.data)]
    sizes = [1]
    for before, here in zip(places, places[1:]):
        if here == before:
            sizes[-1] += 1
        else:
            sizes.append(1)
    if len(set(sizes)) > 1:
        raise ValueError(
            f'inside="node": the hosts hold {", ".join(map(str, sizes))} replicas, and groups must be of one size: '
            "start as many ranks on each host, or say inside=1"
        )
    return sizes[0]
