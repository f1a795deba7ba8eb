"""The world: all axes through this rank, open and ready. What `hp.init()` returns.

    everyone            all ranks
    replica             the pipeline x tensor ranks that hold one copy of the model
    tensor, pipeline    model-parallel traffic: MPI, or torch.distributed (NCCL between GPUs)
    data                Horovod's world
    peers               the ranks of data again, over MPI: for what must not wait for a Horovod cycle
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hybridpar.mesh import Mesh, Place
from hybridpar.wires.axis import Axis


@dataclass(frozen=True)
class World:
    """Who this rank is, and the axes through it.

    Example:
        >>> world = hp.init(tensor=2, pipeline=2)       # doctest: +SKIP
        >>> world.rank, world.place, world.tensor.index # doctest: +SKIP
        (3, Place(data=0, pipeline=1, tensor=1), 1)
    """

    mesh: Mesh
    rank: int
    seed: int
    everyone: Axis
    replica: Axis
    data: Axis
    peers: Axis
    pipeline: Axis
    tensor: Axis
    device: torch.device
    sync: str | None = None  # the policy of the data axis that the command line asks for
    columns: int | None = None  # of the terminal that shows what ranks print, which is not theirs
    _serving: list[tuple[Callable[[], None], Callable[[], None]]] = field(default_factory=list, repr=False)
    _closing: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def place(self) -> Place:
        """This rank's indices along the axes."""
        return self.mesh.place(self.rank)

    def on_close(self, free: Callable[[], None]) -> None:
        """Call `free` when the world closes, before what is there now is given back."""
        self._closing.append(free)

    def serves(self, rest: Callable[[], None], leave: Callable[[], None]) -> None:
        """A thread of this rank serves others: call `rest` when this rank's script ends, `leave` when all have."""
        self._serving.append((rest, leave))

    def rest(self) -> None:
        """This rank needs nothing more from the others, and still serves them."""
        for rest, _ in self._serving:
            rest()

    def leave(self) -> None:
        """No rank needs anything more; all ranks together."""
        while self._serving:
            self._serving.pop()[1]()

    def close(self) -> None:
        """Stop Horovod and give the communicators back; all ranks together. `hp.init` may then be called anew."""
        self.leave()
        while self._closing:
            self._closing.pop()()
