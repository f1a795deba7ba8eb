"""The same training in one process, in plain PyTorch: the unsplit module, the whole batch, torch's own optimizer.

    outputs of all microbatches of all replicas, joined -> the loss of the whole batch -> backward -> clip -> step

Microbatches go through the module one by one, since batch norms use the statistics of each; buffers are kept for each
replica, which updates its own. The loss is one mean over everything: how a run weighs its microbatches is not repeated
here but checked. Only dropouts are ours, so that they draw the masks of the run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.loss import _known, logits
from hybridpar.microbatch import call, split_batch, to_device
from hybridpar.proof.between import Between
from hybridpar.proof.recorder import Group, doubled, doubled_loss
from hybridpar.proof.watch import Watch
from hybridpar.seeds import Draw
from hybridpar.skeleton.freight import pack, unpack
from hybridpar.tensor.loss import CrossEntropy
from hybridpar.tensor.plan import apply
from hybridpar.wires.axis import Alone

_ENDLESS = 2**62  # samples that came before: any number of microbatches is allowed


@dataclass(frozen=True)
class Fed:
    """What a step was fed, over all replicas: (batch, microbatches) of each; what was frozen, what was in evaluation
    mode, what was done to the gradients, and to the weights before it."""

    batches: Sequence[tuple[Any, int]]
    number: int
    fresh: bool
    frozen: frozenset[str]
    still: frozenset[str]
    clips: Sequence[tuple[str, float, float]]
    groups: Mapping[int, Sequence[Group]]
    between: Between = Between()


@dataclass
class Micro:
    """A microbatch: its replica, its place among all of the step, how much it counts, its loss."""

    replica: int
    start: int
    samples: int
    counted: float
    loss: float = 0.0


@dataclass
class Told:
    """What one step gave. `buffers` of each replica."""

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]
    micros: list[Micro] = field(default_factory=list)


class Reference:
    """Trains `module` (taken over) in fp64 if `double`, in fp32 if it is False, as it is if None.

    `classes` are those of the run's optimizers, `defaults` what they were made with.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Any,
        seed: int,
        device: torch.device,
        classes: Sequence[type[torch.optim.Optimizer]],
        defaults: Sequence[Mapping[str, Any]],
        double: bool | None = None,
    ) -> None:
        self._dtype = {None: None, True: torch.float64, False: torch.float32}[double]
        if self._dtype is not None:
            module = module.to(self._dtype)
            loss = doubled_loss(loss) if double else loss
        self.module, self.loss, self._device = module.to(device), loss, device
        self.draw = Draw(seed)
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules()):
            apply(self.module, {}, Alone("tensor"), self.draw)
        self._classes, self._defaults = classes, defaults
        self._optimizers: list[torch.optim.Optimizer] = []
        self._buffers: list[dict[str, Tensor]] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        """By all of their names."""
        return dict(self.module.named_parameters(remove_duplicate=False))

    def step(self, fed: Fed, watch: Watch | None = None) -> Told:
        """Make the step that the run has made."""
        self.prepare(fed)
        with self._typed():
            value, micros = self._forward(fed, watch)
            value.backward()
        named = dict(self.module.named_parameters())
        for what, most, norm in fed.clips:
            if what == "norm":
                nn.utils.clip_grad_norm_(named.values(), most, norm)
            else:
                nn.utils.clip_grad_value_(named.values(), most)
        gradients = {n: (p.grad if p.grad is not None else torch.zeros_like(p)).detach().cpu().clone()
                     for n, p in named.items()}  # fmt: skip
        self._step(fed)
        weights = {n: p.detach().cpu().clone() for n, p in named.items()}
        return Told(float(value.detach()), gradients, weights, self._buffers, micros)

    def prepare(self, fed: Fed) -> None:
        """Be as the run was when it began the step; what is done already stays so."""
        parameters = self.parameters()
        with torch.no_grad():
            for name, x in (fed.between.weights or {}).items():
                parameters[name].copy_(x)
        for name, p in self.module.named_parameters():
            p.requires_grad_(name not in fed.frozen)
        for name, module in self.module.named_modules():
            module.training = name not in fed.still
        if fed.fresh:
            self.module.zero_grad()

    def shares(self, fed: Fed, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """The gradient of the loss of each microbatch alone, weighed as it counts in the whole; they add up to it."""
        self.prepare(fed)
        kept, parameters, found = copy.deepcopy(self.module.state_dict()), self.parameters(), []
        with self._typed():
            parts = self._parts(fed)
            total = sum(micro.counted for micro, _, _ in parts)
            for micro, inputs, targets in parts:
                value = plain_loss(self.loss, self._output(fed, micro, inputs), targets) * (micro.counted / total)
                grads = torch.autograd.grad(value, [parameters[n] for n in names], allow_unused=True)
                found.append({
                    n: torch.zeros_like(parameters[n]) if g is None else g.detach() for n, g in zip(names, grads)
                })  # fmt: skip
        self.module.load_state_dict(kept)
        return found

    def uses(self, fed: Fed, name: str) -> dict[str, Tensor]:
        """The gradient that each of a tied parameter's uses contributes, by the names under which they use it."""
        self.prepare(fed)
        first = self.parameters()[name]
        names = [other for other, p in self.parameters().items() if p is first]
        untied = {other: nn.Parameter(first.detach().clone()) for other in names}
        for other, p in untied.items():
            _put(self.module, other, p)
        kept = copy.deepcopy(self.module.state_dict())
        with self._typed():
            value, _ = self._forward(fed, None)
            grads = torch.autograd.grad(value, list(untied.values()), allow_unused=True)
        self.module.load_state_dict(kept)
        for other in names:
            _put(self.module, other, first)
        return {n: torch.zeros_like(first) if g is None else g.detach() for n, g in zip(untied, grads)}

    def _forward(self, fed: Fed, watch: Watch | None) -> tuple[Tensor, list[Micro]]:
        """The loss of the whole batch, and its microbatches with the loss of each."""
        parts = self._parts(fed)
        if watch is not None:
            watch.attach(self.module.named_modules())
        outputs = []
        self._buffers = self._buffers or [_buffers(self.module) for _ in fed.batches]
        for replica in range(len(fed.batches)):
            _restore(self.module, self._buffers[replica], self._device)
            outputs += [self._output(fed, m, inputs) for m, inputs, _ in parts if m.replica == replica]
            self._buffers[replica] = _buffers(self.module)
        if watch is not None:
            watch.remove()
        micros = [micro for micro, _, _ in parts]
        for output, (micro, _, targets) in zip(outputs, parts):
            if micro.counted:
                micro.loss = float(plain_loss(self.loss, output, targets).detach())
        sizes = [micro.samples for micro in micros]
        try:
            output, targets = _joined(outputs, sizes), _joined([targets for _, _, targets in parts], sizes)
        except _Ragged:  # sequences of several lengths: weigh the means
            total = sum(micro.counted for micro in micros)
            values = [plain_loss(self.loss, o, t) * (m.counted / total) for o, (m, _, t) in zip(outputs, parts)
                      if m.counted]  # fmt: skip
            return torch.stack(values).sum(), micros
        return plain_loss(self.loss, output, targets), micros

    def _output(self, fed: Fed, micro: Micro, inputs: Any) -> Any:
        self.draw.step, self.draw.samples = fed.number, torch.arange(micro.start, micro.start + micro.samples)
        return call(self.module, inputs)

    def _parts(self, fed: Fed) -> list[tuple[Micro, Any, Any]]:
        """All microbatches in order: what is known of each, its inputs and targets."""
        found, start = [], 0
        for replica, (batch, microbatches) in enumerate(fed.batches):
            batch = to_device(doubled(batch) if self._dtype == torch.float64 else batch, self._device)
            for (inputs, targets), samples in split_batch(tuple(batch), microbatches, _ENDLESS):
                found.append((Micro(replica, start, samples, counted(self.loss, targets, samples)), inputs, targets))
                start += samples
        return found

    def _step(self, fed: Fed) -> None:
        """Step the optimizers that the run has stepped, made from the same groups."""
        parameters = self.parameters()
        for number, groups in sorted(fed.groups.items()):
            if number == len(self._optimizers):
                made = [{**options, "params": [parameters[n] for n in names]} for options, names in groups]
                kind, defaults = self._classes[number], self._defaults[number]
                taken = {k: defaults[k] for k in inspect.signature(kind).parameters if k in defaults}
                self._optimizers.append(kind(made, **taken))
            for group, (options, _) in zip(self._optimizers[number].param_groups, groups):
                group.update(options)
            self._optimizers[number].step()

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """What the module makes anew is of its dtype too."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype or before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class _Ragged(Exception):
    """Outputs that are no parts of one."""


def plain_loss(function: Any, output: Any, targets: Any) -> Tensor:
    """The mean that `function` stands for, by torch's own functions where it is a cross entropy."""
    known = _known(function)
    if not isinstance(known, CrossEntropy):
        return function(output, targets)
    output = logits(output)
    if targets.shape == output.shape[:-1]:  # [.., v]; else [b, v, ..], as torch wants it
        output, targets = output.reshape(-1, output.shape[-1]), targets.reshape(-1)
    return F.cross_entropy(output, targets, ignore_index=known.ignore_index, label_smoothing=known.label_smoothing)


def counted(function: Any, targets: Any, samples: int) -> float:
    """What the mean of `function` divides by."""
    known = _known(function)
    if isinstance(known, CrossEntropy):
        return float((targets != known.ignore_index).sum())
    if isinstance(known, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        kept = targets[targets != known.ignore_index]
        return float(kept.numel() if known.weight is None else known.weight[kept].sum())
    return float(samples)


def _joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The outputs of microbatches as the output of all of them."""
    if len(values) == 1:
        return values[0]
    try:
        packed = [pack(value) for value in values]
    except ValueError:
        raise _Ragged from None
    if len({structure for structure, _ in packed}) > 1:
        raise _Ragged
    joined = []
    for column in zip(*(found for _, found in packed)):
        shapes = {tuple(t.shape[1:]) for t in column}
        if len(shapes) > 1 or any(not t.dim() or t.shape[0] != n for t, n in zip(column, sizes)):
            raise _Ragged
        joined.append(torch.cat(column))
    return unpack(packed[0][0], joined)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = {n for n, x in module.state_dict(keep_vars=True).items() if not isinstance(x, nn.Parameter)}
    return {n: x.detach().cpu().clone() for n, x in module.named_buffers(remove_duplicate=False) if n in kept}


def _restore(module: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """New tensors: the graphs of earlier forwards hold the old ones."""
    for name, x in buffers.items():
        above, _, leaf = name.rpartition(".")
        module.get_submodule(above)._buffers[leaf] = x.to(device, copy=True)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    above, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(above), leaf, parameter)
