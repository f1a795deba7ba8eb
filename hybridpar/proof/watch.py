"""What modules give, and the gradients that come back to it, while a step runs.

A tensor is known by (module, which call of it in this microbatch, which of the tensors it returned, first sample of
the microbatch), so that a rank's can be held against the unsplit module's.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hybridpar.seeds import Draw
from hybridpar.shard import Range, balanced
from hybridpar.skeleton.freight import tensors
from hybridpar.wires.axis import Alone, Axis

Key = tuple[str, int, int, int]  # module, call, place in its output, first sample


@dataclass
class Seen:
    """One output: when it came, its value, which parts of a dim the module says it holds, and its gradient."""

    order: int
    kind: str
    value: Tensor
    parts: tuple[Range, ...]
    shared: bool  # another index holds some of the same: gradients are shares
    gradient: Tensor | None = None
    returned: int = -1  # when the gradient came


@dataclass(frozen=True)
class Mask:
    """A dropout mask of one sample: its bits' checksum, how many there are, and what part of the whole they are."""

    site: str
    sample: int
    crc: int
    length: int
    dim: int | None
    parts: tuple[Range, ...]


class Watch:
    """Hooks on the modules of one rank, or of the reference; `draw` says which samples are at hand."""

    def __init__(self, draw: Draw, axis: Axis | None = None) -> None:
        self._draw, self._axis = draw, axis or Alone("tensor")
        self._clock = count()
        self._calls: Counter[str] = Counter()
        self._turn: Any = None
        self._handles: list[RemovableHandle] = []
        self._makers: dict[int, str] = {}
        self._kept: list[Tensor] = []  # ids stay unique while these live
        self.seen: dict[Key, Seen] = {}
        self.readers: dict[str, list[str]] = {}  # module -> those that were given its output
        self.masks: list[Mask] = []
        self.bits: dict[tuple[str, int], Tensor] = {}  # whole masks by site and sample
        self.returned: dict[str, Tensor] = {}  # what has come back to each parameter, before anything is averaged
        keep: Callable[..., Tensor] = draw.keep
        draw.keep = functools.partial(self._masked, keep)

    def attach(
        self, modules: Iterable[tuple[str, nn.Module]], parameters: Iterable[tuple[str, nn.Parameter]] = ()
    ) -> None:
        """Watch these from now on."""
        for name, p in parameters:
            if p.requires_grad:
                self._handles.append(p.register_hook(functools.partial(self._come_back, name)))
        for name, module in modules:
            if name:
                self._handles.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
                self._handles.append(module.register_forward_hook(functools.partial(self._leave, name)))

    def remove(self) -> None:
        """Watch no more."""
        self._draw.__dict__.pop("keep", None)
        while self._handles:
            self._handles.pop().remove()
        self._kept.clear()
        self._makers.clear()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        for t in tensors(args):
            maker = self._makers.get(id(t))
            if maker is not None and name not in self.readers.setdefault(maker, []):
                self.readers[maker].append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._turn != self._draw.turn:
            self._turn = self._draw.turn
            self._calls.clear()
        call, samples = self._calls[name], self._draw.samples
        self._calls[name] += 1
        if samples is None or not len(samples):
            return
        parts, shared = _parts(module, self._axis)
        for place, t in enumerate(tensors(output)):
            key = (name, call, place, int(samples[0]))
            if not t.is_floating_point() or key in self.seen or t.numel() and bool(t.detach().isnan().all()):
                continue
            seen = Seen(next(self._clock), type(module).__name__, t.detach().clone(), parts, shared)
            self.seen[key] = seen
            self._kept.append(t)
            self._makers[id(t)] = name
            if t.requires_grad and torch.is_grad_enabled():
                t.register_hook(functools.partial(self._return, seen))

    def _return(self, seen: Seen, gradient: Tensor) -> None:
        seen.gradient, seen.returned = gradient.detach().clone(), next(self._clock)

    def _come_back(self, name: str, gradient: Tensor) -> None:
        before = self.returned.get(name)
        self.returned[name] = gradient.detach().clone() if before is None else before + gradient.detach()

    def _masked(
        self,
        keep: Callable[..., Tensor],
        site: str,
        shape: Any,
        p: float,
        dim: int | None = None,
        parts: Any = (),
        device: Any = None,
    ) -> Tensor:
        mask = keep(site, shape, p, dim, parts, device)
        for sample, row in zip(self._draw.samples.tolist(), mask.cpu()):
            held = tuple(parts) if dim is not None else ()
            self.masks.append(Mask(site, sample, checksum(row), row.numel(), dim, held))
            if dim is None or self._axis.size == 1:
                self.bits[site, sample] = row
        return mask


def checksum(x: Tensor) -> int:
    """A number that tells tensors apart by their bits."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0


def part(whole: Tensor, seen: Seen, axis: Axis) -> Tensor | None:
    """What of the reference's `whole` this index must have in `seen`; None where that is not known."""
    here, there = tuple(seen.value.shape), tuple(whole.shape)
    if here == there:
        return whole
    unequal = [d for d, (a, b) in enumerate(zip(here, there)) if a != b]
    if len(here) != len(there) or len(unequal) != 1:
        return None
    (dim,) = unequal
    ranges = seen.parts
    if sum(b - a for a, b in ranges) != here[dim] or any(b > there[dim] for _, b in ranges):
        ranges = (balanced(there[dim], axis.size)[axis.index],)
    if sum(b - a for a, b in ranges) != here[dim]:
        return None
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in ranges], dim)


def _parts(module: nn.Module, axis: Axis) -> tuple[tuple[Range, ...], bool]:
    """The ranges that a cut layer's output holds, and whether other indices hold some of them too."""
    parts = getattr(module, "parts", None)
    if isinstance(parts, tuple) and len(parts) == axis.size > 1:
        places = [i for part in parts for a, b in part for i in range(a, b)]
        return tuple(parts[axis.index]), len(places) != len(set(places))
    held = getattr(getattr(module, "cut", None), "parts", ())
    return tuple(held) if isinstance(held, tuple) else (), False
