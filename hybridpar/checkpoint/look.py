"""Checkpoints looked at without a model or ranks: which there are, what is in them, whether they are whole, how they
differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridpar.checkpoint import folders, manifest
from hybridpar.checkpoint.manifest import Manifest
from hybridpar.checkpoint.plain import from_plain
from hybridpar.fill.source import Files
from hybridpar.shard import Spec


@dataclass(frozen=True)
class Difference:
    """One thing in which two checkpoints differ; `largest` is the largest absolute difference of a tensor."""

    name: str
    what: str
    largest: float | None = None


def listed(path: Path) -> list[tuple[Path, Manifest | str]]:
    """The complete checkpoints in `path` (or `path` itself), the oldest first, each with its manifest or what is wrong
    with that. ValueError where there is no such folder."""
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    several = [path] if folders.is_complete(path) else folders.complete(path)
    return [(one, _told(one)) for one in several]


def shown(told: Manifest) -> dict[str, Any]:
    """What is worth knowing of a checkpoint, as plain values."""
    numbers = {kind: _numbers(told, kind) for kind in told.tensors}
    return {
        "step": told.step,
        "written": told.written,
        "layout": told.layout,
        "bytes": told.bytes_held,
        "tensors": {kind: len(several) for kind, several in told.tensors.items()},
        "numbers": numbers,
        "optimizers": [
            {"class": one["class"], "parameters": sum(len(group["names"]) for group in one["groups"])}
            for one in told.states["optimizers"]
        ],
        "schedulers": [one["class"] for one in told.states["schedulers"]],
        "loader": told.states.get("loader"),
        "metrics": told.metrics,
        "tied": told.tied,
        "extra": [str(key) for key in from_plain(told.states.get("extra", {}))],
        "versions": told.versions,
    }


def flaws(path: Path) -> list[str]:
    """All that is wrong with the checkpoint `path`, one sentence each: lost, truncated, corrupted, unknown files.

    Raises ValueError where it is none, or its manifest itself is damaged.
    """
    told = manifest.read(path)
    found = [manifest.flaw(path, name, file) for name, file in sorted(told.files.items())]
    unknown = {one.name for one in path.iterdir()} - {manifest.NAME, *told.files}
    strange = [f"{path / name} is foreign: the manifest does not speak of it" for name in sorted(unknown)]
    return [wrong for wrong in found if wrong is not None] + strange


def differences(left: Path, right: Path, only_model: bool = False) -> Iterator[Difference]:
    """In what two checkpoints differ: tensors one by one, then everything else that is kept.

    Generators differ between any two runs of another layout and are left out.
    """
    ours, theirs = manifest.read(left), manifest.read(right)
    kinds = dict.fromkeys([*ours.tensors, *theirs.tensors])
    for kind in ["model"] if only_model else kinds:
        mine, others = ours.tensors.get(kind, {}), theirs.tensors.get(kind, {})
        for name in dict.fromkeys([*mine, *others]):
            label = name if kind == "model" else f"{kind}: {name}"
            if name not in mine or name not in others:
                yield Difference(label, f"only in {left if name in mine else right}")
            elif (mine[name].shape, mine[name].dtype) != (others[name].shape, others[name].dtype):
                forms = [f"{list(one.shape)} {one.dtype}" for one in (mine[name], others[name])]
                yield Difference(label, f"{forms[0]} and {forms[1]}")
            else:
                yield from _compared(label, tensor(left, ours, kind, name), tensor(right, theirs, kind, name))
    if not only_model:
        mine, others = ({"step": told.step, **_lasting(told)} for told in (ours, theirs))
        if all(one["step"] == one["steps"] for one in (mine, others)):  # unless hp.save was given another
            mine.pop("steps"), others.pop("steps")
        yield from _states("", mine, others)


def tensor(path: Path, told: Manifest, kind: str, name: str) -> Tensor:
    """One whole tensor of a checkpoint."""
    one = told.tensors[kind][name]
    source = Files.listed({one.name: path / one.file})
    return next(source.parts([(one.name, Spec(name, one.shape))], 0))[1]


def _compared(label: str, left: Tensor, right: Tensor) -> Iterator[Difference]:
    if left.equal(right) or (left.isnan() & right.isnan() | (left == right)).all():
        return
    largest = float((left.double() - right.double()).abs().max())
    share = float((left != right).double().mean())
    yield Difference(label, f"{share:.1%} of {left.numel()} numbers, by {largest:.3g} at most", largest)


def _states(name: str, left: Any, right: Any) -> Iterator[Difference]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in dict.fromkeys([*left, *right]):
            where = f"{name}.{key}" if name else str(key)
            if key not in left or key not in right:
                yield Difference(where, f"only in the {'first' if key in left else 'second'}")
            else:
                yield from _states(where, left[key], right[key])
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for i, (one, other) in enumerate(zip(left, right)):
            yield from _states(f"{name}[{i}]", one, other)
    elif left != right:
        yield Difference(name, f"{_short(left)} and {_short(right)}")


def _lasting(told: Manifest) -> dict[str, Any]:
    """The states without generators, and with groups of parameters in an order that no layout changes."""
    states = {name: value for name, value in told.states.items() if name not in ("randomness", "optimizers")}
    several = [
        {**one, "groups": [{**group, "names": sorted(group["names"])} for group in one["groups"]]}
        for one in told.states["optimizers"]
    ]
    return {**states, "optimizers": several}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _numbers(told: Manifest, kind: str) -> int:
    return sum(prod(one.shape) for one in told.tensors[kind].values())


def _told(path: Path) -> Manifest | str:
    try:
        return manifest.read(path)
    except ValueError as error:
        return str(error)
