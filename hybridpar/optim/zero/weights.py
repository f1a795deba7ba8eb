"""Weights that come before a unit runs and go after it (ZeRO 3), in the forward and in the backward pass of a chunk.

    forward      [0][1][2][3]           a unit's hook waits for its own weights and asks for those of the next one
    gathers     0 1  2  3               over the data axis, by Horovod, meanwhile
    backward     [3][2][1][0]           a hook on the node that gave a unit's output does the same, the other way round
    gathers     3 2  1  0

Autograd runs the nodes made last first. So when the node of unit 1's output is to run, all nodes of unit 2 have, and
its weights go. All replicas ask for the same weights in the same order, since they run the same units.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from hybridpar.microbatch import tensors
from hybridpar.optim.bucket import Named
from hybridpar.optim.reduce import remove
from hybridpar.optim.zero.bucket import Bucket
from hybridpar.optim.zero.piece import piece_of
from hybridpar.optim.zero.units import outside, units
from hybridpar.wires.axis import Handle

_BUCKET_BYTES, _SMALL = 4 << 20, 64
_CHECKED_PASSES = 2


@dataclass(frozen=True, eq=False)
class _Call:
    """A forward of a unit: its place among those of its pass, -1 if it is repeated in the backward pass, and the number
    that all nodes which it makes exceed."""

    unit: nn.Module
    place: int
    first: int


class Weights:
    """The weights of the units of one chunk, `stage`; those of less than a 64th of `bucket_bytes` stay."""

    def __init__(self, stage: nn.Module, bucket_bytes: int | None = None) -> None:
        _check_uncompiled(stage)
        self._stage, self._units = stage, units(stage)
        self._unchecked = _CHECKED_PASSES
        self._small = (bucket_bytes or _BUCKET_BYTES) // _SMALL
        self._needs: dict[nn.Module, list[Bucket]] = {}
        self._coming: dict[Bucket, Handle] = {}
        self._there: dict[Bucket, None] = {}
        self._inside: list[_Call] = []  # forwards under way
        self._behind: _Call | None = None  # the one whose backward is under way
        self._order: list[nn.Module] = []  # of the last forward pass
        self._seen: list[nn.Module] = []  # of this one
        self._staying = False
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove, self._hooks)
        self._hook(stage.register_forward_pre_hook, Weights._begin, prepend=True)
        self._hook(stage.register_forward_hook, Weights._end)

    def choose(self, named: Named) -> tuple[list[tuple[Named, list[nn.Module]]], Named]:
        """Of the parameters `named` those that come and go, unit by unit with all units that use them; and the rest."""
        users: dict[Parameter, list[nn.Module]] = {}
        for unit in self._units:
            for p in unit.parameters():
                users.setdefault(p, []).append(unit)
        staying = outside(self._stage, self._units)
        chosen = []
        for unit in self._units:
            members = [(n, p) for n, p in named if p not in staying and users.get(p, [None])[0] is unit]
            if sum(p.numel() * p.element_size() for _, p in members) < self._small or not members:
                continue
            chosen.append((members, list(dict.fromkeys(user for _, p in members for user in users[p]))))
        taken = {p for members, _ in chosen for _, p in members}
        return chosen, [(n, p) for n, p in named if p not in taken]

    def add(self, users: Sequence[nn.Module], bucket: Bucket) -> None:
        """The units `users` use parameters of `bucket`."""
        for unit in users:
            if unit not in self._needs:
                self._needs[unit] = []
                self._hook(unit.register_forward_pre_hook, Weights._enter, prepend=True)
                self._hook(unit.register_forward_hook, Weights._leave)
            self._needs[unit].append(bucket)

    def rest(self) -> None:
        """A pass is over: nothing is there, nor on its way."""
        self._inside, self._behind = [], None
        while self._coming:
            self._coming.pop(next(iter(self._coming))).wait()  # nobody came for it
        self._drop()

    def stay(self, staying: bool) -> None:
        """Gather everything and keep it, until told otherwise."""
        self._staying = staying
        if staying:
            self._bring(dict.fromkeys(bucket for needed in self._needs.values() for bucket in needed))
        else:
            self.rest()

    # ---- what the hooks do

    def _begin(self, stage: nn.Module, args: Any) -> None:
        self.rest()
        self._seen = []

    def _end(self, stage: nn.Module, args: Any, output: Any) -> None:
        self._order = self._seen
        self.rest()
        if self._unchecked:
            self._unchecked -= 1
            _check_numbers(stage, tensors(output))

    def _enter(self, unit: nn.Module, args: Any) -> None:
        if unit not in self._needs:
            return  # the same module's copy in another chunk, which shares its hooks
        again = self._behind is not None  # computed again, amid a backward pass
        place = -1 if again else len(self._seen)
        self._inside.append(_Call(unit, place, _next_node() if torch.is_grad_enabled() else 0))
        self._bring(self._needs[unit])
        if again:
            return
        self._seen.append(unit)
        if self._order[place : place + 1] == [unit]:
            self._ask(self._order[place + 1 : place + 2])

    def _leave(self, unit: nn.Module, args: Any, output: Any) -> None:
        if unit not in self._needs:
            return
        while self._inside[-1].unit is not unit:  # its forward was broken off
            self._inside.pop()
        call = self._inside.pop()
        if torch.is_grad_enabled():
            given = tensors(output)
            if not given:
                raise ValueError(
                    f"a {type(unit).__name__} returns a {type(output).__name__} in which zero=3 finds no tensor, whose "
                    "gradient tells when weights are needed again: return a tensor, a tuple or a dict, or use zero=2"
                )
            for node in _nodes(given, call.first):
                node.register_prehook(functools.partial(_called, weakref.ref(self), Weights._return, call))
        self._drop()

    def _return(self, call: _Call, gradients: Any) -> None:
        """The gradient of what `call` gave is there: its nodes run now."""
        if self._behind is call:
            return
        self._inside, self._behind = [], call
        self._bring(self._needs[call.unit])
        if self._order[max(call.place, 0) : call.place + 1] == [call.unit]:
            self._ask(self._order[max(call.place - 1, 0) : call.place])

    # ---- what is there

    def _ask(self, following: Iterable[nn.Module]) -> None:
        """Begin to gather what these units need."""
        for unit in following:
            for bucket in self._needs[unit]:
                if bucket not in self._there and bucket not in self._coming:
                    self._coming[bucket] = bucket.gather()

    def _bring(self, buckets: Iterable[Bucket]) -> None:
        """Have `buckets` there, and no others that are not needed."""
        wanted = [bucket for bucket in buckets if bucket not in self._there]
        for bucket in wanted:
            if bucket not in self._coming:
                self._coming[bucket] = bucket.gather()
        self._drop()  # first, so that both need not be there at once
        for bucket in wanted:
            bucket.fill(self._coming.pop(bucket).wait())
            self._there[bucket] = None

    def _drop(self) -> None:
        if self._staying:
            return
        running = self._inside if self._behind is None else [*self._inside, self._behind]
        needed = {bucket for call in running for bucket in self._needs[call.unit]}
        for bucket in [bucket for bucket in self._there if bucket not in needed]:
            del self._there[bucket]
            bucket.memory.empty()

    def _hook(self, register: Callable[..., RemovableHandle], method: Callable[..., None], **how: bool) -> None:
        self._hooks.append(register(functools.partial(_called, weakref.ref(self), method), **how))

    @property
    def replaced(self) -> bool:
        """Whether another optimizer has taken the parameters over."""
        bucket = next((needed[0] for needed in self._needs.values()), None)
        return bucket is not None and piece_of(bucket.members[0][1]) is not bucket.pieces[0]


def _called(weights: weakref.ref[Weights], method: Callable[..., None], *args: Any) -> None:
    alive = weights()
    if alive is not None and not alive.replaced:
        method(alive, *args)


def _check_uncompiled(stage: nn.Module) -> None:
    for name, module in stage.named_modules():
        if module._compiled_call_impl is not None and getattr(module._compiled_call_impl, "compiled", True):
            raise ValueError(
                f"{name or type(module).__name__} is compiled, and zero=3 moves the weights that compiled code reads: "
                "leave it uncompiled, or use zero=2"
            )


def _check_numbers(stage: nn.Module, given: Iterable[torch.Tensor]) -> None:
    """Raise where a read of a weight that was not there has come through."""
    if any(t.is_floating_point() and bool(t.detach().isnan().any()) for t in given):
        raise ValueError(
            f"a forward of {type(stage).__name__} gives NaN: either the model does, as zero=2 will show, or its code "
            "reads a weight outside the forward of the module that holds it, as F.linear(x, self.embed.weight) does, "
            "where zero=3 has none: let a module that shares the weight do it, or use zero=2"
        )


def _next_node() -> int:
    """A number that nodes of autograd's graph made from now on, on this thread, exceed."""
    return torch.zeros((), requires_grad=True).view(()).grad_fn._sequence_nr()


def _nodes(given: Iterable[torch.Tensor], first: int) -> dict[Any, None]:
    """The nodes after `first` that gave these tensors, and those of what they are views of.

    A change in place that follows (x += y) goes around the node of a view, to the one of its base.
    """
    several = [one.grad_fn for t in given for one in (t, t._base) if one is not None]
    return dict.fromkeys(node for node in several if node is not None and node._sequence_nr() > first)
