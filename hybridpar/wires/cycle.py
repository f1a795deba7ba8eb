"""How often Horovod's thread looks for work: a setting that Horovod reads when it starts, so it is started anew."""

from __future__ import annotations

from hybridpar.wires.boot import cycle_time, wished_cycle_time
from hybridpar.wires.world import World

DEFAULT = 1.0  # ms, Horovod's own


def restart(world: World, milliseconds: float) -> None:
    """Let Horovod wake up this often on the data axis of `world`, unless the user has said how often.

    All ranks call it together, with nothing under way.
    """
    if wished_cycle_time() or world.data.size == 1:
        return
    from hybridpar.wires.mpi import MpiAxis
    from hybridpar.wires.opening import start_horovod, stop_horovod

    peers, everyone = world.peers, world.everyone
    assert isinstance(peers, MpiAxis) and isinstance(everyone, MpiAxis), "several replicas are ranks of communicators"
    stop_horovod(everyone.comm)
    with cycle_time(milliseconds):
        start_horovod(peers.comm)
