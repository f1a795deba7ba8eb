"""A pipeline stage that runs the user's own forward, with only its own units in place.

    stage 1 of 3      embed    0    1    2    3    4    5   norm   head
                      [  gates: poison  ] [  own  ] [ leave ]
                                       ^ the result of 1, received

Each unit is called through a gate. A unit of an earlier stage gives what has been received from it or, where nothing
later uses its result, a tensor of the right shape full of NaN, which cannot be mistaken for one. The call of a unit of
a later stage ends the forward: what has been made so far and is used later goes to the next stage.
"""

from __future__ import annotations

import inspect
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hybridpar.microbatch import call, mapped
from hybridpar.skeleton.anatomy import Anatomy
from hybridpar.skeleton.freight import pack, tensors, unpack
from hybridpar.skeleton.observe import Result
from hybridpar.skeleton.reads import Reads, check_asked

_CHECKED_RUNS = 2


class _Leave(BaseException):  # not an Exception, which the user's forward may catch
    """Out of the user's forward: what follows belongs to a later stage."""


@dataclass
class _Passage:
    """One forward of a stage."""

    received: Mapping[Result, Any]
    made: dict[Result, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    graded: bool = field(default_factory=torch.is_grad_enabled)
    last: Result | None = None  # the result made last
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # of its tensors, if it moves on


class SkeletonStage(nn.Module):
    """Stage `number`: `homes` says for each unit at which stage each of its calls is made, `entering` and `leaving`
    which results travel over the cuts before and after this stage (None where it is the last)."""

    def __init__(
        self,
        number: int,
        names: Sequence[str],
        module: nn.Module,
        shadow: nn.Module,
        anatomy: Anatomy,
        homes: Mapping[str, tuple[int, ...]],
        weights: frozenset[str],
        leaving: Sequence[Result] | None,
    ) -> None:
        super().__init__()
        self.number, self.names = number, tuple(names)
        self._homes, self._leaving, self._moving = homes, leaving, frozenset(leaving or ())
        self._reads = Reads(number, names)
        self._passage: _Passage | None = None
        self._entered: frozenset[Result] = frozenset()
        self._unchecked = _CHECKED_RUNS
        self.body = self._grown("", module, shadow, anatomy, weights, {})

    def forward(self, inputs: Any, skips: Mapping[str, Tensor], batch: Any) -> tuple[Any, dict[str, Tensor]]:
        """What the next stage needs, as (structure, tensor, ...); of the last stage the module's output."""
        if self._unchecked:
            check_asked(self.body, batch)
        received = unpack(inputs[0], inputs[1:]) if self.number else {}
        self._passage, self._entered = _Passage(received), frozenset(received)
        passage = self._passage
        try:
            with self._reads if self._unchecked and self.number else nullcontext():
                output = call(self.body, batch)
        except _Leave as leave:
            output = None
            traceback.clear_frames(leave.__traceback__)  # ends what the forward had begun: contexts of a checkpoint
        finally:
            self._passage = None
        if self._leaving is None:
            self._check(tensors(output))
            return output, {}
        if passage.last in self._moving and any(t._version != before for t, before in passage.versions):
            raise ValueError(
                f"what {passage.last[0]} gives is changed in place before the next block is called, on stage "
                f"{self.number} and once more on the next: write x = x + y there in place of x += y"
            )
        structure, moving = pack({result: self._found(passage, result) for result in self._leaving})
        self._check(moving)
        return (structure, *moving), {}

    def named(self) -> Iterable[tuple[str, str, nn.Parameter]]:
        """(name in the unsplit module, name of the unit, parameter), shared ones each time they occur."""
        for name, parameter in self.body.named_parameters(remove_duplicate=False):
            yield name, name.rpartition(".")[0], parameter

    def kept(self) -> Iterable[tuple[str, Tensor]]:
        """(name in the unsplit module, buffer) of what a state dict has besides parameters."""
        for name, x in self.body.state_dict(keep_vars=True).items():
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                yield name, x

    def answer(self, name: str, own: Callable[..., Any] | None, poison: _Poison, args: Any, kwargs: Any) -> Any:
        """What a call of the unit `name` gives on this stage; `own` is the unit itself where it has calls here."""
        homes, passage = self._homes.get(name, (self.number,)), self._passage
        count = 0
        if len(homes) > 1 and passage is not None:
            count = min(passage.counts[name], len(homes) - 1)
            passage.counts[name] += 1
        home = homes[count]
        if home > self.number:
            raise _Leave
        if passage is None and (len(homes) > 1 or (name, count) in self._entered):
            raise ValueError(
                f"{name} is recomputed by a checkpoint on stage {self.number} and (also) computed on stage "
                f"{homes[0]}: use stages= to cut where no checkpoint is cut in two, or checkpoint inside it"
            )
        if home < self.number and (passage is None or (name, count) not in passage.received):
            return self._reads.taint(self._reads.aside(poison, (args, kwargs), {}))
        if home < self.number:
            value = passage.received[name, count]
            if passage.graded and not torch.is_grad_enabled() and any(t.requires_grad for t in tensors(value)):
                raise ValueError(
                    f"{name} is called without gradients on stage {self.number}, which would lose those of the stages "
                    "before; checkpoint with use_reentrant=False"
                )
            return value
        if own is None:
            raise ValueError(
                f"{name} is called on stage {self.number} and was not called at all for the example inputs; give "
                "example= inputs like those of training"
            )
        output = self._reads.aside(own, args, kwargs)
        if passage is None:  # a checkpoint computes it again, in the backward pass
            return output
        passage.made[name, count], passage.last = output, (name, count)
        if (name, count) not in self._moving:
            return output
        # The user's code goes on with another view: a hook that it puts there is put there on the next stage too.
        structure, made = pack(output)
        passage.versions = [(t, t._version) for t in made]
        return unpack(structure, [t.view_as(t) for t in made])

    def _found(self, passage: _Passage, result: Result) -> Any:
        if result in passage.made:
            return passage.made[result]
        if result in passage.received:
            return passage.received[result]
        raise ValueError(
            f"stage {self.number} ({self.names[0]} to {self.names[-1]}) did not call {result[0]}, which the example "
            "inputs did: what a forward does may depend on its inputs, but not, between blocks of several stages, on "
            "values computed from them; choose stages= so that one stage has all of it, or compare inside a block"
        )

    def _check(self, made: Sequence[Tensor]) -> None:
        """Raise where poison has come through, in the first runs."""
        if not self._unchecked:
            return
        self._unchecked -= 1
        if any(t.is_floating_point() and bool(t.detach().isnan().any()) for t in made):
            raise ValueError(
                f"stage {self.number} ({self.names[0]} to {self.names[-1]}) gives NaN: either the model does, which "
                "pipeline=1 will show, or its forward took another way than for the example inputs and used what only "
                "an earlier stage has; then give example= inputs like those of training"
            )

    def _grown(
        self,
        name: str,
        bone: nn.Module,
        shadow: nn.Module,
        anatomy: Anatomy,
        weights: frozenset[str],
        units: dict[str, nn.Module],
    ) -> nn.Module:
        """A copy of `bone` whose units are behind gates. Parameters are the same objects."""
        grown = _twin(bone)
        for leaf, child in bone._modules.items():
            path = f"{name}.{leaf}".lstrip(".")
            below = shadow._modules[leaf]
            if child is None:
                grown._modules[leaf] = None
            elif path in anatomy.bones:
                grown._modules[leaf] = self._grown(path, child, below, anatomy, weights, units)
            else:
                unit = anatomy.aliases.get(path, path)
                if unit not in units:
                    units[unit] = self._unit(unit, child, below, unit in weights)
                grown._modules[leaf] = units[unit]
        return grown

    def _unit(self, name: str, unit: nn.Module, shadow: nn.Module, weighs: bool) -> nn.Module:
        if self.number not in self._homes.get(name, (0,)) and not weighs:
            return _StandIn(name, self, shadow, unit)
        own, poison = _clone(unit), _Poison(shadow)
        compiled = own._compiled_call_impl is not None
        call_own = own._compiled_call_impl if compiled else own._call_impl
        # Around the whole call, hooks included: what a hook makes of a result is the result. Not a module around it:
        # names of parameters stay those of the unsplit module.
        own._compiled_call_impl = lambda *args, **kwargs: self.answer(name, call_own, poison, args, kwargs)
        own._compiled_call_impl.compiled = compiled  # or else it is a gate only
        return own


class _StandIn(nn.Module):
    """In the place of a unit that is never called on this stage; it has no parameters."""

    def __init__(self, name: str, stage: SkeletonStage, shadow: nn.Module, unit: nn.Module) -> None:
        super().__init__()
        self._poison = _Poison(shadow)
        # In a tuple, so that nothing becomes a submodule. The user's forward may ask a unit for its attributes.
        self._asked = (name, stage, shadow)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, stage, _ = self._asked
        return stage.answer(name, None, self._poison, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["_asked"][2], name)
            return _nan(value) if isinstance(value, Tensor) else value


class _Poison:
    """Results of a unit that nobody may use: the right structure and shapes, and NaN in them."""

    def __init__(self, shadow: nn.Module) -> None:
        self._shadow = (shadow,)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        (shadow,) = self._shadow
        device = next((t.device for t in tensors((args, kwargs)) if not t.is_meta), torch.device("cpu"))
        try:
            with torch.no_grad():
                output = shadow(*map(_meta, args), **{name: _meta(value) for name, value in kwargs.items()})
        except Exception:  # it looks at values: what comes in tells the shape of what goes out, as for most blocks
            return _nan(next(iter(tensors((args, kwargs)))))
        structure, shapes = pack(output)
        return unpack(structure, [_nan(t, device) if t.is_meta else t for t in shapes])


def _meta(value: Any) -> Any:
    """`value` without its numbers; a PackedSequence keeps those that tell how long its sequences are."""
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.to("meta"))
    return mapped(value, lambda t: t.to("meta"))


def _nan(like: Tensor, device: torch.device | None = None) -> Tensor:
    """NaN, or for whole numbers zeros, of the shape and dtype of `like`."""
    fill = torch.nan if like.is_floating_point() or like.is_complex() else 0
    device = like.device if device is None else device
    return torch.full(like.shape, fill, dtype=like.dtype, device="cpu" if device.type == "meta" else device)


def _clone(unit: nn.Module, done: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy of `unit` with the same parameters, buffers and axes: another stage has a copy of its own."""
    done = {} if done is None else done
    if id(unit) not in done:
        done[id(unit)] = clone = _twin(unit)
        clone._modules = {n: None if child is None else _clone(child, done) for n, child in unit._modules.items()}
    return done[id(unit)]


def _twin(module: nn.Module) -> nn.Module:
    """Another object with the same attributes, parameters and buffers, and no children yet."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))  # copy.copy refuses parametrized modules
    twin._parameters, twin._buffers, twin._modules = dict(module._parameters), dict(module._buffers), {}
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # as a forward put in the place of the class's
            vars(twin)[name] = MethodType(value.__func__, twin)
    if module._compiled_call_impl is not None:
        twin._compiled_call_impl = _compiler(module)(twin._call_impl)
    return twin


def _compiler(module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What `module.compile(...)` has compiled the module with; torch keeps it in a closure only."""
    kept = inspect.getclosurevars(module._compiled_call_impl).nonlocals.get("self")
    if kept is None:
        raise ValueError(f"this torch does not tell how a {type(module).__name__} was compiled: leave it uncompiled")
    return kept
