"""Which attention modules can be cut by heads, and how: by the names of their layers and by what their code reads.

    q k v           q, q_proj, query, q_lin ..          nn.Linear or Conv1D, whole heads each
    fused           c_attn, query_key_value, qkv ..     in layouts known by the class
    out             o_proj, out_proj, c_proj, dense ..  in the module, or in a sibling called `output` (BERT)

A forward that reads nothing but what is known here works on any number of heads, since the projections are its only
access to them: the rest are shapes, which get this index's counts, and numbers that do not depend on the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hybridpar.tensor.derive.source import Reads, Unsure, reads
from hybridpar.tensor.linear import features

_ROLES: Mapping[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", "q", "wq", "query_proj", "q_attn", "linear_q"),
    "k": ("k_proj", "key", "k_lin", "k", "wk", "key_proj", "linear_k"),
    "v": ("v_proj", "value", "v_lin", "v", "wv", "value_proj", "linear_v"),
    "fused": ("query_key_value", "c_attn", "qkv_proj", "qkv", "Wqkv"),
    "out": ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "o", "wo", "projection", "proj", "linear_out"),
}
# The layout of fused projections is in the code only; these have been read.
_LAYOUTS: Mapping[str, str] = {
    "GPT2Attention": "blocks",
    "DecisionTransformerGPT2Attention": "blocks",
    "ImageGPTAttention": "blocks",
    "Phi3Attention": "blocks",
    "BlipAttention": "blocks",
    "GPTNeoXAttention": "groups",
    "BloomAttention": "groups",
    "PersimmonAttention": "groups",
    "FalconAttention": "falcon",
}
_COUNTS: Mapping[str, str] = {
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head"), "heads"),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), "kv_heads"),
    **dict.fromkeys(("num_key_value_groups", "n_rep", "num_kv_groups"), "groups"),
    **dict.fromkeys(("all_head_size", "inner_dim", "embed_dim", "hidden_size"), "width"),
    **dict.fromkeys(("split_size", "d_model", "dim"), "width"),
}
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_NUMBERS = {
    *_WIDTHS,
    "layer_idx",
    "layer_id",
    "sliding_window",
    "rotary_ndims",
    "rotary_dim",
    "max_position_embeddings",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "pretraining_tp",
    "window_size",
}
_ARGUMENTS = {
    *("hidden_states", "x", "residual", "query", "attention_mask", "mask", "position_embeddings", "position_ids"),
    *("past_key_values", "cache", "past_key_value", "layer_past", "use_cache", "cache_position", "output_attentions"),
    *("key_value_states", "encoder_hidden_states", "encoder_attention_mask", "current_states", "rotary_pos_emb"),
    *("is_causal", "cu_seqlens", "max_seqlen", "cos", "sin", "causal_attention_mask"),
}
_ON_PROBABILITIES = ("attn_dropout", "attention_dropout", "attn_drop")
_POSITIONS = ("embed_positions", "inv_freq")
_AFTER_OUT = ("resid_dropout", "resid_attn_dropout", "proj_drop", "proj_dropout", "out_dropout", "output_dropout")


@dataclass(frozen=True)
class Heads:
    """An attention module that can be cut by heads.

    `layers` are the paths of its projections by role and `core` that of the module which counts heads. `counts` and
    `config` say which of its attributes, and of its config's, are numbers of heads or of their features. `partial` are
    modules that see each head alone, `tables` embeddings with a column per head, `probabilities` dropouts on
    [b, h, l, l].
    """

    layers: Mapping[str, str]
    core: str
    heads: int
    kv_heads: int
    width: int
    layout: str = ""
    counts: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    probabilities: tuple[str, ...] = ()
    alibi: bool = False


def looks(module: nn.Module) -> bool:
    """Whether `module` has queries, keys and values as children, or all in one, and a way out of them.

    Example:
        >>> looks(nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}))
        True
    """
    return _find(module) is not None


def recognised(module: nn.Module) -> Heads:
    """How `module` is cut by heads. Unsure, with the reason, where its code is not known to work on some heads.

    Example:
        >>> recognised(LlamaAttention(config, 0)).kv_heads                    # doctest: +SKIP
        8
    """
    found = _find(module)
    if found is None:
        raise Unsure(f"{type(module).__name__} has no q, k, v and out projections under known names")
    core_path, layers = found
    core = module.get_submodule(core_path)
    heads, kv_heads, width, layout = _sizes(module, core, layers)
    inside = {where.removeprefix(f"{core_path}.") if core_path else where for where in layers.values()}
    known = reads(core)
    if taken := sorted(inside & known.within):
        raise Unsure(f"its forward takes the weights of {taken[0]} itself")
    alibi = _arguments(core, known)
    parts = _children(core, core_path, inside, known, heads, width, "." in layers["out"])
    _weights(module, core, core_path, inside, parts, layers["out"])
    values = {"heads": heads, "kv_heads": kv_heads, "groups": heads // kv_heads, "width": heads * width}
    counts = _counts(core, known.attributes, values)
    config = _config(core, known.config, values)
    return Heads(layers, core_path, heads, kv_heads, width, layout, counts, config, alibi=alibi, **parts)


def _find(module: nn.Module) -> tuple[str, dict[str, str]] | None:
    """The path of the module that holds the projections, and the paths of these by role."""
    own = _roles(module)
    if {"q", "k", "v", "out"} <= own.keys() and "fused" not in own:
        return "", own
    if {"fused", "out"} == own.keys():
        return "", own
    for inner in ("self", "attention"):  # BERT and its kin
        core, after = (getattr(module, child, None) for child in (inner, "output"))
        dense = getattr(after, "dense", None)
        if isinstance(core, nn.Module) and isinstance(dense, nn.Module):
            layers = _roles(core)
            if layers.keys() == {"q", "k", "v"}:
                return inner, {role: f"{inner}.{where}" for role, where in layers.items()} | {"out": "output.dense"}
    return None


def _roles(module: nn.Module) -> dict[str, str]:
    children = dict(module.named_children())
    found = {}
    for role, names in _ROLES.items():
        there = [name for name in names if name in children]
        if len(there) == 1 and hasattr(children[there[0]], "weight"):
            found[role] = there[0]
    return found


def _sizes(module: nn.Module, core: nn.Module, layers: Mapping[str, str]) -> tuple[int, int, int, str]:
    """heads, kv_heads, width and layout, once the projections have been found to agree with them."""
    shape = {}
    for role, where in layers.items():
        try:
            shape[role] = features(module.get_submodule(where), "heads", where)
        except ValueError:
            raise Unsure(f"{where} is a {type(module.get_submodule(where)).__name__}, not a plain nn.Linear") from None
    inner = shape["out"][0]
    width = next((getattr(core, n) for n in _WIDTHS if isinstance(getattr(core, n, None), int)), None)
    if width is None:
        count = next((getattr(core, n) for n, m in _COUNTS.items() if m == "heads" and hasattr(core, n)), None)
        if not isinstance(count, int) or count < 1:
            raise Unsure("the number of its heads is under no known name")
        width = inner // count
    if width < 1 or inner % width:
        raise Unsure(f"{inner} features into {layers['out']} are not whole heads of {width}")
    heads, layout = inner // width, ""
    if "fused" in layers:
        layout, kv_heads = _layout(core, heads, shape["fused"][1], width, layers["fused"])
    else:
        q, k, v = (shape[role][1] for role in "qkv")
        kv_heads = k // width
        if q != inner or k != v or k % width:
            raise Unsure(f"queries, keys and values have {q}, {k} and {v} features for heads of {width}")
    if kv_heads < 1 or heads % kv_heads:
        raise Unsure(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    return heads, kv_heads, width, layout


def _layout(core: nn.Module, heads: int, outputs: int, width: int, name: str) -> tuple[str, int]:
    """The layout of a fused projection and its key-value heads."""
    layout = _LAYOUTS.get(type(core).__name__)
    if layout is None:
        raise Unsure(f"in which order {type(core).__name__} takes {name} apart is not known")
    kv_heads, rest = divmod(outputs // width - heads, 2)
    if outputs % width or rest:
        raise Unsure(f"{outputs} features of {name} are not queries, keys and values of {heads} heads of {width}")
    if layout == "falcon":  # one key and value after all queries, or groups
        layout = "blocks" if kv_heads == 1 and not core.new_decoder_architecture else "groups"
    return layout, kv_heads


def _arguments(core: nn.Module, known: Reads) -> bool:
    """Whether the forward is given slopes of ALiBi. Unsure where it is given what may have a dim of heads."""
    config = getattr(core, "config", None)
    for name in known.arguments:
        own_bias = name == "position_bias" and hasattr(core, "has_relative_attention_bias")  # made by itself
        if name not in _ARGUMENTS and name != "alibi" and not own_bias:
            raise Unsure(f"its forward takes {name}, which may be cut by heads")
    return "alibi" in known.arguments and (type(core).__name__ == "BloomAttention" or _no_alibi(config))


def _no_alibi(config: Any) -> bool:
    if getattr(config, "alibi", True):
        raise Unsure("its forward takes alibi, whose layout is not known")
    return False


def _children(
    core: nn.Module, prefix: str, inside: set[str], known: Reads, heads: int, width: int, out_beside: bool
) -> dict[str, tuple[str, ...]]:
    """The children besides the projections: what sees single heads, what has a column per head, dropouts of them."""
    partial, tables, probabilities = [], [], []
    for name in known.attributes:
        child = getattr(core, name, None)
        if not isinstance(child, nn.Module) or name in inside:
            continue
        where = f"{prefix}.{name}" if prefix else name
        shapes = [tuple(p.shape) for p in child.parameters()]
        if isinstance(child, nn.Dropout):
            if name not in known.called or name in _AFTER_OUT or child.p == 0:
                continue
            if name not in _ON_PROBABILITIES and not (name == "dropout" and out_beside):
                raise Unsure(f"whether {name} works on the heads is not known")
            probabilities.append(where)
        elif isinstance(child, nn.Embedding) and child.embedding_dim == heads and "relative_attention_bias" in name:
            tables.append(where)
        elif shapes and all(shape == (width,) for shape in shapes) and heads > 1 and "norm" in name:
            partial.append(where)
        elif shapes and (type(core).__name__, name) == ("AlbertAttention", "LayerNorm"):
            continue  # it comes after `out`
        elif shapes:
            raise Unsure(f"{name} ({type(child).__name__}) sees all heads together")
        elif not isinstance(child, nn.Identity) and not any(word in name for word in ("rotary", "rope", "act", "norm")):
            raise Unsure(f"what {name} ({type(child).__name__}) does with the heads is not known")
        elif "norm" in name and not isinstance(child, nn.Identity):
            raise Unsure(f"whether {name} ({type(child).__name__}) sees each head alone is not known")
    return {"partial": tuple(partial), "tables": tuple(tables), "probabilities": tuple(probabilities)}


def _weights(
    module: nn.Module, core: nn.Module, prefix: str, inside: set[str], parts: Mapping[str, tuple[str, ...]], out: str
) -> None:
    """Unsure where the module has weights that are neither projections nor known."""
    beside = out.rpartition(".")[0]
    known = {f"{prefix}.{name}" if prefix else name for name in inside} | {w for some in parts.values() for w in some}
    for name, _ in module.named_parameters():
        above = name.rpartition(".")[0]
        albert = type(core).__name__ == "AlbertAttention" and above == "LayerNorm"
        if above in known or albert or (beside and name.startswith(f"{beside}.")):
            continue  # what comes after `out` in a sibling sees the whole
        raise Unsure(f"what its weight {name} does with the heads is not known")


def _counts(core: nn.Module, attributes: Mapping[str, bool], values: Mapping[str, int]) -> dict[str, str]:
    """Which of the attributes are counts, once all have been found harmless otherwise."""
    counts = {n: m for n, m in _COUNTS.items() if m == "groups" and getattr(core, n, None) == values[m]}
    for name, shapes in attributes.items():
        value = getattr(core, name, None)
        if name == "config" or value is None or isinstance(value, nn.Module | bool | str | float | dict | list):
            continue
        if isinstance(value, Tensor):
            fixed = value.numel() <= 1 or tuple(value.shape[:2]) == (1, 1) or name in _POSITIONS
            if isinstance(value, nn.Parameter) or not fixed:
                raise Unsure(f"its forward reads the tensor {name} {list(value.shape)}")
        elif name in _COUNTS and isinstance(value, int):
            meaning = _COUNTS[name]
            if value != values[meaning] or not (shapes or meaning == "groups"):
                raise Unsure(f"its forward reads {name}={value}, and not for the shape of its heads alone")
            counts[name] = meaning
        elif name not in _NUMBERS and not (callable(value) and "rot" in name):
            raise Unsure(f"its forward reads {name}={value}, which is not known")
    return counts


def _config(core: nn.Module, names: set[str], values: Mapping[str, int]) -> dict[str, str]:
    """Which of what is read of the config are counts."""
    counts = {}
    for name in names:
        value = getattr(core.config, name, None)
        if name in _COUNTS:
            if value != values[_COUNTS[name]]:
                raise Unsure(f"its forward reads config.{name}={value}")
            counts[name] = _COUNTS[name]
        elif isinstance(value, int) and not isinstance(value, bool) and name not in _NUMBERS:
            raise Unsure(f"its forward reads config.{name}={value}, which is not known")
    return counts
