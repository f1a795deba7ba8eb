"""Attention modules of other people's code cut by whole heads, in place: their own forward computes this index's heads.

    q, k, v     column layers    parts: the heads of `attention.heads_held`, head_dim features each
    fused       column layer     [queries | keys | values], or group by group, as `Heads.layout` says
    out         row layer        parts: those of the queries
    counts      num_heads, num_key_value_heads, embed_dim .. where the forward reads them become this index's own

What may be cut so is for `hybridpar.tensor.derive.attention` to say; it reads the module's code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.seeds import Draw
from hybridpar.shard import Range, Spec, cut
from hybridpar.tensor import collectives
from hybridpar.tensor.attention import heads_held
from hybridpar.tensor.derive.attention import Heads, recognised
from hybridpar.tensor.derive.source import Unsure
from hybridpar.tensor.dropout import Dropout, Held
from hybridpar.tensor.linear import ColumnLinear, Parts, RowLinear, hold
from hybridpar.wires.axis import Axis

Span = tuple[Range, Range]  # query heads and key-value heads


class HeadEmbedding(nn.Module):
    """The columns of an nn.Embedding [buckets, heads] that belong to this index's heads (T5's position biases).

    Example:
        >>> layer = HeadEmbedding(nn.Embedding(32, 4), Alone("tensor"), (((0, 4),),))
        >>> layer(torch.zeros(5, 5, dtype=torch.long)).shape
        torch.Size([5, 5, 4])
    """

    def __init__(self, embedding: nn.Embedding, axis: Axis, parts: Parts) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.axis, self.parts = axis, parts
        self.training = embedding.training
        self.weight = hold(embedding.weight, self.specs()["weight"], axis.index)

    def specs(self) -> dict[str, Spec]:
        """What is held of the weight."""
        return {"weight": cut("weight", (self.num_embeddings, self.embedding_dim), 1, self.parts)}

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., heads_tp]
        return F.embedding(ids, self.weight)


def shard(module: nn.Module, axis: Axis, draw: Draw, name: str) -> None:
    """Cut `module` in place; `name` is its global name, for errors and as the site of its masks.

    Masks that its code draws by function calls are made by the plan, with the heads `held`.

    ValueError where its code is not known to work on a part of the heads, or there are too few heads.
    """
    found = read(module, name)
    spans = heads_held(found.heads, found.kv_heads, axis.size, name)
    queries = tuple((_features(q, 0, found.width),) for q, _ in spans)
    keys = tuple((_features(kv, 0, found.width),) for _, kv in spans)
    parts = {"q": queries, "k": keys, "v": keys, "fused": tuple(_fused(found, span) for span in spans)}
    for role, where in found.layers.items():
        layer = module.get_submodule(where)
        if role == "out":
            _put(module, where, RowLinear(layer, axis, queries, name=f"{name}.{where}"))
        else:
            _put(module, where, ColumnLinear(layer, axis, parts[role], name=f"{name}.{where}"))
    for where in found.tables:
        _put(module, where, HeadEmbedding(module.get_submodule(where), axis, tuple((q,) for q, _ in spans)))
    for where in found.probabilities:
        old = module.get_submodule(where)
        mask = Dropout(old.p, f"{name}.{where}", draw, Held(1, (spans[axis.index][0],)))
        _put(module, where, mask.train(old.training))
    _count(module.get_submodule(found.core), found, spans[axis.index], axis)


def held(module: nn.Module, axis: Axis, name: str) -> dict[str, Range]:
    """The query heads of this index by the path of each module that sees them; before it is cut."""
    found = read(module, name)
    mine = heads_held(found.heads, found.kv_heads, axis.size, name)[axis.index][0]
    return {path: mine for path in {"", found.core}}


def inside(modules: Mapping[str, nn.Module], styles: Mapping[str, str]) -> dict[str, str]:
    """The styles of what works on single heads inside modules of style "heads": their gradients are shares."""
    cut = [name for name, style in styles.items() if style == "heads"]
    return {f"{name}.{path}": "partial" for name in cut for path in read(modules[name], name).partial}


def read(module: nn.Module, name: str) -> Heads:
    """What is known of the attention `module`. ValueError with the reason where that is not enough."""
    try:
        return recognised(module)
    except Unsure as reason:
        raise ValueError(
            f'{name}: {type(module).__name__} cannot be cut with style "heads": {reason}; leave it out of the plan'
        ) from None


def _count(core: nn.Module, found: Heads, span: Span, axis: Axis) -> None:
    """Tell the module how many heads its forward computes."""
    (q0, q1), (k0, k1) = span
    values = {"heads": q1 - q0, "kv_heads": k1 - k0, "groups": (q1 - q0) // (k1 - k0), "width": (q1 - q0) * found.width}
    for attribute, meaning in found.counts.items():
        setattr(core, attribute, values[meaning])
    if found.config:
        core.config = copy.copy(core.config)  # the other modules' stays as it is
        for attribute, meaning in found.config.items():
            setattr(core.config, attribute, values[meaning])
    if found.alibi:
        core.register_forward_pre_hook(_AlibiOfHeads(found.heads, (q0, q1)), with_kwargs=True)
    if any("relative_position_bias" in name and on for name, on in vars(getattr(core, "config", None) or core).items()):
        core.register_forward_pre_hook(_MaskOfHeads(found.heads, (q0, q1), axis), with_kwargs=True)


class _AlibiOfHeads:
    """A forward pre-hook that hands on the slopes of this index's heads."""

    def __init__(self, heads: int, held: Range) -> None:
        self._heads, self._held = heads, held

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        alibi = kwargs.get("alibi")  # [b heads, 1, l]
        if alibi is None:
            return args, kwargs
        start, stop = self._held
        mine = alibi.unflatten(0, (-1, self._heads))[:, start:stop].flatten(0, 1)
        return args, {**kwargs, "alibi": mine}


class _MaskOfHeads:
    """A forward pre-hook that cuts masks [b, heads, l, l] with a bias of each head (BEiT): those of this index."""

    def __init__(self, heads: int, held: Range, axis: Axis) -> None:
        self._heads, self._held, self._axis = heads, slice(*held), axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(self._mine, args)), {name: self._mine(value) for name, value in kwargs.items()}

    def _mine(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[1] != self._heads:
            return value
        return collectives.copy(value, self._axis)[:, self._held]  # its maker has the gradients of all heads


def _fused(found: Heads, span: Span) -> tuple[Range, ...]:
    """The output features of a fused projection that belong to `span`."""
    q, kv = span
    if found.layout == "blocks":
        starts = (0, found.heads, found.heads + found.kv_heads)  # of queries, keys, values, in heads
        return tuple(_features(part, start, found.width) for part, start in zip((q, kv, kv), starts))
    each = found.width * (found.heads // found.kv_heads + 2)  # the queries of a group, its key, its value
    return ((kv[0] * each, kv[1] * each),)


def _features(heads: Range, first: int, width: int) -> Range:
    return (first + heads[0]) * width, (first + heads[1]) * width


def _put(module: nn.Module, where: str, new: nn.Module) -> None:
    above, _, leaf = where.rpartition(".")
    setattr(module.get_submodule(above), leaf, new)
