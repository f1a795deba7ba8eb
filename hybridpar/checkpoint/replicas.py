"""What a sync policy adds to a checkpoint: its own tensors, and optimizers whose states are each replica's own.

    optimizer    "blocks.0.mlp.up.weight/sync.momentum"     alike on all replicas: written once
    replica.1.optimizer                                     the states of replica 1 where they differ from the first's

The weights must be alike on all replicas: `optimizer.meet()` makes them so.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.checkpoint.stream import raw
from hybridpar.mesh import Mesh
from hybridpar.optim.distributed import DistributedOptimizer
from hybridpar.shard import Spec

_MARK = "sync."
_WAY_OUT = "call optimizer.meet() on all ranks before hp.save, or save after the last step of a round"


def replica_kind(replica: int, kind: str = "model") -> str:
    """The kind of what `replica` has of its own among what is of `kind`.

    Example:
        >>> replica_kind(1), replica_kind(1, "optimizer")
        ('replica.1', 'replica.1.optimizer')
    """
    return f"replica.{replica}" if kind == "model" else f"replica.{replica}.{kind}"


def kind_of(kind: str) -> str:
    """The kind without the replica.

    Example:
        >>> kind_of("replica.1"), kind_of("replica.1.optimizer"), kind_of("optimizer")
        ('model', 'optimizer', 'optimizer')
    """
    if not kind.startswith("replica."):
        return kind
    return kind.split(".", 2)[2] if kind.count(".") > 1 else "model"


def on_their_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the replicas' optimizers may have different states."""
    return isinstance(optimizer, DistributedOptimizer) and optimizer.policy.own_states


def kept(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, Tensor]], specs: Mapping[str, Spec]
) -> dict[str, tuple[Tensor, Spec]]:
    """What the policy of `optimizer` keeps, by name. Raises ValueError where replicas are apart."""
    if not isinstance(optimizer, DistributedOptimizer):
        return {}
    if optimizer.policy.apart:
        raise ValueError(f"replicas hold different weights now, since {optimizer.policy.apart}: {_WAY_OUT}")
    state, found = optimizer.policy.state(), {}
    for name, p in parameters:
        for key, x in state.get(p, {}).items():
            whole, spec = f"{name}/{_MARK}{key}", specs[name]
            found[whole] = (x, Spec(whole, spec.shape, spec.dim, spec.parts))
    return found


def given_back(
    optimizer: torch.optim.Optimizer, states: Mapping[Parameter, Mapping[str, Any]]
) -> dict[Parameter, dict[str, Any]]:
    """`states` without what is the policy's, which gets it."""
    if isinstance(optimizer, DistributedOptimizer):
        optimizer.policy.restore(
            {p: {k.removeprefix(_MARK): x for k, x in s.items() if k.startswith(_MARK)} for p, s in states.items()}
        )
    return {p: {k: x for k, x in s.items() if not k.startswith(_MARK)} for p, s in states.items()}


def told(tensors: Iterable[Tensor]) -> int:
    """A sum that tells these tensors from others."""
    total = 0
    for x in tensors:
        total = zlib.crc32(raw(x), total)
    return total


def check_alike(weights: Sequence[int], mesh: Mesh) -> None:
    """Raise ValueError where the replicas' weights, told by each rank, differ."""
    for rank, one in enumerate(weights):
        place = mesh.place(rank)
        if one != weights[mesh.rank(0, place.pipeline, place.tensor)]:
            raise ValueError(f"replicas 0 and {place.data} hold different weights now: {_WAY_OUT}")
