"""One forward, watched: which units are called in which order, and whose results each call uses.

The forward runs on a copy of the module on the meta device, where nothing is computed and no memory is taken; or,
where the module's own Python looks at values (a data-dependent `if`), on the module itself and real inputs. What is
computed between units (`x = x + layer(x)`, masks, `torch.cat`) is followed operation by operation, so the answer is
exact for this forward, whatever that code looks like. Nothing is traced into a graph: stages run the user's own code.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hybridpar.microbatch import call, mapped
from hybridpar.skeleton.anatomy import Anatomy
from hybridpar.skeleton.freight import tensors

Result = tuple[str, int]  # the unit that was called, and the how manieth of its calls it was


@dataclass(frozen=True)
class Call:
    """A call of a unit: `uses` are earlier results that its inputs were computed from, `weights` the units whose
    parameters were used directly on the way (a head that multiplies by the embedding's weight, for one). `work` are
    its floating-point operations (torch.utils.flop_counter)."""

    result: Result
    uses: frozenset[Result]
    weights: frozenset[str]
    work: float = 0.0


@dataclass(frozen=True)
class Observation:
    """The calls in order; the last one, of the unit "", stands for the module's output."""

    calls: tuple[Call, ...]
    shadow: nn.Module  # the copy on the meta device


def observe(module: nn.Module, anatomy: Anatomy, example: Any) -> Observation:
    """Watch a forward of `module` on `example`: a tensor, a tuple, or a dict of keyword arguments.

    Raises ValueError with the module's own error where neither the meta device nor real inputs will do.
    """
    shadow = on_meta(module)
    try:
        return Observation(_watch(shadow, anatomy, mapped(example, lambda t: t.to("meta"))), shadow)
    except _HandedOn:
        raise
    except Exception as meta_error:  # anything that the user's forward may raise
        if any(p.is_meta for p in module.parameters()):
            raise _cannot(module, meta_error) from meta_error
    try:
        return Observation(_watch(module, anatomy, example), shadow)
    except _HandedOn:
        raise
    except Exception as error:
        raise _cannot(module, error) from error


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device; nothing else is copied."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for x in module.buffers():
        memo[id(x)] = x.to("meta")
    return copy.deepcopy(module, memo)


def _watch(module: nn.Module, anatomy: Anatomy, example: Any) -> tuple[Call, ...]:
    watch = _Watch(anatomy, module)
    modes = [(m, m.training) for m in module.modules()]
    module.eval()  # layers that are dropped at random are called
    try:
        quiet, drawn = warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[])
        with quiet, drawn, torch.no_grad(), watch.work, watch:
            output = call(module, example)
    finally:
        watch.leave()
        for m, mode in modes:
            m.training = mode
    watch.check(tensors(output))
    return (*watch.calls, Call(("", 0), *watch.origin(tensors(output))))


class _Nobody(nullcontext[None]):
    """In the place of a counter's ModuleTracker: all work is that of the whole."""

    parents = ("Global",)

    def __exit__(self, *_: Any) -> None:
        pass


class _HandedOn(ValueError):
    """A unit gives something besides its result."""


class _Watch(TorchFunctionMode):
    """Follows where tensors come from, outside of the units."""

    def __init__(self, anatomy: Anatomy, module: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._uses: dict[int, frozenset[Result]] = {}
        self._weights: dict[int, frozenset[str]] = {}
        self._kept: list[Tensor] = []  # alive, so that no id is used again
        self._made: dict[int, Result] = {}  # what is made inside of a unit, until it is its result
        self._inside, self._counts = 0, Counter[str]()
        self.work, self._before = FlopCounterMode(display=False), 0
        self.work.mod_tracker = _Nobody()  # torch's refuses modules that are called on a parameter
        self._hooks = []
        for name in anatomy.units:
            unit = module.get_submodule(name)
            self._weights |= {id(p): frozenset({name}) for p in unit.parameters()}
            self._hooks += [
                unit.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                unit.register_forward_hook(self._leaving(name), with_kwargs=True, always_call=True),
            ]

    def origin(self, inputs: Iterable[Tensor]) -> tuple[frozenset[Result], frozenset[str]]:
        ids = [id(t) for t in inputs]
        none: frozenset[Any] = frozenset()
        uses = none.union(*(self._uses.get(i, none) for i in ids))
        return uses, none.union(*(self._weights.get(i, none) for i in ids))

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [*tensors(args), *tensors(kwargs or {})]
        if tensors(output):
            self.check(inputs)
        if self._inside:
            # x.to(..), which may give x itself, makes nothing; x.add_(..) does.
            given = () if _in_place(func) else {id(t) for t in inputs}
            new = [t for t in tensors(output) if id(t) not in self._uses and id(t) not in given]
            self._made |= {id(t): self.calls[-1].result for t in new}
            self._kept += tensors(output)
        else:
            uses, weights = self.origin(inputs)
            if uses or weights:
                changed = tensors(output)
                if _in_place(func):
                    changed += [t for t in args[:1] if isinstance(t, Tensor)]
                for t in changed:
                    self._mark(t, uses, weights)
        return output

    def check(self, inputs: Iterable[Tensor]) -> None:
        """Raise where one of `inputs` was made inside of another unit than the one that is running, if one is."""
        here = self.calls[-1].result if self._inside else None
        for t in inputs:
            there = self._made.get(id(t), here)
            if there != here:
                raise _HandedOn(
                    f"{there[0]} hands a tensor of shape {list(t.shape)} on by something else than its result (an "
                    "attribute, a list or a dict that others read), which a pipeline stage would not see: return it, "
                    "or use pipeline=1"
                )

    def _mark(self, t: Tensor, uses: frozenset[Result], weights: frozenset[str]) -> None:
        self._kept.append(t)
        self._uses[id(t)], self._weights[id(t)] = uses, weights

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._inside:
                result = (name, self._counts[name])
                self.check([*tensors(args), *tensors(kwargs)])
                self.calls.append(Call(result, *self.origin([*tensors(args), *tensors(kwargs)])))
                self._before = self.work.get_total_flops()
            self._inside += 1

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            if not self._inside:
                result = (name, self._counts[name])
                self._counts[name] += 1
                work = float(self.work.get_total_flops() - self._before)
                self.calls[-1] = replace(self.calls[-1], work=work)
                for t in tensors(output):
                    self._made.pop(id(t), None)
                    self._mark(t, frozenset({result}), frozenset())

        return leave


def _in_place(func: Any) -> bool:
    """x[i] = y, x.add_(y)"""
    name = getattr(func, "__name__", "")
    return func is Tensor.__setitem__ or name.rstrip("_") != name


def _cannot(module: nn.Module, error: Exception) -> ValueError:
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"{type(module).__name__} could not be watched while it ran on the example inputs ({told}); "
        "give inputs of one small batch as parallelize(..., example=inputs), or name a chain="
    )
