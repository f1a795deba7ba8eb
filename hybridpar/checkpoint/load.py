"""`hp.load`: each rank reads its own slices, whatever mesh and schedule the checkpoint was written by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridpar.checkpoint import manifest, optimizers, randomness
from hybridpar.checkpoint.agreement import together
from hybridpar.checkpoint.folders import newest
from hybridpar.checkpoint.inventory import optimizer_kind
from hybridpar.checkpoint.manifest import Manifest, Stored
from hybridpar.checkpoint.parts import Parts
from hybridpar.checkpoint.plain import from_plain
from hybridpar.checkpoint.replicas import on_their_own, replica_kind
from hybridpar.checkpoint.save import settle
from hybridpar.fill.source import Files
from hybridpar.mesh import Mesh
from hybridpar.optim.zero.piece import piece_of, put
from hybridpar.proof.point import listener
from hybridpar.shard import Spec


@dataclass(frozen=True)
class Loaded:
    """What was loaded: the checkpoint's folder, its step, and what was kept with it."""

    path: Path
    step: int
    extra: dict[str, Any]
    metrics: dict[str, float]
    mesh: Mesh  # the one that it was written by


def load(path: str | Path, *parts: Any, verify: bool = True) -> Loaded:
    """Give `parts` the state that they have in a checkpoint; all ranks call it together.

    `path` is a checkpoint, or a folder of checkpoints of which the newest complete one is taken. `parts` are of the
    kinds that `hp.save` takes; what the checkpoint has and is not asked for is left where it is. The mesh, the schedule
    and the number of stages may all differ from those that it was written by. `verify` reads all files once, shared
    between the ranks, and compares their checksums.

    Raises ValueError, before anything is changed, for what is damaged, foreign or newer (by the name of the file), and
    for a model, an optimizer or a loader that is another one than the checkpoint's.

    Example:
        >>> hp.load("run", model, optimizer, loader, schedule).step     # doctest: +SKIP
        1200
    """
    given = Parts.of(parts)
    world = given.model.world
    settle(given)
    found = together(world.everyone, lambda: str(newest(Path(path).absolute())) if world.rank == 0 else "")[0]
    one = _Loading(Path(found), given)
    wrong = one.read(verify)
    if wrong is not None:
        raise ValueError(wrong)
    return one.finish()


def load_newest_whole(several: Sequence[Path], given: Parts, verify: bool) -> tuple[Loaded | None, dict[Path, str]]:
    """Load the last of `several` that is not damaged, and say what is wrong with those after it.

    All ranks call it together, with the same `several`. Nothing is loaded, and None returned, where none is whole.
    Raises ValueError as `load` does for what is whole and does not fit.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(several):
        one = _Loading(path, given)
        wrong = one.read(verify)
        if wrong is None:
            return one.finish(), damaged
        damaged[path] = wrong
    return None, damaged


class _Loading:
    def __init__(self, folder: Path, given: Parts) -> None:
        self.folder, self._given, self._world = folder, given, given.model.world
        self._unsplit = given.model._unsplit

    def read(self, verify: bool) -> str | None:
        """The manifest, and whether the files are those that it speaks of: on all ranks what is wrong, if anything."""
        told: list[Manifest] = []
        wrong = self._first(lambda: _read(told, self.folder))
        if wrong is not None:
            return wrong
        self.told = self._same(told[0])
        wrong = self._first(lambda: self._flaw(verify))
        return None if wrong is None else f"{wrong}; load an earlier checkpoint"

    def finish(self) -> Loaded:
        """Compare, then restore."""
        self.check()
        together(self._world.everyone, self.restore)
        told = self.told
        mesh = Mesh(**told.layout)
        return Loaded(self.folder, told.step, from_plain(told.states["extra"]), dict(told.metrics), mesh)

    def check(self) -> None:
        """Raise, on all ranks, where the checkpoint is of something else."""
        trained = together(self._world.everyone, self._compare)
        for number, saved in enumerate(self._saved_optimizers()):
            optimizers.untrained(saved, set().union(*(one[number] for one in trained)))

    @torch.no_grad()
    def restore(self) -> None:
        """Read this rank's slices and set everything."""
        told = self.told
        listener().loads(self._given.model, _Whole(self.folder, told))
        mine = self._unsplit.mine()
        wanted = {name: (self._stored_name(name), spec) for name, (_, spec) in mine.items()}
        for name, part in self._parts("model", wanted):
            put(mine[name][0], part)
        then = Mesh(**told.layout)
        own = replica_kind(self._world.place.data)
        if then.data == self._world.mesh.data and own in told.tensors:
            wanted = {name: (name, mine[name][1]) for name in told.tensors[own] if name in mine}
            for name, part in self._parts(own, wanted):
                put(mine[name][0], part)
        names, specs = self._given.names(), self._unsplit.specs
        for number, (optimizer, saved) in enumerate(zip(self._given.optimizers, self._saved_optimizers())):
            optimizers.restore(optimizer, names, saved, self._state(number, optimizer, specs, names))
        if self._given.ema is not None:
            stored, averages = told.tensors.get("ema", {}), self._given.ema.averages
            wanted = {name: (name if name in stored else told.tied.get(name, name), specs[name]) for name in averages}
            for name, part in self._parts("ema", wanted):
                averages[name].copy_(part)
        self._given.restore(told.states)
        states = randomness.mine(told.states["randomness"], then, self._world.mesh, self._world.rank)
        randomness.restore(states, self._world.device)

    def _first(self, work: Callable[[], str | None]) -> str | None:
        """What the first rank says that says anything."""
        return next((words for words in together(self._world.everyone, work) if words is not None), None)

    def _same(self, told: Manifest) -> Manifest:
        stamps = together(self._world.everyone, lambda: (told.step, told.written))
        for rank, stamp in enumerate(stamps):
            if stamp != stamps[0]:
                raise ValueError(
                    f"{self.folder} is of step {stamp[0]} ({stamp[1]}) for rank {rank} and of step {stamps[0][0]} "
                    f"({stamps[0][1]}) for rank 0: load from a folder that all hosts share, or copy it to all of them"
                )
        return told

    def _flaw(self, verify: bool) -> str | None:
        """Sizes of all files; checksums of every n-th one, the ranks together of all."""
        by_size = sorted(self.told.files.items(), key=lambda one: -one[1].size)
        mine = {name for name, _ in by_size[self._world.rank :: self._world.mesh.size]}
        for name, file in by_size:
            wrong = manifest.flaw(self.folder, name, file, deep=verify and name in mine)
            if wrong:
                return wrong
        return None

    def _compare(self) -> list[set[str]]:
        stored, tied = self.told.tensors.get("model", {}), self._unsplit.tied
        for name in self._unsplit.homes:
            if self._stored_name(name) not in stored:
                raise ValueError(f"{name} is in this model and not in {self.folder}, which has {len(stored)} tensors")
        known = {self._stored_name(name) for name in self._unsplit.homes}
        for name in stored:
            if name not in known:
                why = f"tied to {tied[name]} in this model and not there" if name in tied else "not in this model"
                raise ValueError(f"{name} is in {self.folder} and {why}: build the model that was saved")
        for name, (x, spec) in self._unsplit.mine().items():
            one = stored[self._stored_name(name)]
            if one.shape != spec.shape:
                raise ValueError(
                    f"{name} has shape {list(spec.shape)} in this model and {list(one.shape)} in {self.folder}"
                )
            _same_kind(name, x, one)
        self._compare_rest()
        return self._given.trained()

    def _compare_rest(self) -> None:
        told, names = self.told, self._given.names()
        saved = told.states["optimizers"]
        if len(self._given.optimizers) not in (0, len(saved)):
            raise ValueError(f"{self.folder} has {len(saved)} optimizers and {len(self._given.optimizers)} were given")
        for number, (optimizer, one) in enumerate(zip(self._given.optimizers, saved)):
            optimizers.check(optimizer, names, self._unsplit.specs, one, told.tensors.get(optimizer_kind(number), {}))
        self._given.check(told.states)

    def _saved_optimizers(self) -> list[Mapping[str, Any]]:
        return self.told.states["optimizers"][: len(self._given.optimizers)]

    def _stored_name(self, name: str) -> str:
        """Where a parameter is stored: tied ones go by one of their names."""
        return name if name in self.told.tensors.get("model", {}) else self.told.tied.get(name, name)

    def _state(
        self, number: int, optimizer: torch.optim.Optimizer, specs: Mapping[str, Spec], names: Mapping[int, str]
    ) -> dict[str, dict[str, Tensor]]:
        """This rank's states of an optimizer, by parameter and key."""
        kind = optimizer_kind(number)
        groups = optimizers.inner(optimizer).param_groups
        parameters = {names[id(p)]: (p, group) for group in groups for p in group["params"]}
        pieces = {name: piece for name, p in self._given.model.named_parameters() if (piece := piece_of(p))}
        stored, model = self.told.tensors.get(kind, {}), self.told.tensors["model"]
        wanted = {}
        for key, one in stored.items():
            name = key.rpartition("/")[0]
            if name in parameters:
                spec = specs[name]
                wanted[key] = (key, spec if one.shape == spec.shape else Spec(key, one.shape))
        found: dict[str, dict[str, Tensor]] = {}
        own_kind = replica_kind(self._world.place.data, kind)
        parts = self._parts(kind, wanted)
        if on_their_own(optimizer) and Mesh(**self.told.layout).data == self._world.mesh.data:
            mine = {key: wanted[key] for key in self.told.tensors.get(own_kind, {}) if key in wanted}
            parts = chain(parts, self._parts(own_kind, mine))  # what this replica has of its own comes last
        for key, part in parts:
            name, _, own = key.rpartition("/")
            p, group = parameters[name]
            if name in pieces and own != "step" and stored[key].shape == specs[name].shape:
                part = pieces[name].part(part)
            as_parameter = stored[key].dtype == model[self._stored_name(name)].dtype and own != "step"
            device = p.device if part.dim() or group.get("capturable") or group.get("fused") else "cpu"
            found.setdefault(name, {})[own] = part.to(device, p.dtype if as_parameter else part.dtype)
        return found

    def _parts(self, kind: str, wanted: Mapping[str, tuple[str, Spec]]) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's part) of each; `wanted` has the stored name and the spec."""
        stored = self.told.tensors.get(kind, {})
        source = Files.listed({name: self.folder / one.file for name, one in stored.items()})
        requests = {}
        for name, (there, spec) in wanted.items():
            requests.setdefault((there, spec), []).append(name)
        for request, part in source.parts(requests, self._world.place.tensor):
            for name in requests[request]:
                yield name, part


class _Whole(Mapping[str, Tensor]):
    """The model's tensors as they were in the unsplit module, each read when it is asked for."""

    def __init__(self, folder: Path, told: Manifest) -> None:
        self._stored = told.tensors["model"]
        self._tied = told.tied
        self._files = Files.listed({name: folder / one.file for name, one in self._stored.items()})

    def __getitem__(self, name: str) -> Tensor:
        there = name if name in self._stored else self._tied[name]
        return next(self._files.parts([(there, Spec(there, self._stored[there].shape))], 0))[1]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._stored, *self._tied])

    def __len__(self) -> int:
        return len(self._stored) + len(self._tied)


def _read(told: list[Manifest], folder: Path) -> str | None:
    """Put the manifest into `told`, or say how it is damaged."""
    try:
        told.append(manifest.read(folder))
    except manifest.Damaged as error:
        return str(error)
    return None


def _same_kind(name: str, x: Tensor, one: Stored) -> None:
    floats = one.dtype.startswith(("F", "BF"))
    if floats != x.dtype.is_floating_point:
        raise ValueError(f"{name} is {x.dtype} in this model and {one.dtype} in what is loaded: they do not convert")
