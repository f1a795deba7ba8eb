"""Whole tensors, one at a time, at the rank that writes them: its tensor peers send it their shards.

A shard that is itself in parts over the replicas (ZeRO) is put together first, at the replica that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hybridpar.checkpoint.stream import DTYPES
from hybridpar.checkpoint.writers import Item
from hybridpar.optim.zero.piece import Scattered
from hybridpar.shard import Spec
from hybridpar.wires.world import World

_TAG = 7  # nothing else is under way on the tensor axis between two steps

Held = tuple[Tensor | Scattered | None, Spec]  # this rank's shard, None where it has none yet and its peers do


def wholes(
    items: Sequence[Item],
    writers: Mapping[tuple[str, str], int],
    held: Callable[[Item], Held],
    world: World,
    copied: bool,
) -> Iterator[Tensor]:
    """What this rank writes of `items`, in order, on the CPU; all ranks go through it together.

    With `copied` a tensor stays as it is now whatever becomes of the model.
    """
    here = world.place
    for item in items:
        writer = writers[item.key]
        place = world.mesh.place(writer)
        if place.pipeline != here.pipeline:
            continue
        shard, spec = held(item)
        if isinstance(shard, Scattered):
            shard = shard.collected(place.data)
            shard = None if shard is None else shard.to(world.device)  # pieces may lie elsewhere (offload)
        if place.data != here.data:
            continue
        if spec.dim is None:
            if writer == world.rank:
                x = _there(shard, spec.shape, item, world)
                yield x.clone() if copied and x.device.type == "cpu" else x.cpu()
            continue
        shard = _there(shard, spec.local_shape(here.tensor), item, world)
        if writer == world.rank:
            yield _collected(shard, spec, world).cpu()
        elif shard.numel():
            world.tensor.send(shard.contiguous(), place.tensor, _TAG).wait()


def _there(shard: Tensor | None, shape: Sequence[int], item: Item, world: World) -> Tensor:
    """The shard; zeros, as a lazy optimizer starts with, on a rank that has had no gradient yet."""
    if shard is not None:
        return shard.detach()
    return torch.zeros(tuple(shape), dtype=DTYPES[item.dtype], device=world.device)


def _collected(mine: Tensor, spec: Spec, world: World) -> Tensor:
    axis = world.tensor
    whole = torch.empty(spec.shape, dtype=mine.dtype, device=mine.device)
    for index in range(axis.size):
        piece = mine
        if index != axis.index:
            piece = torch.empty(spec.local_shape(index), dtype=mine.dtype, device=mine.device)
            if piece.numel():
                piece = axis.recv(piece, index, _TAG).wait()
        start = 0
        for a, b in spec.held(index):
            whole.narrow(spec.dim, a, b - a).copy_(piece.narrow(spec.dim, start, b - a))
            start += b - a
    return whole
