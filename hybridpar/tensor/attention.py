"""Attention cut over the tensor axis by heads, in place: the module's own forward computes this index's heads.

    heads of 6 queries, 2 key-values           tensor=2                    tensor=4
        q0 q1 q2 | q3 q4 q5                     q0-2 kv0 | q3-5 kv1          q0-1 kv0 | q2 kv0 | q3-4 kv1 | q5 kv1
          kv0         kv1

Key-value heads stay with the queries that use them (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245). With fewer
key-value heads than ranks, ranks that share one hold copies of it; each then has a share of its gradient.

The module's protocol is that of `models.gpt.Attention`: `heads`, `kv_heads` and `head_dim` say what its forward
computes; children `qkv` (output features: queries, keys, values) or `q`, `k`, `v`; `out`; and maybe `dropout`, on
probabilities [b, h, l, l].
"""

from __future__ import annotations

from torch import nn

from hybridpar.seeds import Draw
from hybridpar.shard import Range, balanced
from hybridpar.tensor.dropout import Dropout, Held
from hybridpar.tensor.linear import ColumnLinear, RowLinear
from hybridpar.tensor.sequence import Sequence
from hybridpar.wires.axis import Axis

CHILDREN = ("qkv", "q", "k", "v", "out", "dropout")


def heads_held(heads: int, kv_heads: int, degree: int, name: str = "attention") -> tuple[tuple[Range, Range], ...]:
    """For each index of the tensor axis its query heads and its key-value heads, both [start, stop).

    ValueError where an index would get no query head.

    Example:
        >>> heads_held(6, 2, 4)
        (((0, 2), (0, 1)), ((2, 3), (0, 1)), ((3, 5), (1, 2)), ((5, 6), (1, 2)))
    """
    if heads < degree:
        raise ValueError(f"{heads} heads cannot be cut over tensor={degree} at {name}; use tensor={heads} or less")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{name}: {heads} heads are not a multiple of {kv_heads} key-value heads")
    shared = heads // kv_heads
    if kv_heads >= degree:
        return tuple(((a * shared, b * shared), (a, b)) for a, b in balanced(kv_heads, degree))
    return tuple(
        ((kv * shared + a, kv * shared + b), (kv, kv + 1))
        for kv, (first, last) in enumerate(balanced(degree, kv_heads))
        for a, b in balanced(shared, last - first)
    )


def shard(module: nn.Module, axis: Axis, draw: Draw, sequence: Sequence | None = None, name: str = "attention") -> None:
    """Cut `module` in place; `name` is its global name, for errors and as the site of its masks.

    ValueError where the module does not follow the protocol or has too few heads.
    """
    heads, kv_heads, width = protocol(module, name)
    held = heads_held(heads, kv_heads, axis.size, name)
    (q0, q1), (k0, k1) = held[axis.index]
    queries = tuple((_features(q, 0, width),) for q, _ in held)
    if hasattr(module, "qkv"):
        starts = (0, heads, heads + kv_heads)  # of queries, keys, values, in heads
        parts = tuple(
            tuple(_features(span, start, width) for span, start in zip((q, kv, kv), starts)) for q, kv in held
        )
        module.qkv = ColumnLinear(module.qkv, axis, parts, sequence, f"{name}.qkv")
    else:
        keys = tuple((_features(kv, 0, width),) for _, kv in held)
        for child, parts in (("q", queries), ("k", keys), ("v", keys)):
            setattr(module, child, ColumnLinear(getattr(module, child), axis, parts, sequence, f"{name}.{child}"))
    module.out = RowLinear(module.out, axis, queries, sequence, f"{name}.out")
    if isinstance(getattr(module, "dropout", None), nn.Dropout):
        training = module.dropout.training
        module.dropout = Dropout(module.dropout.p, f"{name}.dropout", draw, Held(1, ((q0, q1),))).train(training)
    module.heads, module.kv_heads = q1 - q0, k1 - k0


def _features(heads: Range, first: int, width: int) -> Range:
    return (first + heads[0]) * width, (first + heads[1]) * width


def protocol(module: nn.Module, name: str) -> tuple[int, int, int]:
    """heads, kv_heads, head_dim, once the children have been found to agree with them."""
    children = ("qkv", "out") if hasattr(module, "qkv") else ("q", "k", "v", "out")
    missing = [n for n in ("heads", "kv_heads", "head_dim", *children) if not hasattr(module, n)]
    if missing:
        raise ValueError(
            f'{name}: {type(module).__name__} has no {", ".join(missing)}, which style "attention" needs; '
            f'cut its layers as "column" and "row", or see hybridpar.tensor.attention for the protocol'
        )
    heads, kv_heads, width = module.heads, module.kv_heads, module.head_dim
    lengths = {"qkv": heads + 2 * kv_heads, "q": heads, "k": kv_heads, "v": kv_heads}
    for child in children[:-1]:
        found = getattr(getattr(module, child), "out_features", None)
        if found != lengths[child] * width:
            raise ValueError(
                f"{name}.{child} has {found} output features, and {heads} heads with {kv_heads} key-value heads "
                f"of {width} features need {lengths[child] * width}"
            )
    return heads, kv_heads, width
