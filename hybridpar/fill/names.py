"""Which stored tensor is for which parameter: names with and without a base model's prefix, shared ones, lost ones.

    the model                     what is stored                  prefix "model"
    model.layers.0.w, head.w      model.layers.0.w, head.w        as they are
    model.layers.0.w, head.w      layers.0.w                      put before: stored by the base model alone
    layers.0.w                    model.layers.0.w, head.w        taken away: stored with a head, which is passed over

Hugging Face models name the prefix in `base_model_prefix`, and transformers knows the names of older formats.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable

from hybridpar.fill.recipe import Recipes


def resolve(recipes: Recipes, stored: Iterable[str], lenient: bool = False) -> dict[str, str]:
    """{name of an entry: name of the stored tensor}, for all entries that a state dict has.

    With `lenient` entries may be missing. ValueError names what is missing, else what the model does not have.
    """
    modern = _modernised(recipes, list(stored))
    prefixed = _prefixing(recipes, modern.values())
    renamed = {name: old for old, new in modern.items() if (name := prefixed(new)) is not None}
    found = {}
    missing = []
    for name, entry in recipes.entries.items():
        known = next((other for other in recipes.also(name) if other in renamed), None)
        if known is not None and entry.persistent:
            found[name] = renamed[known]
        elif entry.persistent and not _waived(recipes, name, "_keys_to_ignore_on_load_missing"):
            missing.append(name)
    if missing and not lenient:
        raise ValueError(
            f"{_several(missing)} missing in the weights: the model has {len(recipes.entries)} tensors and they have "
            f"{_some(list(modern))}; weights=(weights, seed) would draw what is missing from a seed"
        )
    mine = recipes.entries.keys() | recipes.aliases.keys()
    unexpected = [
        old
        for new, old in renamed.items()
        if new not in mine and not _waived(recipes, old, "_keys_to_ignore_on_load_unexpected")
    ]
    if unexpected:
        raise ValueError(
            f"{_several(unexpected)} in the weights and not in the model, which has {_some(list(recipes.entries))}: "
            "were they saved by another architecture, or quantised?"
        )
    return found


def _modernised(recipes: Recipes, stored: list[str]) -> dict[str, str]:
    """{stored name: the name that transformers gives it when it loads it}, where the model is one of its.

    It is asked only where it is running, so nothing is imported. ValueError for what it does not merely rename.
    """
    mapping, loading = (
        sys.modules.get(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading")
    )
    known = recipes.entries.keys() | recipes.aliases.keys()
    if not hasattr(recipes.root, "base_model_prefix") or mapping is None or loading is None:
        return {name: name for name in stored}
    steps = mapping.get_model_conversion_mapping(recipes.root)
    renaming = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    others = [step for step in steps if not isinstance(step, loading.WeightRenaming)]
    found = {}
    for old in stored:
        found[old] = old if old in known else loading.apply_renamings(old, renaming)
        if found[old] not in known and loading.apply_converters(found[old], others)[1] is not None:
            raise ValueError(
                f"{old} is stored in a form that transformers converts as it loads, and slices cannot be: load the "
                "model with from_pretrained on one host, and save or give its state_dict()"
            )
    return found


def _prefixing(recipes: Recipes, stored: Iterable[str]) -> Callable[[str], str | None]:
    """From a stored name to the model's; None for what belongs to another model around this one."""
    prefix = getattr(recipes.root, "base_model_prefix", "")
    begin = f"{prefix}." if isinstance(prefix, str) and prefix else None
    if begin is None:
        return lambda name: name
    wanted = any(name.startswith(begin) for name in recipes.entries)
    there = any(name.startswith(begin) for name in stored)
    if wanted and not there:
        mine = recipes.entries.keys() | recipes.aliases.keys()
        return lambda name: name if name in mine else begin + name
    if there and not wanted:
        return lambda name: name.removeprefix(begin) if name.startswith(begin) else None
    return lambda name: name


def _waived(recipes: Recipes, name: str, attribute: str) -> bool:
    """Whether a Hugging Face model says that `name` may be missing, or superfluous."""
    return any(re.search(pattern, name) for pattern in getattr(recipes.root, attribute, None) or ())


def _several(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", .. ({len(names)} in all)" if len(names) > 3 else "") if names else "nothing"
