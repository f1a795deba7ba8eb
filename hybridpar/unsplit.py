"""The unsplit module, seen from its parts: whole parameters, buffers and gradients by their own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hybridpar.global_view import everywhere, gather, take, wholes
from hybridpar.optim.zero.piece import gradient, put, value
from hybridpar.shard import Spec
from hybridpar.tensor.plan import Applied

if TYPE_CHECKING:
    from hybridpar.checkpoint.saving import Saving
    from hybridpar.wires.world import World


class Unsplit:
    """`homes` and `buffer_homes` are the pipeline index of each parameter and buffer; `owned` and `kept` give this
    rank's parameters and buffers by name. All ranks of a replica call its methods together, `load` apart."""

    def __init__(
        self,
        world: World,
        applied: Applied,
        homes: Mapping[str, int],
        buffer_homes: Mapping[str, int],
        owned: Callable[[], Mapping[str, nn.Parameter]],
        kept: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._world, self._applied = world, applied
        self._homes, self._buffer_homes, self._owned, self._kept = homes, buffer_homes, owned, kept
        self.saving: Saving | None = None  # the asynchronous save that is under way, or the last one

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers, whole, on the CPU; buffers are those of the first replica."""
        world, kept = self._world, self._kept()
        state = wholes(dict(self._owned()), self._homes, self._applied.specs, world, value)
        state |= {name: state[first] for name, first in self._applied.tied.items()}
        for name, home in self._buffer_homes.items():
            here = kept.get(name)
            if name in self._applied.buffers and world.pipeline.index == home:
                here = gather(here, self._applied.buffers[name], world.tensor)
            one = everywhere(here, world.mesh.rank(0, home, 0), world.replica, world.device)
            state[name] = world.peers.broadcast(one, 0).cpu()
        return state

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradients, whole, on the CPU."""
        found = {name: gradient(p) for name, p in self._owned().items()}
        grads = {name: grad for name, grad in found.items() if grad is not None}
        return wholes(grads, self._homes, self._applied.specs, self._world)

    def mine(self) -> dict[str, tuple[Tensor, Spec]]:
        """This rank's parameters and buffers with their specs, by name."""
        specs, cut = self._applied.specs, self._applied.buffers
        mine = {name: (p, specs[name]) for name, p in self._owned().items()}
        return mine | {name: (x, cut.get(name, Spec(name, tuple(x.shape)))) for name, x in self._kept().items()}

    @property
    def homes(self) -> dict[str, int]:
        """The pipeline index of each parameter and buffer that a checkpoint has."""
        return {**self._homes, **self._buffer_homes}

    @property
    def buffers(self) -> frozenset[str]:
        """Which of `homes` are buffers."""
        return frozenset(self._buffer_homes)

    @property
    def tied(self) -> Mapping[str, str]:
        """{other name of a tied parameter: the one it is stored under}"""
        return self._applied.tied

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The spec of every parameter of the whole module, those of other stages among them."""
        return self._applied.specs

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's shards and buffers from whole ones.

        Raises ValueError where one is missing or of another shape.
        """
        for name, (x, spec) in self.mine().items():
            if name not in state:
                raise ValueError(f"{name} is missing in what is loaded, which has {len(state)} tensors")
            put(x, take(state[name], spec, self._world.tensor.index))
