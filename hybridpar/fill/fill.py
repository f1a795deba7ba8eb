"""Values for a rank's shards: from a seed, from a state dict, or from files by slices.

    parallelize: record -> cut on the meta device -> allocate this rank's part -> fill

No more than one leaf module is whole at a time, and with files none. So a rank needs memory for its shards, and for
the largest leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from hybridpar.fill.names import resolve
from hybridpar.fill.recipe import Entry, Leaf, Recipes
from hybridpar.fill.seed import Init, make, sources
from hybridpar.fill.source import Files, Held, Source
from hybridpar.global_view import take
from hybridpar.shard import Spec
from hybridpar.skeleton.stage import SkeletonStage
from hybridpar.split import Stage
from hybridpar.tensor.plan import Applied
from hybridpar.wires.axis import Axis

Stored = Mapping[str, Tensor] | str | PathLike
Weights = int | Stored | tuple[Stored, int]
Shards = Mapping[str, tuple[Tensor, Spec]]  # what a rank holds, by its name in the unsplit module


def held(stages: Iterable[Stage | SkeletonStage], applied: Applied) -> dict[str, tuple[Tensor, Spec]]:
    """All parameters and buffers of `stages`, those that no state dict has among them."""
    found = {}
    for stage in stages:
        for name, _, p in stage.named():
            found[name] = (p, applied.specs[applied.tied.get(name, name)])
        parts = zip(stage.names, stage.units) if isinstance(stage, Stage) else [("", stage.body)]
        for unit, module in parts:
            for local, x in module.named_buffers(remove_duplicate=False):
                name = f"{unit}.{local}" if unit else local
                found[name] = (x, applied.buffers.get(name, Spec(name, tuple(x.shape))))
    return found


@torch.no_grad()
def fill(recipes: Recipes, shards: Shards, index: int, weights: Weights | None, init: Init | None = None) -> None:
    """Give `shards`, which are allocated, their values. `index` is this rank's along the tensor axis.

    A seed fills what was on the meta device; what was real keeps its values. Stored weights fill whatever a state dict
    has, and what it has not (a rotary embedding's frequencies) is computed by the leaf's own initialisers.

    Raises ValueError for what has no value, and for stored weights that do not fit; each names the tensor.
    """
    seed, source = opened(weights)
    if seed is None and source is None:
        if recipes.empty:
            raise ValueError(
                f"{recipes.empty[0]} is on the meta device and has no values: give hp.parallelize(..., weights=) a "
                "seed, a state dict or a path of safetensors"
            )
        return
    if source is None and not recipes.empty:
        raise ValueError(
            f"weights={seed} is a seed and fills what is on the meta device, where nothing of this module is: build "
            'it under `with torch.device("meta"):`'
        )
    done = _load(recipes, shards, index, source, lenient=seed is not None) if source is not None else frozenset()
    _make(recipes, shards, index, seed or 0, init, done)


def opened(weights: Weights | None) -> tuple[int | None, Source | None]:
    """(the seed, the stored weights): one, both or none of the two. ValueError where it is neither."""
    if isinstance(weights, tuple) and len(weights) == 2 and isinstance(weights[1], int):
        return weights[1], opened(weights[0])[1]
    if isinstance(weights, bool) or not isinstance(weights, int | Mapping | str | PathLike | None):
        raise ValueError(f"weights={weights!r}: give a seed (a whole number), a state dict, or a path of safetensors")
    if isinstance(weights, Mapping):
        return None, Held(weights)
    if isinstance(weights, str | PathLike):
        return None, Files(Path(weights))
    return weights, None


def agree(weights: Weights | None, everyone: Axis) -> None:
    """Raise where ranks were given different weights."""
    seed, source = opened(weights)
    told = everyone.objects((seed, None if source is None else source.fingerprint()))
    for rank, other in enumerate(told):
        if other != told[everyone.index]:
            raise ValueError(f"ranks {everyone.index} and {rank} were given different weights=: give all the same")


def _load(recipes: Recipes, shards: Shards, index: int, source: Source, lenient: bool) -> frozenset[int]:
    """Copy what `source` has; returns the ids of the tensors that it filled."""
    stored = resolve(recipes, source.names(), lenient)
    targets: dict[str, list[Tensor]] = {}
    requests = {}
    for name, (x, spec) in shards.items():
        first = recipes.first(name)
        if first in stored and all(x is not other for other in targets.get(first, ())):
            targets.setdefault(first, []).append(x)
            requests[first] = (stored[first], _named(spec, first))
    for (_, spec), part in source.parts(requests.values(), index):
        for x in targets[spec.name]:
            _same_kind(spec.name, part.dtype, x.dtype)
            x.copy_(part)
    return frozenset(id(x) for several in targets.values() for x in several)


def _make(recipes: Recipes, shards: Shards, index: int, seed: int, init: Init | None, done: frozenset[int]) -> None:
    """Initialise what was on the meta device and is not `done`, leaf by leaf."""
    by_leaf: dict[int, tuple[Leaf, list[tuple[str, Entry, Tensor, Spec]]]] = {}
    for name, (x, spec) in shards.items():
        first = recipes.first(name)
        entry = recipes.entries.get(first)
        if entry is not None and entry.meta and id(x) not in done:
            by_leaf.setdefault(id(entry.leaf), (entry.leaf, []))[1].append((first, entry, x, spec))
    for leaf, wanted in by_leaf.values():
        made = make(leaf, seed, init, parameters=any(entry.parameter for _, entry, _, _ in wanted))
        for name, entry, x, spec in wanted:
            if entry.local not in made:
                raise ValueError(_nothing(name, entry, init))
            if init is None and made[entry.local]._version < entry.writes:
                raise ValueError(_more(name, entry, made[entry.local]._version))
            x.copy_(take(made[entry.local], _named(spec, name), index))


def _named(spec: Spec, name: str) -> Spec:
    return spec if spec.name == name else Spec(name, spec.shape, spec.dim, spec.parts, spec.partial)


def _same_kind(name: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Raise where a cast would be more than rounding."""
    if _kind(stored) != _kind(wanted):
        raise ValueError(f"{name} is {wanted} in this model and {stored} in what is loaded: they do not convert")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "yes or no" if dtype == torch.bool else "whole"


def _nothing(name: str, entry: Entry, init: Init | None) -> str:
    kind = "parameter" if entry.parameter else "buffer"
    tried = f"{sources(entry.leaf)} does" + (" and init= does" if init else "")
    out = (
        "give hp.parallelize(..., init=) a function of (name, module) that sets it"
        if entry.parameter
        else 'build it with device="cpu", which keeps its values even under torch.device("meta")'
    )
    return (
        f"{name} is a {kind} on the meta device which no initialiser sets ({tried} not): give "
        f"{type(entry.leaf.module).__name__} a reset_parameters, or {out}"
    )


def _more(name: str, entry: Entry, writes: int) -> str:
    return (
        f"{name} was written {entry.writes} times while the model was built and {writes} times by "
        f"{sources(entry.leaf)}: a constructor sets it further, which a seed cannot repeat; move that into a "
        "reset_parameters of the module that does it, or give hp.parallelize(..., init=)"
    )
