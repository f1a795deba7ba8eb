"""How replicas keep together: what a sync policy offers, and which one a wish is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.compression import Wire
from hybridpar.optim.model import Parallel
from hybridpar.optim.reduce import Reducer
from hybridpar.optim.sync.asynchronous import Asynchronous
from hybridpar.optim.sync.elastic import Elastic
from hybridpar.optim.sync.rounds import Rounds
from hybridpar.optim.sync.wish import AllReduce, DiLoCo, Easgd, LocalSgd, Wish
from hybridpar.wires.axis import Axis
from hybridpar.wires.parting import neighbours


class Policy(Protocol):
    """What happens between the replicas around each step of the user's optimizer.

    `company` are the replicas that average their gradients in every step. `own_states`: whether the states of the
    user's optimizer may differ between replicas.
    """

    company: Axis
    own_states: bool

    @property
    def axes(self) -> Sequence[Axis]:
        """Those on which replicas send each other gradients or weights."""

    @property
    def apart(self) -> str | None:
        """Why replicas may hold different weights now, or None."""

    def before(self) -> None:
        """The user's optimizer is about to step."""

    def after(self) -> None:
        """It has stepped."""

    def meet(self) -> None:
        """Make all replicas hold the same weights; all call it together."""

    def state(self) -> Mapping[Parameter, Mapping[str, Tensor]]:
        """What a checkpoint must keep for each parameter, alike on all replicas; asked when they are not apart."""

    def restore(self, kept: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Go on from the weights as they are now, with what was kept."""


class Together:
    """Gradients averaged over all replicas in every step, by `reducer`: nothing is left to do."""

    own_states = False

    def __init__(self, model: Parallel) -> None:
        self.company: Axis = model.world.data
        self.reducer: Reducer | None = None

    @property
    def axes(self) -> Sequence[Axis]:
        return (self.company,)

    @property
    def apart(self) -> str | None:
        return None

    def before(self) -> None:
        return None

    def after(self) -> None:
        return None

    def meet(self) -> None:
        return None

    def state(self) -> Mapping[Parameter, Mapping[str, Tensor]]:
        """What a compression has kept back of the gradients: their mean over the replicas is as good for each."""
        return {p: {"missed": x} for p, x in self.reducer.missed().items()} if self.reducer else {}

    def restore(self, kept: Mapping[Parameter, Mapping[str, Any]]) -> None:
        if self.reducer:
            self.reducer.owe({p: one["missed"] for p, one in kept.items() if "missed" in one})


def policy(wish: Wish, model: Parallel, wire: Wire) -> Policy:
    """The policy that `wish` is for; `wire` is how weights travel."""
    world = model.world
    if isinstance(wish, AllReduce):
        return Together(model)
    if isinstance(wish, LocalSgd):
        wish = DiLoCo(wish.steps, lr=1.0, momentum=0.0)
    if isinstance(wish, DiLoCo):
        company, between = neighbours(world, wish.inside)
        return Rounds(model, company, between, wish, wire)
    if isinstance(wish, Easgd):
        return Elastic(model, world.data, wish, wire)
    return Asynchronous(model, wish)
