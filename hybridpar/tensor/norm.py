"""Norms under sequence parallelism: plain modules whose gradients are shares.

A norm over the features works on each token alone, so a piece of the tokens needs no communication. Its weights are
whole on every index and have seen only that index's tokens: their gradients are partial.
"""

from __future__ import annotations

from torch import nn

from hybridpar.shard import Spec

# By name: torch keeps the classes that batch and instance norms have in common private.
_MIXING = ("BatchNorm", "InstanceNorm", "GroupNorm")


def check(module: nn.Module, sequence: bool, name: str) -> None:
    """ValueError for norms that mix tokens where sequence parallelism cuts them."""
    mixing = [type(child).__name__ for child in module.modules() if any(n in type(child).__name__ for n in _MIXING)]
    if sequence and mixing:
        raise ValueError(f"{name}: {mixing[0]} mixes tokens, which sequence parallelism cuts; leave sequence out")


def spec(name: str, parameter: nn.Parameter, style: str | None, sequence: bool) -> Spec:
    """The spec of a parameter that every index holds as a whole, in a module of this style.

    Its gradient is partial where the module sees a part only: "partial" and "space" say so always, "norm" under
    `sequence`.

    Example:
        >>> spec("norm.weight", nn.LayerNorm(4).weight, "norm", sequence=True).partial
        True
    """
    partial = style in ("partial", "space") or (style == "norm" and sequence)
    return Spec(name, tuple(parameter.shape), partial=partial)
