"""Cut a module into the units that call one another in order, and bundle them into pipeline stages.

    chain = ("embed", "blocks.*", "head")        embed -> blocks.0 -> blocks.1 -> ... -> head

A unit is given what the one before it returned: a tensor, or several as a tuple. `nn.Sequential` is a chain by
itself; any other module names its chain, as an attribute or as `parallelize(..., chain=...)`. With one stage there is
nothing to cut: the module runs its own forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hybridpar.microbatch import call
from hybridpar.pipeline.skip import Pop, boxes

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

    def forward(self, inputs: Any, skips: dict[str, Tensor], batch: Any = None) -> tuple[Any, dict[str, Tensor]]:
        """The output of the last unit, and the skips that later stages will want.

        `batch` is what entered the first stage, for stages that run the module's own forward.
        """
        waiting = dict(skips)
        wanted = {m.name: m.box for m in self.modules() if isinstance(m, Pop)}
        for name in [name for name in waiting if name in wanted]:
            wanted[name][name] = waiting.pop(name)
        value: Any = inputs
        for unit in self.units:
            value = call(unit, value)
        for box in self._boxes:
            waiting.update(box)
            box.clear()
        return value, waiting

    def named(self) -> Iterable[tuple[str, str, nn.Parameter]]:
        """(name in the unsplit module, name of the unit, parameter), shared ones each time they occur."""
        for unit, module in zip(self.names, self.units):
            for name, parameter in module.named_parameters(remove_duplicate=False):
                yield (f"{unit}.{name}" if unit else name), unit, parameter

    def kept(self) -> Iterable[tuple[str, Tensor]]:
        """(name in the unsplit module, buffer) of what a state dict has besides parameters."""
        for unit, module in zip(self.names, self.units):
            for name, x in module.state_dict(keep_vars=True).items():
                if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                    yield (f"{unit}.{name}" if unit else name), x


class Chain:
    """How a module that names its chain can be cut into `stages`; one stage is the module itself, chain or not.

    `labels` are the parts, `costs` an estimate for each. `opened` takes the units and returns them with those taken
    apart that can be cut inside (the layers of a recurrence).
    """

    def __init__(
        self,
        module: nn.Module,
        stages: int,
        chain: Sequence[str] | None = None,
        opened: Callable[[list[Unit]], list[Unit]] = list,
    ) -> None:
        self._chain, self._whole, self._opened = chain, stages == 1, opened
        self._units = self._cut(module)
        self.labels = [name for name, _ in self._units]
        self.costs = estimated_costs(self._units)

    @property
    def empty(self) -> bool:
        """Whether it is on the meta device, where there is no time to measure."""
        return any(p.is_meta for _, unit in self._units for p in unit.parameters())

    def measured(self, example: Any) -> list[float]:
        """Seconds of each part on `example` inputs."""
        return measured_costs(self._units, example)

    def stages(self, module: nn.Module, bounds: Sequence[int]) -> list[Stage]:
        """The stages of `module`, whose layers may have been cut meanwhile."""
        found = self._cut(module)
        return [Stage(s, found[a:b]) for s, (a, b) in enumerate(pairwise(bounds))]

    def _cut(self, module: nn.Module) -> list[Unit]:
        return [("", module)] if self._whole else self._opened(units(module, self._chain))


def units(module: nn.Module, chain: Sequence[str] | None = None) -> list[Unit]:
    """The units of `module` in the order in which they call one another.

    Raises ValueError where the module has no chain, or the chain names what is not there.
    """
    if isinstance(module, nn.Sequential) and chain is None:
        return _children(module)
    chain = chain if chain is not None else getattr(module, "chain", None)
    if chain is None:
        raise ValueError(
            f"{type(module).__name__} cannot be cut into pipeline stages: nobody says in which order its parts call "
            'one another; give chain=("embed", "blocks.*", "head"), use nn.Sequential, or set pipeline=1'
        )
    found: list[Unit] = []
    for pattern in chain:
        parent, star = (pattern[:-2], True) if pattern.endswith(".*") else (pattern, False)
        try:
            part = module.get_submodule(parent)
        except AttributeError:
            names = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"chain names {pattern!r}, and {type(module).__name__} has {names}") from None
        found += [(f"{parent}.{name}", child) for name, child in _children(part)] if star else [(parent, part)]
    inside = {id(p) for _, part in found for p in part.parameters()}
    outside = [name for name, p in module.named_parameters() if id(p) not in inside]
    if outside:
        raise ValueError(
            f"{outside[0]} (and {len(outside) - 1} more) is in no part of chain={tuple(chain)}: "
            "every parameter must be in a part that the chain calls"
        )
    return found


def _children(module: nn.Module) -> list[Unit]:
    """Each child as often as it is there: `named_children` names one that is called twice once."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


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
    """Seconds of a forward and a backward of each unit on `inputs`, the least of `repeats` tries.

    The units are left as they were: buffers and random numbers are put back, gradients dropped.
    """
    value: Any = inputs
    kept = [(x, x.clone()) for _, part in parts for x in part.buffers()]
    skips = boxes(nn.ModuleList(part for _, part in parts))
    seconds = []
    with torch.random.fork_rng(devices=[]):
        for _, part in parts:
            tries = []
            stashed = [{name: t.detach() for name, t in box.items()} for box in skips]
            for _ in range(repeats + 1):  # the first warms up
                for box, before in zip(skips, stashed):
                    box.clear()
                    box.update({name: _fresh(t) for name, t in before.items()})
                args = tuple(map(_fresh, value if isinstance(value, tuple) else (value,)))
                began = time.perf_counter()
                result = part(*args)
                _pull(result)
                tries.append(time.perf_counter() - began)
            seconds.append(min(tries[1:]))
            value = result
    for _, part in parts:
        part.zero_grad()
    with torch.no_grad():
        for x, before in kept:
            x.copy_(before)
    return seconds


def _fresh(value: Any) -> Any:
    """`value` without its past; a copy that asks for a gradient and may be changed in place."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point()).clone()
    return value


def _pull(result: Any) -> None:
    tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
    pulled = [t for t in tensors if t.requires_grad]
    if pulled:
        torch.autograd.backward(pulled, [torch.ones_like(t) for t in pulled])
