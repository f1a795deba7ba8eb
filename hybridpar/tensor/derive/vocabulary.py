"""Token embeddings and heads over the vocabulary that can be cut by it: found by the model's own accessors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

from hybridpar.tensor.derive.source import Unsure
from hybridpar.tensor.embedding import VocabularyEmbedding
from hybridpar.tensor.linear import features
from hybridpar.wires.axis import Alone


def vocabulary(module: nn.Module, logits: str) -> Iterator[tuple[dict[str, str], int, str | None]]:
    """For each weight over the vocabulary: (style by module name, entries, or None and the reason to leave it whole).

    All modules that share a weight are cut, or none. `logits` is the style of heads.
    """
    places: dict[int, list[str]] = {}
    names: dict[int, list[str]] = {}
    found = {id(m) for m in (_asked(module, "get_input_embeddings"), _asked(module, "get_output_embeddings")) if m}
    for name, child in module.named_modules(remove_duplicate=False):
        weight = child._parameters.get("weight")
        if weight is not None and name:
            names.setdefault(id(weight), []).append(name)
            if id(child) in found:
                places[id(weight)] = names[id(weight)]
    for mine in places.values():
        try:
            styles = {name: _style(module, name, logits) for name in mine}
            entries = len(module.get_submodule(mine[0]).weight)
        except Unsure as reason:
            yield dict.fromkeys(mine, "whole"), 0, str(reason)
            continue
        yield styles, entries, None


def _asked(module: nn.Module, accessor: str) -> nn.Module | None:
    """What Hugging Face's accessors say; None where there is no answer."""
    try:
        found = getattr(module, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _style(module: nn.Module, name: str, logits: str) -> str:
    child, leaf = module.get_submodule(name), name.rpartition(".")[2]
    _not_read(module, leaf)
    try:
        if isinstance(child, nn.Embedding):
            VocabularyEmbedding(child, Alone("tensor"), name=name)
            return "vocabulary"
        features(child, logits, name)
        return logits
    except ValueError:
        raise Unsure(f"{name} is a {type(child).__name__}, whose code is its own") from None


def _not_read(module: nn.Module, leaf: str) -> None:
    """Unsure where some forward takes the weight itself, as in F.linear(x, self.embed.weight)."""
    for kind in {type(m) for m in module.modules() if not type(m).__module__.startswith("torch.")}:
        forward = kind.__dict__.get("forward")
        try:
            source = inspect.getsource(inspect.unwrap(forward)) if forward else ""
        except (OSError, TypeError):
            source = ""
        if re.search(rf"\b{re.escape(leaf)}\.weight\b(?!\.(dtype|device))", source):
            raise Unsure(f"the forward of {kind.__name__} takes {leaf}.weight itself")
