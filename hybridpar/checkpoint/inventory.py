"""All that a checkpoint will hold, known alike on every rank: tensors with their writers, and plain values."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridpar.checkpoint import optimizers, randomness, replicas
from hybridpar.checkpoint.agreement import together
from hybridpar.checkpoint.gathering import Held
from hybridpar.checkpoint.manifest import File, Manifest
from hybridpar.checkpoint.optimizers import Described
from hybridpar.checkpoint.parts import Parts
from hybridpar.checkpoint.replicas import replica_kind
from hybridpar.checkpoint.stream import dtype_name, raw
from hybridpar.checkpoint.writers import Item, assign, in_order, stored
from hybridpar.engine import ParallelModel
from hybridpar.optim.zero.piece import kept
from hybridpar.shard import Spec


@dataclass(frozen=True)
class _Told:
    """What one rank tells the others."""

    goal: str
    items: list[Item]
    own: dict[tuple[str, str], int]  # a sum of each buffer or state here: replicas may differ in them
    weights: int  # a sum of all, where replicas train for themselves
    optimizers: list[tuple[str, Described]]  # without tensors
    random: str


class Inventory:
    """`items` in the order in which all ranks go through them, `writers` by key; `config` is Hugging Face's."""

    def __init__(
        self,
        given: Parts,
        mine: Mapping[tuple[str, str], Held],
        told: Sequence[_Told],
        rest: Mapping[str, Any],
        step: int,
    ) -> None:
        mesh = given.model.world.mesh
        several = {item.key: item for one in told for item in one.items}
        several |= {item.key: item for item in _of_replicas(several, told, given.model)}
        self.items = in_order(several.values())
        self.writers = assign(self.items, mesh)
        self.config = _config(given.model)
        self._mine, self._specs, self._rest, self._step = mine, given.model._unsplit.specs, rest, step
        self._mesh, self._tied = mesh, dict(given.model._unsplit.tied)
        firsts = [told[mesh.rank(0, p, 0)] for p in range(mesh.pipeline)]
        self._states = {  # now: a thread asks for the manifest when the training has gone on
            **given.states(),
            "optimizers": [optimizers.merged(parts) for parts in zip(*(one.optimizers for one in firsts))],
            "randomness": randomness.merged([one.random for one in told]),
            "extra": rest["extra"],
        }

    def held(self, item: Item) -> Held:
        """This rank's shard of `item`."""
        kind = replicas.kind_of(item.kind)
        if (kind, item.name) in self._mine:
            return self._mine[kind, item.name]
        spec = self._specs[item.name.rpartition("/")[0]]
        return None, (spec if item.shape == spec.shape else Spec(item.name, item.shape))

    def manifest(self, written: Mapping[str, File], now: str) -> Manifest:
        """That of the checkpoint whose tensors are `written`."""
        mesh = self._mesh
        return Manifest(
            step=self._step,
            written=now,
            layout={"data": mesh.data, "pipeline": mesh.pipeline, "tensor": mesh.tensor},
            files=dict(written),
            tensors=stored(self.items, self.writers),
            tied=self._tied,
            metrics=self._rest["metrics"],
            states=self._states,
            versions={"torch": str(torch.__version__)},
        )


def inventory(given: Parts, rest: Mapping[str, Any], step: int | None, goal: str) -> Inventory:
    """Ask all ranks what they have. Raises ValueError, on all, for what cannot be kept."""
    mine: dict[tuple[str, str], Held] = {}
    told = together(given.model.world.everyone, lambda: _tell(given, mine, goal))
    replicas.check_alike([one.weights for one in told], given.model.world.mesh)
    for rank, one in enumerate(told):
        if one.goal != told[0].goal:
            raise ValueError(f"rank {rank} saves to {one.goal} and rank 0 to {told[0].goal}: give all the same path")
        if len(one.optimizers) != len(told[0].optimizers):
            raise ValueError(
                f"rank {rank} saves {len(one.optimizers)} optimizers and rank 0 {len(told[0].optimizers)}: give alike"
            )
    return Inventory(given, mine, told, rest, given.model.steps if step is None else step)


def _tell(given: Parts, mine: dict[tuple[str, str], Held], goal: str) -> _Told:
    """What this rank has: told in small, and for itself with the tensors, into `mine`."""
    world, unsplit = given.model.world, given.model._unsplit
    homes, here = unsplit.homes, unsplit.mine()
    here = {name: held for name, held in here.items() if homes.get(name) == world.place.pipeline}
    mine |= {("model", name): (kept(x), spec) for name, (x, spec) in here.items()}
    if given.ema is not None:
        mine |= {("ema", name): (x, unsplit.specs[name]) for name, x in given.ema.averages.items()}
    described, own = [], {("model", name) for name in unsplit.buffers if ("model", name) in mine}
    for number, optimizer in enumerate(given.optimizers):
        kind = optimizer_kind(number)
        one = optimizers.describe(optimizer, given.model.named_parameters(), unsplit.specs)
        several = replicas.kept(optimizer, given.model.named_parameters(), unsplit.specs)
        mine |= {(kind, name): held for name, held in {**one.tensors, **several}.items()}
        own |= {(kind, name) for name in one.tensors if replicas.on_their_own(optimizer)}
        described.append((type(optimizers.inner(optimizer)).__name__, Described({}, one.values, one.groups)))
    items = [
        Item(kind, name, spec.shape, dtype_name(x.dtype, name), world.place.pipeline)
        for (kind, name), (x, spec) in mine.items()
        if world.place.data == 0
    ]
    weights = replicas.told(p for _, p in given.model.named_parameters()) if given.model.on_their_own else 0
    sums = {key: zlib.crc32(raw(mine[key][0])) for key in own}
    return _Told(goal, items, sums, weights, described, randomness.state(world.device))


def optimizer_kind(number: int) -> str:
    """The kind of tensors of optimizer `number`."""
    return "optimizer" if number == 0 else f"optimizer.{number}"


def _of_replicas(several: Mapping[tuple[str, str], Item], told: Sequence[_Told], model: ParallelModel) -> list[Item]:
    """What later replicas have otherwise than the first one, such as running statistics; and that of the first, which
    only its own ranks can write then."""
    mesh, found = model.world.mesh, {}
    for rank, one in enumerate(told):
        place = mesh.place(rank)
        first = told[mesh.rank(0, place.pipeline, place.tensor)].own
        for (kind, name), value in one.own.items():
            if first.get((kind, name)) != value and (kind, name) in several:
                item = several[kind, name]
                for which, replica in ((kind, 0), (replica_kind(place.data, kind), place.data)):
                    found[which, name] = Item(which, name, item.shape, item.dtype, item.pipeline, replica)
    return list(found.values())


def _config(model: ParallelModel) -> str | None:
    """What Hugging Face keeps beside the weights, if the module is one of theirs."""
    for stage in model._stages.values():
        for module in stage.modules():
            config = getattr(module, "config", None)
            if callable(getattr(config, "to_json_string", None)):
                return config.to_json_string()
    return None
