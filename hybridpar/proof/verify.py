"""`hp.verify`: is a parallel run the run of one process? All ranks call it together.

    as it is        the first steps, each rank's numbers against a reference in plain PyTorch on rank 0
    in fp64         the same again, where rounding is 10^-16 and a bug is not (skipped where the run is in fp64)
    once more       only where they differ: the first step that does, watched module by module

The training is run anew each time, in the same processes, and left when the steps are made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hybridpar.microbatch import fingerprint
from hybridpar.proof.causes import likely, same_mask
from hybridpar.proof.compare import GRADIENTS, Noise, compared, fed, is_double
from hybridpar.proof.diagnose import facts
from hybridpar.proof.facts import Cause, Facts, Mask
from hybridpar.proof.recorder import Recorder
from hybridpar.proof.report import Difference, Finding, Report, first, rows


def verify(
    train: Callable[[], Any],
    steps: int = 3,
    double: bool = True,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Compare the first `steps` training steps of `train` with one process; the same report on every rank.

    `train()` is the whole training as a script has it: `hp.init`, `hp.parallelize`, batches, `train_step`, optimizer
    steps. It is called up to three times and left after the steps. `double` runs it in fp64 too. `say` is told what is
    being done, and `keep` the report of each stage, on rank 0.

    Raises ValueError where `train` makes no training step.

    Example:
        >>> def train():                                                              # doctest: +SKIP
        ...     mesh = hp.init(tensor=2)
        ...     model = hp.parallelize(GPT(...), mesh, loss=hp.CrossEntropy())
        ...     optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters()), model)
        ...     for batch in hp.DataLoader(dataset, mesh, batch_size=16):
        ...         model.train_step(batch, microbatches=4)
        ...         optimizer.step(); optimizer.zero_grad()
        >>> assert hp.verify(train).equal                                             # doctest: +SKIP
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: there must be at least 1 to compare")
    return _Verification(train, steps, double, say, keep).report()


class _Verification:
    """The runs of one verification."""

    def __init__(
        self,
        train: Callable[[], Any],
        steps: int,
        double: bool,
        say: Callable[[str], None],
        keep: Callable[[Report], None],
    ) -> None:
        self._train, self._steps, self._double, self._say, self._keep = train, steps, double, say, keep
        self._randomness = (torch.get_rng_state(), random.getstate())
        self._noise: Noise = {}
        self._mesh, self._made, self._first = "", 0, False
        self._taken: list[str] = []  # weights that the reference has taken over from the run

    def report(self) -> Report:
        recorder = self._record(Recorder(self._steps), "as it is")
        self._mesh, self._made = str(recorder.model.world.mesh), len(recorder.records)
        if recorder.strayed:
            return self._strayed(recorder)
        notes, exact, masked = _notes(recorder), is_double(recorder), _masked(recorder)
        name = "fp64" if exact else next(iter(recorder.start.values())).dtype.__str__().removeprefix("torch.")
        found = self._compared(recorder, f"as it is ({name})")
        shown, decides, said = rows(name, found), found, not exact and self._double
        if self._taken:
            more = f" and {len(self._taken) - 1} more" if self._taken[1:] else ""
            notes += (f"weights were changed between steps ({self._taken[0]}{more}): the reference took them over",)
        if said:
            self._tell(recorder, Report(self._mesh, self._made, shown, _bare(first(found)), notes))
            again = self._record(Recorder(self._steps, double=True), "in fp64")
            decides = self._compared(again, "in fp64")
            shown = rows(name, found, excused=first(decides) is None) + rows("fp64", decides)
            recorder = again
        wrong = first(decides) or _broken(found)
        finding = masked if wrong is None else self._found(wrong, said and wrong in decides)
        report = Report(self._mesh, self._made, shown, finding, notes)
        self._tell(recorder, report)
        return report

    def _record(self, recorder: Recorder, how: str) -> Recorder:
        if self._first:
            self._say(f"training {how}")
        torch.set_rng_state(self._randomness[0])
        random.setstate(self._randomness[1])
        recorder.record(self._train)
        if recorder.model.on_their_own:
            raise ValueError(
                "verify compares with one process that sees all samples, and this sync policy leaves replicas to "
                'themselves: verify the training with sync="allreduce"'
            )
        self._first = recorder.model.world.rank == 0
        return recorder

    def _compared(self, recorder: Recorder, how: str) -> list[Difference]:
        if self._first:
            self._say(f"the same in one process, {how}")
        feeding = fed(recorder)
        self._taken = list(dict.fromkeys(name for one in feeding for name in one.between.names))
        found = compared(recorder, feeding, self._noise)
        recorder.close()
        return found

    def _tell(self, recorder: Recorder, report: Report) -> None:
        if recorder.model.world.rank == 0:
            self._keep(report)

    def _found(self, wrong: Difference, double: bool) -> Finding:
        """Look at the step of `wrong` module by module."""
        recorder = self._record(
            Recorder(wrong.step + 1, double, watched=wrong.step), f"once more, watching step {wrong.step}"
        )
        differences = compared(recorder, fed(recorder), self._noise)
        here = first(differences)
        if here is None:
            recorder.close()
            return _finding(wrong, Cause("not repeatable", "the difference was gone when the step was run again: "
                            "something in the run is not determined by its seed"), "")  # fmt: skip
        here = _leading(recorder, differences, here)
        known = facts(recorder, differences, here)
        recorder.close()
        return _finding(here, likely(known), _module(known))

    def _strayed(self, recorder: Recorder) -> Report:
        """The ranks could not go on together."""
        recorder.close()
        step = len(recorder.records)
        key = "unequal data order" if "given different" in recorder.strayed else "unequal number of steps"
        cause, kind = recorder.unequal or Cause(key, recorder.strayed), "gradients" if recorder.unequal else "batches"
        sentence = f"The run cannot equal one process: {recorder.strayed}."
        finding = Finding(kind, cause.module or "", step, cause.rank or 0, None, 0.0, 0.0, cause.key, sentence)
        report = Report(self._mesh, step, (), finding, ())
        self._tell(recorder, report)
        return report


def _leading(recorder: Recorder, differences: Sequence[Difference], one: Difference) -> Difference:
    """Of what differs at once the first: of gradients that of the last module, whose backward comes first."""
    order = {name: place for place, name in enumerate(recorder.model._applied.specs)}
    wrong = [d for d in differences if d.order == one.order and not d.excess <= 1]
    sign = -1 if one.kind == GRADIENTS else 1
    return min(wrong, key=lambda d: (sign * order.get(d.name, 0), d.name, -d.excess))


def _module(known: Facts) -> str:
    if known.divergence is not None:
        one = known.divergence
        return one.module if one.forward else one.reader or one.module
    return known.name.rpartition(".")[0]


def _finding(one: Difference, cause: Cause, module: str) -> Finding:
    module = module if cause.module is None else cause.module
    rank = one.rank if cause.rank is None else cause.rank
    where = f"step {one.step}, rank {rank}" + (f", {module}" if module else "")
    where += "" if cause.microbatch is None else f", microbatch {cause.microbatch}"
    what = f"{one.kind} ({one.name})" if one.name else one.kind
    size = f"off by {one.error:.1e} where rounding explains {one.allowed:.1e}"
    if not one.allowed:
        size = f"off by {one.error:.1e}"
    sentence = f"The run differs from one process: {what} in {where}, {size}. Likely cause: {cause.words}."
    return Finding(
        one.kind, module, one.step, rank, cause.microbatch, one.error, one.allowed, cause.key, sentence
    )


def _bare(wrong: Difference | None) -> Finding | None:
    """A difference whose cause has not been looked for yet."""
    cause = Cause("unknown", "not looked for")
    return None if wrong is None else _finding(wrong, cause, wrong.name.rpartition(".")[0])


def _broken(found: Sequence[Difference]) -> Difference | None:
    """A number that is none, which no rounding explains."""
    return first([replace(one, allowed=1e300) for one in found if one.error == float("inf")])


def _masked(recorder: Recorder) -> Finding | None:
    """Dropout masks that are no layout's: samples that share one. Training may equal one process all the same."""
    world = recorder.model.world
    told = world.everyone.objects(recorder.watch.masks)
    masks = [
        Mask(rank, world.mesh.place(rank).data, m.site, m.sample, m.crc, m.length, m.parts, True)
        for rank, part in enumerate(told)
        for m in part
    ]
    cause = same_mask(masks)
    if cause is None:
        return None
    sentence = f"The run equals one process in its numbers and is wrong: {cause.words}."
    return Finding("dropout masks", cause.module, 0, cause.rank, None, 0.0, 0.0, cause.key, sentence)


def _notes(recorder: Recorder) -> tuple[str, ...]:
    """What does not make a run wrong and is seldom meant. All ranks together."""
    world, step = recorder.model.world, recorder.records[0]
    told = world.everyone.objects((world.place.data, fingerprint(step.batch)))
    prints = dict(told)
    notes = []
    if len(set(prints.values())) < len(prints):
        alike = [d for d, one in prints.items() if list(prints.values()).count(one) > 1]
        notes.append(
            f"replicas {', '.join(map(str, alike))} were given the same samples: use hp.DataLoader, or a sampler with "
            "num_replicas=hvd.size() and rank=hvd.rank()"
        )
    if not recorder.optimizers:
        notes.append("no optimizer has stepped: gradients and updates were not compared")
    return tuple(notes)
