"""A model spread over the mesh, and its steps.

    train_step   forward and backward of all microbatches through the pipeline
    eval_step    forward only; the loss
    predict      forward only; the outputs

Each rank holds its chunks of the model, sharded along the tensor axis. Parameters go by their names in the unsplit
module everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybridpar.company import Company
from hybridpar.evaluating import Evaluating
from hybridpar.global_view import everywhere
from hybridpar.loss import WeightedLoss, is_cut, logits
from hybridpar.microbatch import Elsewhere, to_device
from hybridpar.optim.model import Averaging
from hybridpar.optim.partial import PartialSums
from hybridpar.optim.precision import Scaling
from hybridpar.optim.zero.piece import stepped, value
from hybridpar.pipeline.executor import Executor, Micro
from hybridpar.pipeline.schedule import Schedule
from hybridpar.portion import portion
from hybridpar.proof.point import listener
from hybridpar.seeds import Draw
from hybridpar.shard import Spec
from hybridpar.split import Stage
from hybridpar.support import Combination
from hybridpar.tensor.plan import Applied
from hybridpar.trace.spans import Span, Trace
from hybridpar.unsplit import Unsplit

if TYPE_CHECKING:
    from hybridpar.wires.world import World

Named = list[tuple[str, nn.Parameter]]


class ParallelModel:
    """What `hp.parallelize` returns: this rank's part of the model.

    `world` are the axes, `report` says in words how the model was cut. `in_step`: replicas meet within their forwards.
    `reads_batches`: whether a stage of this rank uses inputs or targets (hp.DataLoader).

    Example:
        >>> model = hp.parallelize(nn.Linear(4, 1), world, loss=nn.MSELoss())
        >>> x = torch.randn(8, 4)
        >>> loss = model.train_step((x, x.sum(-1, keepdim=True)), microbatches=2)
        >>> model.full_state_dict()["weight"].shape         # the unsplit module's, whatever the mesh
        torch.Size([1, 4])
    """

    def __init__(
        self,
        world: World,
        stages: Mapping[int, Stage],
        owned: Sequence[Named],
        applied: Applied,
        homes: Mapping[str, int],
        buffers: Mapping[str, int],
        executor: Executor,
        schedules: Callable[[int], Schedule],
        draw: Draw,
        loss: WeightedLoss | None,
        report: str,
        asked: Combination,
        in_step: bool = False,
        reads_batches: bool = True,
    ) -> None:
        self.world, self.report, self._in_step, self.reads_batches = world, report, in_step, reads_batches
        self._stages, self._owned, self._applied = stages, owned, applied
        self._executor, self._schedules, self._draw = executor, schedules, draw
        self._loss, self.asked = loss, asked
        self.scaling = Scaling() if asked.precision == "fp16" else None
        # First, so that shares are summed over the tensor axis before anyone averages them over the data axis.
        self._partial = PartialSums(world.tensor, [[(n, p, applied.specs[n]) for n, p in chunk] for chunk in owned])
        self._unsplit = Unsplit(world, applied, homes, buffers, lambda: dict(self.named_parameters()), self._kept)
        self._averages: list[Averaging] = []
        self._evaluating: Callable[[int], AbstractContextManager[None]] = lambda microbatches: nullcontext()
        self._company = Company(world, world.data, in_step)
        self.scattered = False  # whether gradients lie in pieces on the replicas (ZeRO)
        self._spans: list[Span] = []
        self._largest, self.training = 0, True

    # ---- steps

    def train_step(self, batch: tuple[Any, Any], microbatches: int = 1) -> float:
        """Forward and backward of this replica's `batch` = (inputs, targets), cut into `microbatches` along dim 0.

        Gradients are left in `p.grad`, scaled so that their average over the data axis is the gradient of the mean
        loss over the whole batch. Returns that loss, the same on every rank.

        Raises ValueError where the batch has fewer samples than `microbatches`.

        Example:
            >>> loss = model.train_step((ids, targets), microbatches=8)   # doctest: +SKIP
        """
        batch = listener().begins(self, batch, microbatches)
        for chunk in range(len(self._owned)):
            self._partial.begin(chunk)
        loss = self._with_loss(batch, microbatches, training=True)
        self._draw.step += 1
        listener().ends(self, loss)
        return loss

    @torch.no_grad()
    def eval_step(self, batch: tuple[Any, Any], microbatches: int = 1) -> float:
        """The mean loss over the whole batch, without dropout or gradients; the same on every rank.

        Example:
            >>> loss = model.eval_step((ids, targets), microbatches=8)    # doctest: +SKIP
        """
        with Evaluating(self, self._stages.values()):
            return self._with_loss(batch, microbatches, training=False)

    @torch.no_grad()
    def predict(self, inputs: Any, microbatches: int = 1) -> Tensor:
        """The model's output for this replica's `inputs`, whole, on every rank of the replica.

        With zero=3 all replicas call it together, each with its own inputs.

        Example:
            >>> logits = model.predict(ids)                               # doctest: +SKIP
        """
        outputs: list[Tensor] = []
        cut = portion(to_device(inputs, self.world.device), microbatches, self.world.replica)
        finish = lambda output: outputs.append(self._whole(output))  # noqa: E731
        micros = [Micro(part, torch.arange(n), finish) for part, n in zip(cut.parts, cut.sizes)]
        with Evaluating(self, self._stages.values()), self._evaluating(len(micros)):
            self._spans = self._executor.run(self._schedules(len(micros)).evaluation(), micros)
        return self._everywhere(torch.cat(outputs) if outputs else None)

    def _with_loss(self, batch: tuple[Any, Any], microbatches: int, training: bool) -> float:
        if self._loss is None:
            raise ValueError("this model was parallelized without a loss: hp.parallelize(module, mesh, loss=...)")
        away = isinstance(batch, Elsewhere) and not self.reads_batches
        if not away and (not isinstance(batch, tuple | list) or len(batch) != 2):
            held = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ValueError(f"a batch is a pair (inputs, targets), and this is a {type(batch).__name__}{held}")
        world, loss = self.world, self._loss
        weigh = lambda part, n: loss.weight(part[1], n)  # noqa: E731
        cut = portion(to_device(batch, world.device), microbatches, world.replica, self._largest, weigh)
        parts, sizes = cut.parts, cut.sizes
        self._largest = max(self._largest, sum(sizes))
        company = self._company if training else Company(world, world.data, self._in_step)
        before, weight = company.count(sum(sizes), len(parts), cut.weight)
        losses: list[Tensor] = []
        scale = company.size / weight * (self.scaling.begin() if training and self.scaling else 1) if weight else 0.0

        def micro(m: int) -> Micro:
            (mine, wanted), n = parts[m] or (None, None), sizes[m]
            start = before + sum(sizes[:m])

            def finish(output: Any) -> Tensor | None:
                total = loss.total(output, wanted, cut.weights[m])
                losses.append(total.detach())
                return total * scale if training else None

            return Micro(mine, torch.arange(start, start + n), finish)

        schedule = self._schedules(len(parts))
        micros = [micro(m) for m in range(len(parts))]
        readiness = [self._partial, *self._averages] if training else ()
        with nullcontext() if training else self._evaluating(len(parts)):
            self._spans = self._executor.run(schedule if training else schedule.evaluation(), micros, readiness)
        speaks = losses and world.tensor.index == 0
        value = torch.stack(losses).double().sum() if speaks else torch.zeros((), dtype=torch.float64)
        return company.total(value.cpu()).item() / weight if weight else 0.0

    def _whole(self, output: Any) -> Tensor:
        """A microbatch's output, whole on every tensor rank."""
        output = logits(output)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"predict returns one tensor, or the logits of an output, and the module returned a "
                f"{type(output).__name__}"
            )
        cut = is_cut(output, self._applied.logits, self.world.tensor)
        return self.world.tensor.allgather(output, -1) if cut else output

    def _everywhere(self, output: Tensor | None) -> Tensor:
        """The last stage's output, on every rank of the replica."""
        world = self.world
        told = world.replica.objects(output is not None)
        return everywhere(output, told.index(True), world.replica, world.device)

    @property
    def steps(self) -> int:
        """How many training steps there have been. Dropout masks depend on it: save it, and set it when you resume."""
        return self._draw.step

    @steps.setter
    def steps(self, count: int) -> None:
        self._draw.step = count

    # ---- the module's face

    def __call__(self, *inputs: Any) -> None:
        """Refused: one rank cannot call what lies on several."""
        raise ValueError("a parallel model is not called: use train_step(batch), eval_step(batch) or predict(inputs)")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this rank owns: its shards of its stages."""
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the unsplit module, this rank's shard)."""
        return (pair for chunk in self._owned for pair in chunk)

    def chunks(self) -> list[Named]:
        """The owned parameters of each chunk on this rank."""
        return [list(chunk) for chunk in self._owned]

    def parts(self) -> list[nn.Module]:
        """The module of each chunk on this rank."""
        return list(self._stages.values())

    def specs(self) -> dict[str, Spec]:
        """How each parameter of this rank is cut."""
        return {name: self._applied.specs[name] for name, _ in self.named_parameters()}

    def attach(self, one: Averaging) -> None:
        """Tell `one` when the gradients of a chunk are about to be complete, and when they are.

        It takes the place of an earlier one: two would average the same gradients at the same time.
        """
        in_step = self._in_step or getattr(one, "each_pass", False)
        self._averages, self._company = [one], Company(self.world, one.company, in_step)
        self.scattered = getattr(one, "scattered", False)
        self._evaluating = getattr(one, "evaluating", lambda microbatches: nullcontext())

    @property
    def on_their_own(self) -> bool:
        """Whether replicas train for themselves under a sync policy, so that their weights may differ."""
        return self._company.size != self.world.data.size

    def wait(self) -> None:
        """Return when the gradients of the last step are averages over the replicas."""
        for one in self._averages:
            one.wait()
        if self.scaling is not None:
            self.scaling.unscale()

    def train(self, mode: bool = True) -> ParallelModel:
        """Training mode: dropout is on."""
        self.training = mode
        for stage in self._stages.values():
            stage.train(mode)
        return self

    def eval(self) -> ParallelModel:
        """Evaluation mode: dropout is off."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or make them zeros."""
        for p in map(stepped, self.parameters()):
            if p.grad is not None:
                p.grad = None if set_to_none else p.grad.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part: its shards, under their names in the unsplit module; with zero=3 all replicas together."""
        return {name: value(p) for name, p in self.named_parameters()}

    def full_state_dict(self) -> dict[str, Tensor]:
        """The unsplit module's parameters and buffers, whole, on the CPU of every rank; all ranks call it together.

        The plain module's `load_state_dict` reads it. Buffers such as running statistics, which each replica has from
        its own samples, are those of the first replica.
        """
        return self._unsplit.state()

    def full_gradients(self) -> dict[str, Tensor | None]:
        """The gradients of the unsplit module, whole, on the CPU of every rank; all ranks call it together."""
        self.wait()
        return self._unsplit.gradients()

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's shards, and its buffers, from the unsplit module's `state`.

        Raises ValueError where one is missing or of another shape.
        """
        listener().loads(self, state)
        self._unsplit.load(state)

    def trace(self) -> Trace:
        """What every rank of the pipeline did in the last step, in seconds from its beginning; all call it together."""
        spans = [span for part in self.world.pipeline.objects(self._spans) for span in part]
        return Trace(tuple(spans), "measured").from_zero()

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule of a training step of so many microbatches."""
        return self._schedules(microbatches)

    def _kept(self) -> dict[str, Tensor]:
        """The buffers of this rank's stages."""
        return {name: x for stage in self._stages.values() for name, x in stage.kept()}
