"""Between a parameter's shards and the whole: what a spec says, done to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridpar.shard import Spec
from hybridpar.wires.axis import Axis

if TYPE_CHECKING:
    from hybridpar.wires.world import World


def take(whole: Tensor, spec: Spec, index: int) -> Tensor:
    """The shard of `whole` that `index` holds, a tensor of its own.

    Raises ValueError where the shape is not the spec's.
    """
    if tuple(whole.shape) != spec.shape:
        found, wanted = list(whole.shape), list(spec.shape)
        raise ValueError(f"{spec.name} has shape {wanted} in this model and {found} in what is loaded")
    if spec.dim is None:
        return whole.clone()
    return torch.cat([whole.narrow(spec.dim, a, b - a) for a, b in spec.held(index)], spec.dim)


def gather(shard: Tensor, spec: Spec, axis: Axis) -> Tensor:
    """The whole of a parameter (or of anything cut like it), from the shards along `axis`; on every rank of it."""
    if spec.dim is None:
        return shard.detach().clone()
    together = axis.allgather(shard.detach(), spec.dim)
    whole = torch.empty(spec.shape, dtype=shard.dtype, device=shard.device)
    ranges = [r for index in range(axis.size) for r in spec.held(index)]
    ends = [0]
    for a, b in ranges:
        ends.append(ends[-1] + b - a)
    for (a, b), (start, stop) in zip(ranges, pairwise(ends)):
        whole.narrow(spec.dim, a, b - a).copy_(together.narrow(spec.dim, start, stop - start))
    return whole


def wholes(
    mine: Mapping[str, Tensor],
    homes: Mapping[str, int],
    specs: Mapping[str, Spec],
    world: World,
    read: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor | None]:
    """The whole of each tensor named in `homes`, on the CPU of every rank; all ranks of the replica together.

    `mine` are this rank's shards, `homes` the pipeline index of those who have shards. None where no tensor rank there
    has one; a rank that alone lacks it has zeros. `read` gives what of a shard is gathered, one after another.
    """
    whole: dict[str, Tensor | None] = {}
    told = world.replica.objects({name: x.dtype for name, x in mine.items()})
    for name, home in homes.items():
        spec, owners = specs[name], [world.mesh.rank(0, home, t) for t in range(world.tensor.size)]
        dtype = next((told[owner][name] for owner in owners if name in told[owner]), None)
        if dtype is None:
            whole[name] = None
            continue
        empty = {"dtype": dtype, "device": world.device}
        if world.pipeline.index == home:
            shard = read(mine[name]) if name in mine else torch.zeros(spec.local_shape(world.tensor.index), **empty)
            x = gather(shard, spec, world.tensor).contiguous()
        else:
            x = torch.empty(spec.shape, **empty)
        whole[name] = world.replica.broadcast(x, owners[0]).cpu()
    return whole


def everywhere(x: Tensor | None, source: int, axis: Axis, device: torch.device) -> Tensor | None:
    """The tensor of index `source`, on every rank of `axis`, who need not know its shape; None if there is none."""
    told = axis.objects(None if x is None else (x.dtype, tuple(x.shape)))[source]
    if told is None:
        return None
    dtype, shape = told
    here = x.detach().contiguous() if axis.index == source else torch.empty(shape, dtype=dtype, device=device)
    return axis.broadcast(here, source)
