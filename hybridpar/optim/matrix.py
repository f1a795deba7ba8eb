"""Refuses optimizers of whole matrices, such as Muon, for weights of which each tensor rank has a part.

Muon makes the update of a matrix orthogonal, Adafactor keeps means of rows and columns, Shampoo inverts roots: of a
part each gives something else than the part of what it gives for the whole. Whether an optimizer is of that kind is
tried, not looked up (`zero.inside.alike`).
"""

from __future__ import annotations

import torch

from hybridpar.optim.model import Parallel
from hybridpar.optim.zero.inside import alike


def check_cut(optimizer: torch.optim.Optimizer, model: Parallel) -> None:
    """Raise ValueError where a group of `optimizer` has cut weights and does not step each element by itself.

    Example:
        >>> check_cut(torch.optim.Muon(matrices, lr=1e-2), model)      # doctest: +SKIP
    """
    cut = {p: name for chunk in model.chunks() for name, p in chunk if _is_cut(model, name, p)}
    for number, group in enumerate(optimizer.param_groups):
        found = [p for p in group["params"] if p in cut]
        if not found:
            continue
        why = ""
        try:
            right = alike(optimizer, group, found[0])
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
            right, why = False, f" ({error})"
        if not right:
            raise ValueError(
                f"{type(optimizer).__name__} does not step each element by itself, and {cut[found[0]]} (and "
                f"{len(found) - 1} more of group {number}) is cut over tensor={model.world.tensor.size}: give cut "
                f"weights to an optimizer that does (SGD, Adam, AdamW, ...), or use tensor=1{why}"
            )


def _is_cut(model: Parallel, name: str, p: torch.Tensor) -> bool:
    spec = model.specs().get(name)
    return spec is not None and p.is_floating_point() and tuple(p.shape) != tuple(spec.shape)
