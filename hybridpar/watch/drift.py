"""Whether ranks that must hold equal weights do: replicas all of them, tensor ranks those that are not cut.

Replicas take equal steps with equal gradients, so their weights stay equal bit for bit. A checksum of each parameter
is compared; only where two differ is a parameter itself, to tell how far apart they are. What replicas hold once among
them (ZeRO 3) cannot differ between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.model import Parallel
from hybridpar.optim.zero.piece import lone, value
from hybridpar.shard import Spec
from hybridpar.wires.axis import Axis

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**20  # elements at a time, so that little memory is needed


def drifted(model: Parallel, replicas: Axis) -> list[str]:
    """A sentence for each group of this rank whose weights differ, where this rank is the group's first.

    `replicas` is the axis along which all weights must be equal. All its ranks and the tensor peers call it together.

    Example:
        >>> drifted(model, world.peers)                                # doctest: +SKIP
        ['replicas 0 and 1 differ in 3 of 12 parameters, ...']
    """
    world, specs = model.world, model.specs()
    held = {name: p for chunk in model.chunks() for name, p in chunk}
    whole = {name: p for name, p in held.items() if specs.get(name, Spec(name, ())).dim is None}
    found = []
    several = {name: p for name, p in held.items() if not lone(p)}
    for axis, weights, who in ((replicas, several, "replicas"), (world.tensor, whole, "tensor ranks")):
        said = _compared(axis, weights, who)
        if said is not None and axis.index == 0:
            found.append(said)
    return found


def checksum(x: Tensor) -> int:
    """64 bits that tell tensors apart by their bits, of whatever strides.

    Example:
        >>> x = torch.arange(6.0).view(2, 3)
        >>> checksum(x) == checksum(x.t().contiguous().t()), checksum(x) == checksum(x + 1e-6)
        (True, False)
    """
    flat = x.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    words = flat.view(_WORDS[flat.element_size()])
    weights = torch.arange(1, 2 * min(_PIECE, len(words)) + 1, 2, device=words.device)  # odd: every bit counts
    total = 0
    for place, piece in enumerate(words.split(_PIECE)):
        total += (2 * place + 1) * int((piece.long() * weights[: len(piece)]).sum())  # each sum wraps around
    return total % 2**64


def _compared(axis: Axis, weights: dict[str, Parameter], who: str) -> str | None:
    """How the ranks of `axis` differ, the same on all of them; None if they do not."""
    told = axis.objects([checksum(value(p)) for p in weights.values()])
    unequal = [name for place, name in enumerate(weights) if any(t[place] != told[0][place] for t in told)]
    if not unequal:
        return None
    other = next(index for index, t in enumerate(told) if t != told[0])
    name = unequal[0]
    wide = value(weights[name])
    wide = wide.abs() if wide.is_complex() else wide
    most, least = (axis.allreduce(wide.to(torch.float64, copy=True).contiguous(), op) for op in ("max", "min"))
    apart = float((most - least).max())
    size = f"by up to {apart:.3g}" if math.isfinite(apart) else "and are not finite"
    return (
        f"{who} 0 and {other} (ranks {axis.ranks[0]} and {axis.ranks[other]}) differ in {len(unequal)} of "
        f"{len(weights)} parameters, in {name} {size}"
    )
