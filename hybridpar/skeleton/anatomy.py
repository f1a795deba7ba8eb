"""What a module is made of, for the split of its own forward: blocks, other units, and the bones that hold them.

    Llama                      bone
      model                    bone
        embed_tokens           unit
        layers                 bone
          0, 1, 2, ...         units, and blocks
        norm, rotary_emb       units
      lm_head                  unit

A block is an item of an nn.ModuleList or nn.Sequential (of lists in lists, what is called: nobody calls a list); a bone
contains blocks; a unit is what hangs on a bone and contains none. Units are handed over whole: stages begin and end
between their calls.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Anatomy:
    """`units` by name, blocks among them, each object once, under its first name; `aliases` are its other names."""

    units: dict[str, nn.Module]
    blocks: frozenset[str]
    bones: frozenset[str]
    aliases: dict[str, str]


def dissect(module: nn.Module, blocks: int = 2, least: int = 2, closed: Set[str] = frozenset()) -> Anatomy:
    """Take the outermost lists of modules with parameters as lists of blocks; go deeper where these are fewer than
    `blocks`. A list of one counts where there is no longer one: it may be called again and again (ALBERT). What is in
    the modules named in `closed` is never taken apart. Raises ValueError where there is no list.

    Example:
        >>> body = nn.ModuleDict({"up": nn.Linear(4, 8), "layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
        >>> sorted(dissect(body).blocks)
        ['layers.0', 'layers.1', 'layers.2']
    """
    opened: set[str] = set()  # blocks that have become bones

    def inside(item: str) -> dict[str, nn.Module]:
        return _lists(module.get_submodule(item), set(), least, closed, item)

    while True:
        lists = _lists(module, opened, least, closed)
        items = [f"{name}.{child}".lstrip(".") for name, found in lists.items() for child in found._modules]
        deeper = {item for item in items if item not in opened and inside(item)}
        if len([item for item in items if item not in opened]) >= blocks or not deeper:
            break
        opened |= deeper
    if not lists and least > 1:
        return dissect(module, blocks, 1, closed)
    if not lists:
        pieces = ", ".join(name or "the model itself" for name in sorted(closed))
        outside = f" outside of {pieces}, which the tensor plan has run as one piece (name smaller ones)" * bool(closed)
        raise ValueError(
            f"{type(module).__name__} cannot be cut into pipeline stages: it has no nn.ModuleList or nn.Sequential of "
            f'blocks{outside}; say in which order its parts call one another with chain=("embed", "blocks.*", "head"), '
            "or set pipeline=1"
        )
    blocks_found = frozenset(one for item in items if item not in opened for one in _called(module, item))
    bones = {""}
    for name in [*lists, *opened]:
        while name:
            bones.add(name)
            name = name.rpartition(".")[0]
    for name, found in module.named_modules():
        # Nobody calls an nn.ModuleList or nn.ModuleDict: it is a bone wherever it hangs on one.
        if isinstance(found, nn.ModuleList | nn.ModuleDict) and name.rpartition(".")[0] in bones:
            bones.add(name)
    units: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for bone in sorted(bones):
        for child, unit in module.get_submodule(bone)._modules.items():
            name = f"{bone}.{child}".lstrip(".")
            if unit is None or name in bones:
                continue
            if first.setdefault(id(unit), name) == name:
                units[name] = unit
            else:
                aliases[name] = first[id(unit)]
    return Anatomy(units, blocks_found & frozenset(units), frozenset(bones), aliases)


def _lists(
    module: nn.Module, opened: set[str], least: int, closed: Set[str], name: str = ""
) -> dict[str, nn.Module]:
    """The outermost lists in `module`, itself included; and those in the items that are `opened`."""
    if name in closed:
        return {}
    if not _is_list(module, least):
        items = module._modules
    else:
        items = {leaf: item for leaf, item in module._modules.items() if f"{name}.{leaf}".lstrip(".") in opened}
    found = {name: module} if _is_list(module, least) else {}
    for leaf, child in items.items():
        if child is not None:
            found |= _lists(child, opened, least, closed, f"{name}.{leaf}".lstrip("."))
    return found


def _called(module: nn.Module, name: str) -> list[str]:
    """`name`; or what it holds, where it is a container that nobody calls: `for attention, feed in self.layers: ..`."""
    found = module.get_submodule(name)
    if not isinstance(found, nn.ModuleList | nn.ModuleDict):
        return [name]
    return [one for leaf in found._modules for one in _called(module, f"{name}.{leaf}")]


def _is_list(module: nn.Module, least: int) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < least:
        return False
    return any(True for _ in module.parameters())
