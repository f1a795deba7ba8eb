"""What a checkpoint is made of, told apart by type, in whatever order it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from hybridpar.checkpoint.optimizers import inner, names_of
from hybridpar.checkpoint.plain import from_plain, to_plain
from hybridpar.data import DataLoader
from hybridpar.engine import ParallelModel
from hybridpar.optim.ema import EMA

_KINDS = "a parallel model, optimizers, learning rate schedulers, a GradScaler, an hp.EMA and an hp.DataLoader"


@dataclass
class Parts:
    """The objects of one training. Several optimizers and schedulers are told apart by their order."""

    model: ParallelModel
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    schedulers: list[LRScheduler] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None
    loader: DataLoader | None = None
    ema: EMA | None = None

    @classmethod
    def of(cls, given: Sequence[Any]) -> Parts:
        """Raises ValueError for what is of no known kind, for two of what there is one of, and without a model."""
        types = {
            "model": ParallelModel, "optimizer": torch.optim.Optimizer, "scheduler": LRScheduler,
            "scaler": torch.amp.GradScaler, "loader": DataLoader,
            "ema": EMA,
        }  # fmt: skip
        found: dict[str, list[Any]] = {name: [] for name in types}
        for one in given:
            kind = next((name for name, type_ in types.items() if isinstance(one, type_)), None)
            if kind is None and one is not None:
                raise ValueError(f"{type(one).__name__} is not kept as such: give {_KINDS}; the rest goes into extra=")
            if kind is not None:
                found[kind].append(one)
        for kind in ("model", "scaler", "loader", "ema"):
            if len(found[kind]) > 1:
                raise ValueError(f"{len(found[kind])} of kind {kind}: a checkpoint has one; save them apart")
        if not found["model"]:
            raise ValueError("a checkpoint needs the model that hp.parallelize returned: give it among the objects")
        first = {kind: next(iter(found[kind]), None) for kind in ("scaler", "loader", "ema")}
        if first["ema"] is not None:
            first["ema"].check_apart("hp.save or hp.load of an hp.EMA")
        return cls(found["model"][0], found["optimizer"], found["scheduler"], **first)

    def names(self) -> dict[int, str]:
        """The name of each parameter of this rank, by the id of what optimizers step: it, or its piece."""
        return names_of(self.model.named_parameters())

    def trained(self) -> list[set[str]]:
        """The names of what each optimizer trains on this rank."""
        names = self.names()
        several = [(p for group in inner(o).param_groups for p in group["params"]) for o in self.optimizers]
        return [{names[id(p)] for p in parameters if id(p) in names} for parameters in several]

    def states(self) -> dict[str, Any]:
        """What is the same on every rank, as plain values."""
        told: dict[str, Any] = {"steps": self.model.steps}
        told["schedulers"] = [
            {"class": type(one).__name__, "state": to_plain(_kept(one), f"{type(one).__name__}.state_dict()")}
            for one in self.schedulers
        ]
        if self.model.scaling is not None:
            told["scaling"] = self.model.scaling.state_dict()
        if self.scaler is not None:
            told["scaler"] = to_plain(self.scaler.state_dict(), "GradScaler.state_dict()")
        if self.ema is not None:
            told["ema"] = {"updates": self.ema.updates, "decay": self.ema.decay}
        if self.loader is not None:
            told["loader"] = to_plain(self.loader.state_dict(), "DataLoader.state_dict()")
        return told

    def check(self, states: dict[str, Any]) -> None:
        """Raise ValueError where the saved `states` lack what is here, or have it otherwise."""
        here, there = [type(s).__name__ for s in self.schedulers], [s["class"] for s in states["schedulers"]]
        if here and here != there:
            raise ValueError(f"the checkpoint has the schedulers {there or 'none'} and here are {here}")
        for kind in ("scaler", "loader", "ema"):
            if getattr(self, kind) is not None and kind not in states:
                raise ValueError(f"the checkpoint was saved without a {kind}: leave it out of hp.load")
        if self.loader is not None:
            self.loader.check_state(from_plain(states["loader"]))

    def restore(self, states: dict[str, Any]) -> None:
        """Give everything but the model and the optimizers its saved state."""
        self.model.steps = states["steps"]
        if self.model.scaling is not None and "scaling" in states:
            self.model.scaling.load_state_dict(states["scaling"])
        for scheduler, told in zip(self.schedulers, states["schedulers"]):
            scheduler.load_state_dict(from_plain(told["state"]))
        if self.ema is not None:
            self.ema.updates = states["ema"]["updates"]
        if self.scaler is not None:
            self.scaler.load_state_dict(from_plain(states["scaler"]))
        if self.loader is not None:
            self.loader.load_state_dict(from_plain(states["loader"]))


def _kept(scheduler: LRScheduler) -> dict[str, Any]:
    """A scheduler's state without functions, which its constructor is given anew."""
    return {key: value for key, value in scheduler.state_dict().items() if not callable(value)}
