"""Runs a schedule: one method per kind of action.

    FORWARD    take the activation from the stage before, compute, post it to the stage after
    BACKWARD   take the gradient from the stage after, compute, post it to the stage before
    REDUCE     the gradients of a stage are complete: launch what has not been launched

Messages follow from the actions and are matched by (microbatch, stage, kind), so any valid order works. Posting never
blocks; between two stages of one rank nothing is sent at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridpar.microbatch import tensors as within
from hybridpar.optim.model import Passing, Reducing
from hybridpar.optim.precision import Casting
from hybridpar.pipeline.action import Action, Kind
from hybridpar.pipeline.schedule import Schedule
from hybridpar.pipeline.ties import Ties
from hybridpar.seeds import Draw
from hybridpar.split import Stage
from hybridpar.trace.spans import Span
from hybridpar.wires.message import Mailbox

_KINDS = {Kind.FORWARD: 0, Kind.BACKWARD: 1}


@dataclass(frozen=True)
class Micro:
    """One microbatch: what enters the first stage, the ids of its samples, and what is done with the last's output.

    `finish(output)` returns what to pull back (a scalar that requires a gradient) in training, and None otherwise.
    """

    inputs: Any
    samples: Tensor  # [b] int64
    finish: Callable[[Any], Tensor | None]


@dataclass
class _Held:
    """What a forward leaves for its backward."""

    inputs: list[Tensor | None]
    outputs: list[Tensor]


class Executor:
    """Executes schedules over the chunks of one rank.

    `chunks` maps stage numbers to the stages held here; `ties` are the parameters shared with other stages, whose
    messages use the tags below `first_tag`. Forwards run within `casting()`.
    """

    def __init__(
        self,
        chunks: Mapping[int, Stage],
        mailbox: Mailbox,
        rank: int,
        ties: Ties,
        draw: Draw,
        first_tag: int,
        casting: Casting = nullcontext,
    ) -> None:
        self._chunks, self._mailbox, self._rank = chunks, mailbox, rank
        self._ties, self._draw, self._first_tag = ties, draw, first_tag
        self._numbers = {stage: i for i, stage in enumerate(chunks)}
        self.casting = casting

    def run(
        self,
        schedule: Schedule,
        micros: Sequence[Micro],
        readiness: Sequence[Reducing] = (),
        graded: bool | None = None,
    ) -> list[Span]:
        """Run all actions of this rank; returns when each began and ended, in seconds of `time.perf_counter`.

        `graded` has forwards prepare for a backward, which they do if `schedule` has one unless it says otherwise.
        """
        run = _Run(self, schedule, micros, readiness)
        self._ties.refresh()
        with torch.set_grad_enabled(not schedule.forward_only if graded is None else graded):
            for action in schedule.actions[self._rank]:
                run.do(action)
        self._mailbox.flush()
        return run.spans


class _Run:
    """One run of a schedule: what is held between its actions."""

    def __init__(
        self, of: Executor, schedule: Schedule, micros: Sequence[Micro], readiness: Sequence[Reducing]
    ) -> None:
        self._of, self._schedule, self._micros, self._readiness = of, schedule, micros, readiness
        self._held: dict[tuple[int, int], _Held] = {}
        self._inside: dict[int, tuple[list[Tensor | None], Any]] = {}  # messages between stages of this rank, by tag
        self.spans: list[Span] = []
        row = schedule.actions[of._rank]
        self._last = {a.stage: a for a in row if a.kind is Kind.BACKWARD}  # the last one of each stage stays
        self._methods = {Kind.FORWARD: self._forward, Kind.BACKWARD: self._backward, Kind.REDUCE: self._reduce}

    def do(self, action: Action) -> None:
        self._methods[action.kind](action)

    def _forward(self, action: Action) -> None:
        stage, micro = self._of._chunks[action.stage], self._micros[action.micro]
        if action.stage == 0:
            received: list[Tensor | None] = []
            inputs, skips = micro.inputs, {}
        else:
            received, (structure, wants) = self._take(Kind.FORWARD, action.stage, action.micro, action.stage - 1)
            received = [t.requires_grad_(w) if w else t for t, w in zip(received, wants)]
            # What arrives is a leaf of the graph, which x += 1 must not change: the stage gets a copy.
            entering = [t.clone() if w else t for t, w in zip(received, wants)]
            inputs, skips = _unpack(entering, structure)
        began = time.perf_counter()
        self._of._draw.samples = micro.samples
        with self._of.casting():
            output, skips = stage(inputs, skips, micro.inputs)
            pulled = micro.finish(output) if action.stage == self._schedule.stages - 1 else None
        if action.stage == self._schedule.stages - 1:
            tensors, structure = [] if pulled is None else [pulled], None
        else:
            tensors, structure = _pack(output, skips, stage)
        self._note(action, began)
        wants = [t.requires_grad for t in tensors]
        if not self._schedule.forward_only:
            graded = [t for t, w in zip(tensors, wants) if w]
            self._held[action.stage, action.micro] = _Held([t for t in received if t.requires_grad], graded)
        if action.stage < self._schedule.stages - 1:
            self._post(Kind.FORWARD, action.stage + 1, action.micro, tensors, (structure, wants))

    def _backward(self, action: Action) -> None:
        held = self._held.pop((action.stage, action.micro))
        if action.stage == self._schedule.stages - 1:
            gradients: list[Tensor | None] = [None] * len(held.outputs)  # a scalar's own gradient is 1
            pulls = held.outputs
        else:
            gradients, _ = self._take(Kind.BACKWARD, action.stage, action.micro, action.stage + 1)
            pulls = [t for t, g in zip(held.outputs, gradients) if g is not None]
            gradients = [g for g in gradients if g is not None]
        last = self._last[action.stage] is action
        if last:
            self._of._ties.collect(action.stage)
            for one in self._readiness:
                one.arm(self._of._numbers[action.stage])
        began = time.perf_counter()
        self._of._draw.samples = self._micros[action.micro].samples  # a recomputed forward draws the same masks
        if pulls:
            torch.autograd.backward(pulls, gradients)
        self._note(action, began)
        if last:
            self._of._ties.give(action.stage)
        else:
            for one in self._readiness:
                if isinstance(one, Passing):
                    one.passed(self._of._numbers[action.stage])
        if action.stage:
            self._post(Kind.BACKWARD, action.stage - 1, action.micro, [t.grad for t in held.inputs], None)

    def _reduce(self, action: Action) -> None:
        began = time.perf_counter()
        for one in self._readiness:
            one.flush(self._of._numbers[action.stage])
        self._note(action, began)

    def _tag(self, kind: Kind, stage: int, micro: int) -> int:
        return self._of._first_tag + (micro * self._schedule.stages + stage) * len(_KINDS) + _KINDS[kind]

    def _post(self, kind: Kind, stage: int, micro: int, tensors: Sequence[Tensor | None], value: Any) -> None:
        """Bring what `stage` will need for `kind` to where it is held."""
        tag, home = self._tag(kind, stage, micro), self._schedule.stage_ranks[stage]
        if home == self._of._rank:
            self._inside[tag] = ([None if t is None else t.detach() for t in tensors], value)
        else:
            self._of._mailbox.post(home, tag, tensors, value)

    def _take(self, kind: Kind, stage: int, micro: int, source: int) -> tuple[list[Tensor | None], Any]:
        """What the stage `source` has posted to `stage`."""
        tag, home = self._tag(kind, stage, micro), self._schedule.stage_ranks[source]
        return self._inside.pop(tag) if home == self._of._rank else self._of._mailbox.take(home, tag)

    def _note(self, action: Action, began: float) -> None:
        span = Span(self._of._rank, action.kind.value, action.stage, action.micro, began, time.perf_counter())
        self.spans.append(span)


def _pack(output: Any, skips: Mapping[str, Tensor], stage: Stage) -> tuple[list[Tensor], Any]:
    """The tensors of a stage's output and skips, and the structure that `_unpack` needs."""
    items = output if isinstance(output, tuple) else (output,)
    for item in items:
        if not isinstance(item, Tensor) and within(item):  # it would travel as a constant, and no gradient would return
            raise ValueError(
                f"{stage.names[-1]} ends stage {stage.number} and returns tensors inside a {type(item).__name__}: "
                "between stages let it return a tensor, or a flat tuple of tensors and constants"
            )
    tensors = [t for t in items if isinstance(t, Tensor)] + list(skips.values())
    constants = [None if isinstance(t, Tensor) else (t,) for t in items]
    return tensors, (constants, tuple(skips))


def _unpack(tensors: Sequence[Tensor], structure: Any) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    constants, names = structure
    coming = iter(tensors)
    items = tuple(next(coming) if constant is None else constant[0] for constant in constants)
    return items, dict(zip(names, coming))
