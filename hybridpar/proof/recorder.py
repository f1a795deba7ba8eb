"""Records the first steps of a training run, on each rank what it holds, and ends the run after them.

    parallelizes        rank 0 keeps a copy of the whole module
    begins   step k     the batch, the weights it starts from
    ends                the loss, the buffers
    an optimizer steps  before it: the gradients as the optimizer sees them, its parameter groups; after it: the weights

Optimizers are watched by torch's own hooks, so Horovod's and plain ones are seen too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hybridpar.fill.allocate import allocate
from hybridpar.fill.fill import fill
from hybridpar.fill.recipe import record as recipes_of
from hybridpar.microbatch import fingerprint, mapped, tensors
from hybridpar.optim.compression import Compression
from hybridpar.proof.facts import Cause
from hybridpar.proof.point import Silent, listening
from hybridpar.proof.together import frozen_apart, strayed
from hybridpar.proof.watch import Watch, checksum
from hybridpar.shard import Spec

if TYPE_CHECKING:
    from hybridpar.engine import ParallelModel
    from hybridpar.wires.world import World

Group = tuple[dict[str, Any], list[str]]  # an optimizer's options for some parameters, and their names


class Enough(BaseException):
    """Ends the user's training; not an Exception, which the script may catch."""


@dataclass
class Step:
    """What one rank knows of one training step."""

    batch: Any
    microbatches: int
    number: int  # of the model's own count, on which dropout masks depend
    fresh: bool  # whether gradients of earlier steps were gone
    frozen: tuple[str, ...]  # parameters that ask for no gradient
    still: tuple[str, ...]  # modules in evaluation mode
    changed: dict[str, Tensor]  # weights that are not what the step before left
    loss: float = 0.0
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the optimizers
    buffers: dict[str, Tensor] = field(default_factory=dict)
    clips: list[tuple[str, float, float]] = field(default_factory=list)
    groups: dict[int, list[Group]] = field(default_factory=dict)  # of each optimizer that stepped


class Recorder(Silent):
    """Listens to `steps` training steps; in fp64 if `double`; to the modules too in the step `watched`."""

    def __init__(self, steps: int, double: bool = False, watched: int | None = None) -> None:
        self.steps, self.double = steps, double
        self.watched, self.deeply = watched or 0, watched is not None  # else only its dropout masks
        self.model: ParallelModel | None = None
        self.original: nn.Module | None = None  # the whole module, on rank 0
        self.loss: Any = None
        self.records: list[Step] = []
        self.start: dict[str, Tensor] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.strayed = ""  # why ranks could not go on together
        self.unequal: Cause | None = None  # its cause, where it is known
        self.loaded = False
        self.watch: Watch | None = None
        self._begun: dict[str, Tensor] = {}  # the weights at the start of the step at hand
        self._closing: list[Callable[[], None]] = []
        self._ready = False

    def record(self, train: Callable[[], Any]) -> None:
        """Run `train` until it has made the steps or ends. Raises ValueError where it made none."""
        before = torch.get_default_dtype()
        try:
            with listening(self), self._hooked():
                train()
        except Enough:
            pass
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise
        finally:
            torch.set_default_dtype(before)
        if self.model is None or not self.records and not self.strayed:
            raise ValueError(
                "there is nothing to verify: no model made by hp.parallelize() has made a training step by train_step()"
            )
        self._after_step()
        if not self.strayed:
            self._meet(("end",))
        if self.watch is not None:
            self.watch.remove()

    def close(self) -> None:
        """Close the world, which the script may have believed to have closed."""
        while self._closing:
            self._closing.pop()()

    # ---- what the engine tells

    def parallelizes(
        self, module: nn.Module, loss: Any, example: Any, mesh: World, weights: Any, init: Any
    ) -> tuple[nn.Module, Any, Any]:
        if self._ready:
            return module, loss, example
        if mesh.data.size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            raise ValueError(
                f"a SyncBatchNorm joins the microbatches of {mesh.data.size} replicas, which no run of one process "
                "does: verify the other axes, with --data 1"
            )
        if self.double:
            torch.set_default_dtype(torch.float64)
            module, loss, example = module.double(), doubled_loss(loss), doubled(example)
        self._ready, self.loss = True, loss
        if mesh.rank == 0:
            self.original = filled(copy.deepcopy(module), mesh.device, weights, init)
        return module, loss, example

    def parallelized(self, model: ParallelModel) -> None:
        if self.model is None:
            self.model = model
            model.reads_batches = True  # so that all ranks can be compared
            # The script may close its world after its last step; it is needed once more.
            self._closing, model.world._closing[:] = list(model.world._closing), []

    def begins(self, model: ParallelModel, batch: Any, microbatches: int) -> Any:
        if model is not self.model:
            return batch
        self._after_step()
        if len(self.records) == self.steps:
            raise Enough
        if model.scattered:
            raise ValueError("verify compares whole gradients, and zero= leaves each replica pieces: verify without it")
        batch = doubled(batch) if self.double else batch
        place = model.world.place
        self._meet(("step", len(self.records), place.data, fingerprint(batch), microbatches))
        frozen = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
        trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        self.unequal = frozen_apart(model.world.everyone.objects((frozen, trained)))
        if self.unequal is not None:
            self.strayed = f"{self.unequal.words}, in step {len(self.records)}"
            raise Enough
        self._begun = held(model)
        self.start = self.start or self._begun
        changed = changed_since(self.records[-1].weights, self._begun) if self.records else {}
        if self.double:
            _uncompressed(model)
        fresh = not any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        still = tuple(name for name, module in named_modules(model) if not module.training)
        self.records.append(Step(batch, microbatches, model.steps, fresh, frozen, still, changed))
        if self.watched == len(self.records) - 1:
            self.watch = Watch(model._draw, model.world.tensor)
            if self.deeply:
                self.watch.attach(named_modules(model), model.named_parameters())
        return batch

    def ends(self, model: ParallelModel, loss: float) -> None:
        if model is self.model:
            step = self.records[-1]
            step.loss = loss
            step.buffers = {name: x.detach().cpu().clone() for name, x in model._kept().items()}
            if self.watch is not None:
                self.watch.remove()

    def evaluates(self, model: ParallelModel) -> None:
        if model is self.model and len(self.records) == self.steps:
            raise Enough

    def clips(self, max_norm: float, norm_type: float) -> None:
        self._clipped("norm", max_norm, norm_type)

    def loads(self, model: ParallelModel, state: Any) -> None:
        if model is self.model and self.original is not None and not self.records:
            self.original.load_state_dict(state, strict=False)

    # ---- what torch tells

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Watch all optimizers, and torch's own clipping."""
        hooks = [register_optimizer_step_pre_hook(self._steps), register_optimizer_step_post_hook(self._stepped)]
        places = (nn.utils, nn.utils.clip_grad)
        norm, value = nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_

        def clip_norm(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **options: Any) -> Tensor:
            self._clipped("norm", max_norm, norm_type)
            return norm(parameters, max_norm, norm_type, *args, **options)

        def clip_value(parameters: Any, clip_value: float, *args: Any, **options: Any) -> None:
            self._clipped("value", clip_value, 0.0)
            value(parameters, clip_value, *args, **options)

        for place in places:
            place.clip_grad_norm_, place.clip_grad_value_ = clip_norm, clip_value
        try:
            yield
        finally:
            for place in places:
                place.clip_grad_norm_, place.clip_grad_value_ = norm, value
            for hook in hooks:
                hook.remove()

    def _clipped(self, what: str, most: float, norm_type: float) -> None:
        if self.records:
            self.records[-1].clips.append((what, float(most), float(norm_type)))

    def _steps(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step. Horovod's calls torch's inside: the inner call comes last, and counts."""
        groups = self._groups(optimizer)
        if not any(names for _, names in groups):
            return
        if optimizer not in self.optimizers:
            if optimizer.state and any(self._names().get(id(p)) for p in optimizer.state):
                raise ValueError(
                    "the optimizer has made steps before the first train_step: verify looks at the beginning of a run"
                )
            self.optimizers.append(optimizer)
        step = self.records[-1]
        step.groups[self.optimizers.index(optimizer)] = groups
        if len(step.groups) == 1:  # of several optimizers the first to step; the gradients of all are there by then
            found = {name: p.grad for name, p in self.model.named_parameters()}
            step.gradients = {name: None if g is None else g.detach().cpu().clone() for name, g in found.items()}

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self.optimizers:
            self.records[-1].weights = held(self.model)

    def _after_step(self) -> None:
        """Where no optimizer has stepped the weights are what they were."""
        if self.records and not self.records[-1].weights:
            self.records[-1].weights = self._begun

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[Group]:
        if self.model is None or not self.records:
            return []
        names = self._names()
        return [
            (
                {key: value for key, value in group.items() if key != "params"},
                [names[id(p)] for p in group["params"] if id(p) in names],
            )
            for group in optimizer.param_groups
        ]

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    # ---- all ranks together

    def _meet(self, mine: tuple[Any, ...]) -> None:
        """Raise Enough on all ranks where they do not go the same way."""
        told = self.model.world.everyone.objects(mine)
        self.strayed = strayed(told)
        if self.strayed and mine[0] == "step":
            raise Enough


def filled(module: nn.Module, device: torch.device, weights: Any, init: Any) -> nn.Module:
    """`module`, with the values that `hp.parallelize` would give its shards."""
    recipes = recipes_of(module)
    allocate([module], device)
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    fill(recipes, {name: (x, Spec(name, tuple(x.shape))) for name, x in named}, 0, weights, init)
    return module


def held(model: ParallelModel) -> dict[str, Tensor]:
    """A copy of this rank's weights."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def changed_since(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `now` that have other bits than they had before; NaNs are the same NaNs."""
    return {n: x for n, x in now.items() if not torch.equal(before[n], x) and checksum(before[n]) != checksum(x)}


def doubled(batch: Any) -> Any:
    """`batch` with its floating-point tensors in fp64."""
    return mapped(batch, lambda t: t.double() if t.is_floating_point() else t) if tensors(batch) else batch


def doubled_loss(loss: Any) -> Any:
    return copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss


def named_modules(model: ParallelModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of this rank's stages by their names in the unsplit module, without the stand-ins for others'."""
    for stage in model._stages.values():
        if hasattr(stage, "body"):
            yield from ((name, m) for name, m in stage.body.named_modules() if not type(m).__name__.startswith("_"))
            continue
        for unit, module in zip(stage.names, stage.units):
            yield from ((".".join(filter(None, (unit, name))), m) for name, m in module.named_modules())


def _uncompressed(model: ParallelModel) -> None:
    """Let gradients travel as they are: 16 bits on the wire are no bug, and would hide one."""
    for average in model._averages:
        for chunk in getattr(average, "_chunks", ()):
            chunk._wire = Compression.none
