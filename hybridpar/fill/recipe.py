"""What a module was before it was cut: its skeleton on the meta device, and each tensor's name and home in it.

    module (meta or real)  --record-->  skeleton: the same modules and hyperparameters, every tensor on the meta device
                                        entries:  name -> leaf, shape, dtype, ...

The skeleton takes no memory worth speaking of. A "leaf" here is a module that holds tensors of its own, be it at the
bottom of the tree or not; `seed` makes one of them real at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Leaf:
    """A module with tensors of its own. `path` leads from it up to the root: (name, module), itself first."""

    name: str
    path: tuple[tuple[str, nn.Module], ...]

    @property
    def module(self) -> nn.Module:
        return self.path[0][1]


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of the unsplit module, under the first of its names.

    `meta` says that it had no values when it was recorded, `persistent` that a state dict has it, and `writes` how
    often it had been written in place until then.
    """

    leaf: Leaf
    local: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    persistent: bool
    meta: bool
    writes: int


@dataclass(frozen=True)
class Recipes:
    """All entries by name, the other names of shared tensors ({other: first}), and the skeleton.

    Example:
        >>> recipes = record(nn.Sequential(nn.Linear(4, 2, device="meta"), nn.ReLU()))
        >>> recipes.entries["0.weight"].shape, recipes.empty
        ((2, 4), ('0.weight', '0.bias'))
    """

    root: nn.Module
    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]

    def first(self, name: str) -> str:
        """The name in `entries` of the tensor that goes by `name`."""
        return self.aliases.get(name, name)

    @property
    def empty(self) -> tuple[str, ...]:
        """The names of what was on the meta device."""
        return tuple(name for name, entry in self.entries.items() if entry.meta)

    def also(self, name: str) -> tuple[str, ...]:
        """All names of the entry `name`, the first one first."""
        return (name, *(other for other, first in self.aliases.items() if first == name))


def record(module: nn.Module) -> Recipes:
    """Remember how to build each leaf of `module` again; called before anything is cut.

    Raises ValueError for lazy modules, whose shapes nobody knows yet, and under torch.device("meta").
    """
    if torch.get_default_device().type == "meta":
        raise ValueError(
            'hp.parallelize is called under torch.device("meta"), where new tensors have no values: call it after the '
            "`with` in which the module is built"
        )
    copies: dict[int, nn.Module | Tensor] = {}
    root = _copied(module, copies)
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    leaves: dict[int, Leaf] = {}
    for above, local, tensor in _tensors(module):
        name = f"{above}.{local}" if above else local
        if seen.setdefault(id(tensor), name) != name:
            aliases[name] = seen[id(tensor)]
            continue
        if is_lazy(tensor):
            raise ValueError(
                f"{name} is lazy: its shape is not known before the first batch; give the module its sizes"
            )
        holder = module.get_submodule(above)
        entries[name] = Entry(
            leaf=leaves.setdefault(id(holder), Leaf(above, tuple(_path(root, above)))),
            local=local,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            parameter=isinstance(tensor, nn.Parameter),
            persistent=local not in holder._non_persistent_buffers_set,
            meta=tensor.is_meta,
            writes=tensor._version,
        )
    return Recipes(root, entries, aliases)


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(module, local name, tensor): parameters first, in the order in which torch and the tensor plan name them."""
    for members in (lambda m: m._parameters, lambda m: m._buffers):  # type: Callable[[nn.Module], Mapping]
        for above, child in module.named_modules(remove_duplicate=False):
            yield from ((above, local, tensor) for local, tensor in members(child).items() if tensor is not None)


def _path(root: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) from `name` up to the root."""
    while name:
        yield name, root.get_submodule(name)
        name = name.rpartition(".")[0]
    yield "", root


def _copied(module: nn.Module, copies: dict[int, nn.Module | Tensor]) -> nn.Module:
    """The skeleton of `module`: its own attributes, new tensors on the meta device, skeletons of its children.

    Not a deep copy: that fails on whatever cannot be copied (communicators, locks), and nothing here calls `forward`.
    """
    if id(module) in copies:
        return copies[id(module)]
    copy = copies[id(module)] = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = {name: None if x is None else _emptied(x, copies) for name, x in module.__dict__[kind].items()}
        copy.__dict__[kind] = own
    copy.__dict__["_modules"] = {
        name: None if child is None else _copied(child, copies) for name, child in module._modules.items()
    }
    return copy


def _emptied(x: Tensor, copies: dict[int, nn.Module | Tensor]) -> Tensor:
    if id(x) not in copies:
        bare = x if is_lazy(x) else torch.empty_like(x, device="meta")
        copies[id(x)] = nn.Parameter(bare, x.requires_grad) if isinstance(x, nn.Parameter) and not is_lazy(x) else bare
    return copies[id(x)]
