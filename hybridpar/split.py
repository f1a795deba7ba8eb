"""Cut a module into the units that call one another in order, and bundle them into pipeline stages.

    chain = ("embed", "blocks.*", "head")        embed -> blocks.0 -> blocks.1 -> ... -> head

A unit is given what the one before it returned: a tensor, or several as a tuple. `nn.Sequential` is a chain by
itself; any other module names its chain, as an attribute or as `parallelize(..., chain=...)`. With one stage there is
nothing to cut: the module runs its own forward.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridpar.pipeline.skip import boxes

Unit = tuple[str, nn.Module]


class Stage(nn.Module):
    """A consecutive part of the model: its units, called in order.

    `number` counts stages over the whole pipeline.
    """

    def __init__(self, number: int, units: Sequence[Unit]) -> None:
        super().__init__()
        self.number, self.names = number, tuple(name for name, _ in units)
        self.units = nn.ModuleList(module for _, module in units)
        self._boxes = boxes(self)
        # What arrives is a leaf of the graph, and a leaf must not be changed in place.
        self.copies_inputs = any(getattr(m, "inplace", False) for m in self.modules())

    def forward(self, inputs: tuple[Any, ...], skips: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The output of the last unit, and the skips that later stages will want."""
        waiting = dict(skips)
        wanted = {m.name: m.box for m in self.modules() if hasattr(m, "join") and hasattr(m, "box")}
        for name in [name for name in waiting if name in wanted]:
            wanted[name][name] = waiting.pop(name)
        value: Any = inputs
        for unit in self.units:
            value = unit(*value) if isinstance(value, tuple) else unit(value)
        for box in self._boxes:
            waiting.update(box)
            box.clear()
        return value, waiting

    def named(self) -> Iterable[tuple[str, str, nn.Parameter]]:
        """(name in the unsplit module, name of the unit, parameter), shared ones each time they occur."""
        for unit, module in zip(self.names, self.units):
            for name, parameter in module.named_parameters(remove_duplicate=False):
                yield (f"{unit}.{name}" if unit else name), unit, parameter


def units(module: nn.Module, chain: Sequence[str] | None = None) -> list[Unit]:
    """The units of `module` in the order in which they call one another.

    Raises ValueError where the module has no chain, or the chain names what is not there.
    """
    if isinstance(module, nn.Sequential) and chain is None:
        return list(module.named_children())
    chain = chain if chain is not None else getattr(module, "chain", None)
    if chain is None:
        raise ValueError(
            f"{type(module).__name__} cannot be cut into pipeline stages: nobody says in which order its parts call one "
            'another; give chain=("embed", "blocks.*", "head"), use nn.Sequential, or set pipeline=1'
        )
    found: list[Unit] = []
    for pattern in chain:
        parent, star = (pattern[:-2], True) if pattern.endswith(".*") else (pattern, False)
        try:
            part = module.get_submodule(parent)
        except AttributeError:
            names = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"chain names {pattern!r}, and {type(module).__name__} has {names}") from None
        found += [(f"{parent}.{name}", child) for name, child in part.named_children()] if star else [(parent, part)]
    inside = {id(p) for _, part in found for p in part.parameters()}
    outside = [name for name, p in module.named_parameters() if id(p) not in inside]
    if outside:
        raise ValueError(
            f"{outside[0]} (and {len(outside) - 1} more) is in no part of chain={tuple(chain)}: "
            "every parameter must be in a part that the chain calls"
        )
    return found


def estimated_costs(parts: Sequence[Unit]) -> list[float]:
    """The relative cost of each unit: the multiplications of its weight matrices per sample.

    A lookup multiplies nothing, a convolution's kernel is used at many places that only `measured_costs` knows of.
    """
    return [float(sum(_products(m) for m in part.modules()) or 1) for _, part in parts]


def _products(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)


def measured_costs(parts: Sequence[Unit], inputs: Any, repeats: int = 3) -> list[float]:
    """Seconds of a forward and a backward of each unit on `inputs`, the least of `repeats` tries."""
    value: Any = inputs if isinstance(inputs, tuple) else (inputs,)
    seconds = []
    for _, part in parts:
        tries = []
        for _ in range(repeats + 1):  # the first warms up
            args = tuple(_leaf(v) for v in (value if isinstance(value, tuple) else (value,)))
            began = time.perf_counter()
            result = part(*args)
            _pull(result)
            tries.append(time.perf_counter() - began)
        seconds.append(min(tries[1:]))
        value = result
    for _, part in parts:
        part.zero_grad()
    return seconds


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    return value


def _pull(result: Any) -> None:
    tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
    pulled = [t for t in tensors if t.requires_grad]
    if pulled:
        torch.autograd.backward(pulled, [torch.ones_like(t) for t in pulled])
