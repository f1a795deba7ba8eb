"""The units of ZeRO 3: modules whose parameters are gathered together, just before they run, and dropped after.

    GPT                embed.token | embed.position | blocks.0 | blocks.1 | ... | head.norm | head.project
    nn.Sequential      each layer that has parameters

A block (a child of a ModuleList or Sequential that has parts of its own) is a unit, and so is whatever else holds
parameters itself. Units lie beside one another, never within: what a module around units holds itself stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hybridpar.tensor.recompute import blocks

_LISTS = (nn.ModuleList, nn.Sequential)


def units(stage: nn.Module) -> list[nn.Module]:
    """The units of `stage`, in order of registration.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        >>> units(layers)
        [Linear(in_features=2, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True), \
Linear(in_features=2, out_features=2, bias=True)]
    """
    chained = getattr(stage, "units", None)
    if chained is not None and len(chained) > 1:  # the parts of a chain are blocks, unless they have blocks
        found = [unit for part in chained for unit in _units(part, listed=not blocks(part))]
    else:
        found = list(_units(stage, listed=False))
    return list(dict.fromkeys(found))


def outside(stage: nn.Module, chosen: list[nn.Module]) -> set[nn.Parameter]:
    """The parameters that modules of `stage` hold which are not within the `chosen`."""
    within = {module for unit in chosen for module in unit.modules()}
    return {p for module in stage.modules() if module not in within for p in module.parameters(recurse=False)}


def _units(module: nn.Module, listed: bool) -> Iterator[nn.Module]:
    parts = list(module.children())
    own = any(True for _ in module.parameters(recurse=False))
    if (listed and parts) or (own and not blocks(module)):
        if any(True for _ in module.parameters()):
            yield module
        return
    many = isinstance(module, _LISTS) and len(parts) > 1
    for part in parts:
        yield from _units(part, listed=many and not isinstance(part, _LISTS))
