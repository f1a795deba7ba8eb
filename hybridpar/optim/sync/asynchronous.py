"""Workers and servers: each replica goes on with what has come so far, at most `staleness` steps ahead of the slowest.

    replica 0   step | step | step | step ...        after each step of the user's optimizer:
    replica 1   step ------------ | step -- ...          1/D of what it moved is for the server of each piece
    servers     piece 0 on replica 0, piece 1 on 1       take all pieces as far as they have come

Every rank is a worker and serves one piece of its weights (server.py). With D replicas each adds a D-th of its step, so
that with staleness 0 and plain SGD the sum is the step of the averaged gradient. Ho et al. 2013 add whole updates and
choose the learning rate by D.

Ranks of one replica take their pieces at different times. What several of them hold is therefore taken from its owner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.model import Parallel
from hybridpar.optim.sync.server import Server
from hybridpar.optim.sync.shared import Shared
from hybridpar.optim.sync.weights import Weights
from hybridpar.optim.sync.wish import AsyncPs
from hybridpar.shard import balanced
from hybridpar.wires.axis import Alone, Axis
from hybridpar.wires.parting import separate


class Asynchronous:
    """This rank's worker. `lags` counts its steps by how many steps the slowest was behind when they ended; `seen` are
    the clocks of the workers [server, worker] in what it last took.

    Example:
        >>> optimizer = DistributedOptimizer(sgd, model, sync="async_ps(4)")    # doctest: +SKIP
        >>> optimizer.policy.lags                                               # doctest: +SKIP
        Counter({0: 61, 1: 30, 2: 9})
    """

    own_states = True

    def __init__(self, model: Parallel, wish: AsyncPs) -> None:
        self.company: Axis = Alone("company", model.world.rank)
        self.lags: Counter[int] = Counter()
        self.seen: list[list[int]] = []
        self._world, self._wish = model.world, wish
        self._weights, self._shared = Weights(model), Shared(model)
        self._axis: Axis = model.world.peers
        self._server: Server | None = None
        self._taken: Tensor | None = None  # [count], the weights as they were taken last
        self._moved = False

    @property
    def axes(self) -> Sequence[Axis]:
        """Those on which replicas send each other gradients or weights."""
        return (self._axis,)

    @property
    def apart(self) -> str | None:
        """Why replicas may hold different weights now, or None."""
        return f"replicas are up to {self._wish.staleness} steps apart" if self._moved else None

    def before(self) -> None:
        """The user's optimizer is about to step."""
        if self._server is None:
            self._axis = separate(self._world, "servers")
            self._taken = self._weights.read().cpu()
            self._server = Server(self._axis, self._pieces(self._taken), self._wish.staleness)
            self._world.serves(self._server.rest, self._server.leave)

    def after(self) -> None:
        """It has stepped."""
        assert self._server is not None and self._taken is not None, "after() comes after before()"
        moved = self._weights.read().cpu().sub_(self._taken).div_(self._axis.size)
        weights, self.seen = self._server.exchange(self._pieces(moved))
        self.lags[max(clocks[self._axis.index] - min(clocks) for clocks in self.seen)] += 1
        self._moved = True
        self._take(weights)

    def meet(self) -> None:
        """Wait until all replicas have sent what they moved, and take the sum of it; all call it together."""
        if self._server is None:
            return
        self._stand_still()
        self._take(self._world.peers.allgather(self._server.look()))
        self._begin_anew()

    def state(self) -> Mapping[Parameter, Mapping[str, Tensor]]:
        """Nothing: when replicas are not apart the servers hold the weights."""
        return {}

    def restore(self, kept: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Go on from the weights as they are now."""
        if self._server is not None:
            self._stand_still()
            self._taken = self._weights.read().cpu()
            self._begin_anew()

    def _stand_still(self) -> None:
        """Return when all that workers sent has been added, and nothing is under way."""
        assert self._server is not None
        self._server.rest()
        self._server.all_rest()
        self._world.peers.barrier()

    def _begin_anew(self) -> None:
        assert self._server is not None and self._taken is not None
        self._server.reset(self._pieces(self._taken))
        self._moved = False
        self._world.peers.barrier()  # nobody sends to a server that has not begun anew

    def _take(self, flat: Tensor) -> None:
        self._weights.write(flat.to(self._world.device))
        self._shared.agree()
        self._taken = self._weights.read().cpu()

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        return [flat[start:stop] for start, stop in balanced(flat.numel(), self._axis.size)]
