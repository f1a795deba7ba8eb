"""`hp.Watch`: what a training does, step by step, and a word when it goes wrong.

    each step      counted: time, samples, bytes on each axis, gradients that are not finite
    each report    three small messages between the ranks that step together; then the first one shows and writes it
    each check     weights that must be equal are compared by checksums

Nothing is sent in steps without a report or a check.
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridpar.engine import ParallelModel
from hybridpar.microbatch import Elsewhere, tensors
from hybridpar.trace.spans import WORK
from hybridpar.watch.drift import drifted
from hybridpar.watch.finite import Finite
from hybridpar.watch.metrics import Metrics
from hybridpar.watch.norm import Norm, between, lags, why
from hybridpar.watch.together import Together
from hybridpar.watch.traffic import Traffic
from hybridpar.watch.work import Work, compiled, peak
from hybridpar.watch.writers import JsonLines, TensorBoard

if TYPE_CHECKING:
    from hybridpar.watch.progress import Line


class Watch:
    """Watches the training of `model` by `optimizer`; call `step` after each of its steps, on all ranks.

    It reports after the first step and after each `every` steps: on the first rank as a line of progress (unless
    `progress` is False; `total` is the number of the last step), in the file `jsonl`, and for TensorBoard in the
    folder `tensorboard`. Weights are compared over the replicas, and over the tensor ranks those that are not cut,
    after the first step and each `drift` steps (never if None). `best` is the FLOP/s that one rank could do, measured
    unless given. A report's warnings are shown and written; `strict` raises them instead.

    Raises ValueError for numbers of steps below 1, and, if `strict`, on all ranks where there is something to warn of.

    Example:
        >>> watch = hp.Watch(model, optimizer, total=300, jsonl="run/metrics.jsonl")    # doctest: +SKIP
        >>> for batch in loader:                                                        # doctest: +SKIP
        ...     loss = model.train_step(batch, microbatches=8)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     watch.step(loss, batch)
    """

    def __init__(
        self,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        total: int | None = None,
        every: int = 1,
        drift: int | None = 100,
        jsonl: str | Path | None = None,
        tensorboard: str | Path | None = None,
        progress: bool = True,
        best: float | None = None,
        strict: bool = False,
    ) -> None:
        for name, steps in (("every", every), ("drift", drift)):
            if steps is not None and steps < 1:
                raise ValueError(f"{name}={steps}: a number of steps is at least 1" + ", or None" * (name == "drift"))
        self._model, self._optimizer, self._every, self._drift = model, optimizer, every, drift
        self._best, self._strict = best, strict
        world, stages = model.world, model._stages.values()
        axes = {"data": [world.data, world.peers], "pipeline": [world.pipeline], "tensor": [world.tensor]}
        self._traffic = Traffic({name: several for name, several in axes.items() if several[0].size > 1})
        self._finite = Finite(model.named_parameters())
        self._work = None if compiled(stages) else Work(stages)
        self._each: float | None = None  # operations of this rank for one sample
        self._gradients = Norm(model, optimizer, lambda: self._due(self._count + 1))
        self._count, self._since, self._clock = 0, 0, time.perf_counter()
        self._samples, self._tokens = 0, 0
        self._lags = lags(optimizer)
        self._ill = False  # already told of gradients that are not finite
        self._writers: list[JsonLines | TensorBoard | Line] = []
        if world.rank == 0:
            self._writers = _writers(jsonl, tensorboard)
        self._line = _line(total, world.columns) if world.rank == 0 and progress else None

    def step(self, loss: float, batch: Any = None, **more: float) -> Metrics | None:
        """A step is over: its `loss` and its `batch`; `more` numbers are reported as they are on the first rank.

        Returns the report if one is due, the same on every rank but for `more`, else None.

        Example:
            >>> watch.step(loss, batch, lr=rate.get_last_lr()[0])       # doctest: +SKIP
        """
        samples, tokens = _sizes(batch)
        self._count += 1
        if self._count == 1:
            opened = [axis for axis in between(self._optimizer) if axis.size > 1]  # some at the first step
            self._traffic.follow({"data": opened})
        if self._work is not None:
            self._each = self._work.stop() / samples if samples else None
            self._work = None
        if self._count > 1:  # the first step is no measure of the others: it warms up, and is counted
            self._since, self._samples, self._tokens = self._since + 1, self._samples + samples, self._tokens + tokens
        metrics = self._report(loss, more) if self._due(self._count) else None
        if self._count == 1:
            self._clock = time.perf_counter()
        if metrics is not None:
            if self._line is not None:
                self._line.show(metrics)
            for writer in self._writers:
                writer.write(metrics)
            if metrics.warnings and self._strict:
                raise ValueError("; ".join(metrics.warnings))
        return metrics

    def close(self) -> None:
        """Watch no more; close the files and leave the line of progress."""
        for one in (self._traffic, self._finite, self._gradients, *self._writers):
            one.close()
        if self._line is not None:
            self._line.close()
        self._writers, self._line = [], None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _due(self, count: int) -> bool:
        return count == 1 or count % self._every == 0 or self._checks(count)

    def _checks(self, count: int) -> bool:
        return self._drift is not None and (count == 1 or count % self._drift == 0)

    def _report(self, loss: float, more: dict[str, float]) -> Metrics:
        model, world, steps = self._model, self._model.world, self._since
        together = Together(model)
        spent, wrong = time.perf_counter() - self._clock, self._finite.wrong()
        self._finite.renew()
        if self._best is None and self._each is not None and steps:
            together.barrier()  # so that all are busy while each measures
            self._best = peak(world.device, _dtype(model))
        speaks = world.replica.index == 0
        late, self._lags = [now - then for now, then in zip(lags(self._optimizer), self._lags)], lags(self._optimizer)
        own = [self._samples * speaks, self._tokens * speaks, (self._each or 0.0) * self._samples, self._best or 0.0]
        sums = [*own, *late, self._idle(), len(wrong), *self._traffic.bytes.values()]
        summed = together.allreduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        samples, tokens, flops, best, counted, behind, idle, ill, *sent = summed
        mosts = torch.tensor([spent, _memory(world.device)], dtype=torch.float64)
        seconds, memory = together.allreduce(mosts, "max").tolist()
        per = 1 / seconds if steps and seconds else None
        rate = flops * per if per and flops else None
        metrics = Metrics(
            step=model.steps,
            loss=loss,
            seconds=seconds / steps if steps else None,
            samples=samples * per if per and samples else None,
            tokens=tokens * per if per and tokens else None,
            norm=self._gradients.take(),
            flops=rate,
            peak=rate / best if rate and best else None,
            bubble=idle / together.size if world.pipeline.size > 1 else None,
            sent={axis: count / max(1, steps) for axis, count in zip(self._traffic.bytes, sent)} if steps else {},
            memory=int(memory),
            staleness=behind / counted if counted else None,
            scale=model.scaling.scale if model.scaling is not None else None,
            skipped=model.scaling.skipped if model.scaling is not None else None,
            more=more,
            warnings=(*self._not_finite(loss, wrong, ill > 0, together), *self._apart(together)),
        )
        self._since = self._samples = self._tokens = 0
        self._traffic.reset()
        self._clock = time.perf_counter()
        return metrics

    def _idle(self) -> float:
        """The share of the last step's schedule in which this rank had nothing to do.

        Each rank reads its own clock only: the longest schedule of a replica's ranks is that of the replica.
        """
        spans = self._model._spans
        busy = sum(span.seconds for span in spans if span.kind in WORK)
        own = max((s.end for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
        longest = self._model.world.replica.allreduce(torch.tensor([own], dtype=torch.float64), "max").item()
        return 1 - busy / longest if longest else 0.0

    def _not_finite(self, loss: float, wrong: list[str], anywhere: bool, together: Together) -> list[str]:
        """What is not finite, told once until it is well again; `anywhere` is the same on all ranks."""
        model, told = self._model, []
        # To overflow is how fp16 finds its scale, and skips the step; not so once that has become less than none.
        anywhere = anywhere and (model.scaling is None or model.scaling.scale < 1)
        if not math.isfinite(loss) and not self._ill:
            told.append(f"step {model.steps}: the loss is {loss}")
        if anywhere and not self._ill:
            mine = (model.world.rank, wrong[-1:], len(wrong))  # the backward pass came to the last one first
            for rank, found, count in together.objects(mine):
                if found:
                    place = model.world.mesh.place(rank)
                    others = f" (and of {count - 1} more)" if count > 1 else ""
                    told.append(
                        f"step {model.steps}: the gradient of {found[0]}{others} is not finite on rank {rank} "
                        f"(data {place.data}, pipeline {place.pipeline}, tensor {place.tensor}), before it is averaged"
                    )
        self._ill = anywhere or not math.isfinite(loss)
        return told

    def _apart(self, together: Together) -> list[str]:
        """What has drifted apart, if a check is due; the same on every rank."""
        if not self._checks(self._count):
            return []
        model = self._model
        found = [said for several in together.objects(drifted(model, together.replicas)) for said in several]
        reason = why(self._optimizer) if model.world.data.size > 1 else ""
        return [f"step {model.steps}: {said}{reason}" for said in found]


def _sizes(batch: Any) -> tuple[int, int]:
    """The samples of a batch (inputs, targets), and the tokens, where the inputs hold ids [b, l] of some."""
    if isinstance(batch, Elsewhere):
        return batch.samples, 0
    inputs = tensors(batch[0] if isinstance(batch, tuple | list) and len(batch) else batch)
    samples = next((t.shape[0] for t in inputs if t.dim()), 0)
    return samples, next((t.numel() for t in inputs if t.dim() == 2 and t.dtype in (torch.int64, torch.int32)), 0)


def _dtype(model: ParallelModel) -> torch.dtype:
    """What the model's products are computed in."""
    with model._executor.casting():
        if torch.is_autocast_enabled(model.world.device.type):
            return torch.get_autocast_dtype(model.world.device.type)
    return next(model.parameters(), torch.empty(0)).dtype


def _memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU if it has one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _writers(jsonl: str | Path | None, tensorboard: str | Path | None) -> list[Any]:
    made: list[Any] = [] if jsonl is None else [JsonLines(jsonl)]
    return made if tensorboard is None else [*made, TensorBoard(tensorboard)]


def _line(total: int | None, columns: int | None) -> Line:
    from hybridpar.watch.progress import Line

    return Line(total, columns=columns)
