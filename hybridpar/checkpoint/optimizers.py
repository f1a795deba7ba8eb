"""An optimizer's state in the global view: by the names that parameters have in the unsplit module.

    optimizer.state[p]["exp_avg"]      of p's shape: cut as p is; whole in the file, "blocks.0.mlp.up.weight/exp_avg"
    optimizer.state[p]["step"]         a number: stored once
    anything else                      only where p is not cut: nobody could say how to put it together

With ZeRO the optimizer steps pieces of parameters: their states are parts of what a state of the parameter would be,
put together when they are saved and taken apart when they are loaded, so a checkpoint does not know of it.

Groups are lists of names and the options beside them (learning rate and so on).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridpar.checkpoint import replicas
from hybridpar.checkpoint.manifest import Stored
from hybridpar.checkpoint.plain import from_plain, to_plain
from hybridpar.optim.distributed import DistributedOptimizer
from hybridpar.optim.zero.piece import Scattered, piece_of, stepped
from hybridpar.shard import Spec

_NOT_OPTIONS = ("params", "param_names")


@dataclass(frozen=True)
class Described:
    """This rank's part of an optimizer: tensors with their specs by name, and the rest as plain values."""

    tensors: dict[str, tuple[Tensor | Scattered, Spec]]
    values: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]


def inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The user's own optimizer: reading through ours would wait for gradients."""
    return optimizer.inner if isinstance(optimizer, DistributedOptimizer) else optimizer


def names_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """The name of each parameter, by the id of what the optimizer steps: the parameter, or its piece."""
    return {id(stepped(p)): name for name, p in parameters}


def describe(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, Tensor]], specs: Mapping[str, Spec]
) -> Described:
    """What `optimizer` knows of this rank's `parameters`.

    Raises ValueError for a parameter that is not among them, and for a state that cannot be told from its shape.
    """
    parameters = list(parameters)
    names, pieces = names_of(parameters), {id(one.held): one for _, p in parameters if (one := piece_of(p))}
    optimizer = inner(optimizer)
    tensors: dict[str, tuple[Tensor | Scattered, Spec]] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if id(p) not in names:
            raise ValueError(
                f"parameter {number} of {type(optimizer).__name__}, of shape {tuple(p.shape)}, is not one of this "
                "rank's part of the model: make the optimizer from model.parameters()"
            )
        name = names[id(p)]
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                spec = _spec(f"{name}/{key}", value, p, specs[name], optimizer)
                scattered = id(p) in pieces and value.dim()
                tensors[f"{name}/{key}"] = (Scattered(pieces[id(p)], value) if scattered else value, spec)
            else:
                values.setdefault(name, {})[key] = to_plain(value, f"{name}/{key}")
    return Described(tensors, values, [_group(group, names, i) for i, group in enumerate(optimizer.param_groups)])


def merged(parts: Sequence[tuple[str, Described]]) -> dict[str, Any]:
    """What the manifest says of an optimizer, from the (class, description) of one rank of each stage.

    Raises ValueError where ranks have different optimizers.
    """
    kind, first = parts[0]
    for other, one in parts:
        if other != kind or len(one.groups) != len(first.groups):
            raise ValueError(
                f"ranks have different optimizers: {kind} with {len(first.groups)} groups of parameters and {other} "
                f"with {len(one.groups)}; make them alike"
            )
    groups = [
        {"names": [name for _, one in parts for name in one.groups[i]["names"]], "options": group["options"]}
        for i, group in enumerate(first.groups)
    ]
    return {"class": kind, "groups": groups, "values": {k: v for _, one in parts for k, v in one.values.items()}}


def check(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    specs: Mapping[str, Spec],
    saved: Mapping[str, Any],
    stored: Mapping[str, Stored],
) -> None:
    """Raise ValueError where the saved optimizer is not one like this."""
    optimizer = inner(optimizer)
    kind = type(optimizer).__name__
    if saved["class"] != kind:
        raise ValueError(f"the checkpoint has the state of {saved['class']} and this optimizer is {kind}")
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint's optimizer has {len(saved['groups'])} groups of parameters and this one has "
            f"{len(optimizer.param_groups)}"
        )
    homes = {name: i for i, group in enumerate(saved["groups"]) for name in group["names"]}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            name = names[id(p)]
            if name not in homes:
                raise ValueError(
                    f"{name} is trained by this optimizer and was not by the checkpoint's: freeze it, or leave the "
                    "optimizer out of hp.load"
                )
            if homes[name] != i:
                raise ValueError(f"{name} is in group {i} of this optimizer and in group {homes[name]} of the saved")
    mine = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    for key, one in stored.items():
        name = key.rpartition("/")[0]
        spec = specs.get(name)
        if name in mine and spec is not None and spec.dim is not None and one.shape not in (spec.shape, ()):
            raise ValueError(f"{key} has shape {list(one.shape)} and cannot be cut as {name} {list(spec.shape)} is")


def untrained(saved: Mapping[str, Any], trained: set[str]) -> None:
    """Raise ValueError where the saved optimizer trains what no rank's does now; `trained` are all ranks' names."""
    lost = [name for group in saved["groups"] for name in group["names"] if name not in trained]
    if lost:
        raise ValueError(
            f"{lost[0]} (and {len(lost) - 1} more) was trained by the checkpoint's optimizer and is not by this one: "
            "unfreeze it, or leave the optimizer out of hp.load"
        )


def wanted(p: Tensor, name: str, spec: Spec, stored: Mapping[str, Stored]) -> dict[str, Spec]:
    """{name of a stored tensor of the state of `p`: what of it is for this rank}"""
    return {
        key: (Spec(key, one.shape) if one.shape != spec.shape else spec)
        for key, one in stored.items()
        if key.rpartition("/")[0] == name
    }


def restore(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    saved: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give `optimizer` its saved options and states; `tensors` are this rank's, by parameter and key."""
    given, optimizer = optimizer, inner(optimizer)
    for group, told in zip(optimizer.param_groups, saved["groups"]):
        for key, value in from_plain(told["options"]).items():
            if isinstance(group.get(key), Tensor):
                group[key].copy_(torch.as_tensor(value))  # others may hold this tensor, as a graph of CUDA does
            else:
                group[key] = value
    parameters = {p: names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    states = {p: {**from_plain(saved["values"].get(n, {})), **tensors.get(n, {})} for p, n in parameters.items()}
    for p, state in replicas.given_back(given, states).items():
        optimizer.state.pop(p, None)
        if state:
            optimizer.state[p] = state


def _group(group: Mapping[str, Any], names: Mapping[int, str], number: int) -> dict[str, Any]:
    options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
    return {
        "names": [names[id(p)] for p in group["params"]],
        "options": to_plain(options, f"group {number} of the optimizer"),
    }


def _spec(key: str, value: Tensor, p: Tensor, spec: Spec, optimizer: torch.optim.Optimizer) -> Spec:
    if value.shape == p.shape and p.dim():
        return Spec(key, spec.shape, spec.dim, spec.parts)
    if spec.dim is None or not value.dim():
        return Spec(key, tuple(value.shape))
    raise ValueError(
        f"{key} of {type(optimizer).__name__} has shape {list(value.shape)} and its parameter's shard "
        f"{list(p.shape)}: a state of a cut parameter must have its shape or be a number; save without the optimizer, "
        "or use one that keeps such states"
    )
