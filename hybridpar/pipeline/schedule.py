"""Pipeline schedules as data: for each rank of a pipeline the order of its actions.

One value is validated, drawn, simulated, traced and executed. 1F1B of 4 microbatches on 2 ranks:

    rank 0   0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3 0R
    rank 1   1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 1R

`rank` means the index along the pipeline axis here; positions in a row count from 0.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hybridpar.pipeline.action import Action, Kind
from hybridpar.pipeline.order import replay
from hybridpar.pipeline.weave import rounds, strands, weave, with_reductions

__all__ = ["Action", "Kind", "Schedule", "build", "forward_only", "gpipe", "interleaved", "one_f_one_b", "read"]

Row = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order. `stage_ranks[s]` is the pipeline index that holds stage s.

    Example:
        >>> print(one_f_one_b(ranks=2, microbatches=2))
        1f1b: 2 ranks, 2 stages, 2 microbatches
        rank 0   0F0 0F1 0B0 0B1 0R
        rank 1   1F0 1B0 1F1 1B1 1R
    """

    name: str
    microbatches: int
    stage_ranks: tuple[int, ...]
    actions: tuple[Row, ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.stage_ranks)

    @cached_property
    def forward_only(self) -> bool:
        """Whether there is no backward: a schedule for evaluation."""
        return all(action.kind is Kind.FORWARD for row in self.actions for action in row)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages held at pipeline index `rank`, in order."""
        return tuple(stage for stage, home in enumerate(self.stage_ranks) if home == rank)

    def evaluation(self) -> Schedule:
        """The same schedule with its forwards only."""
        rows = tuple(tuple(action for action in row if action.kind is Kind.FORWARD) for row in self.actions)
        return replace(self, actions=rows)

    def validate(self) -> Schedule:
        """This schedule, if it can be executed.

        Raises ValueError where an action is missing, doubled, misplaced or too early, or where ranks
        would wait for one another in a circle; the sentence names the rank, the position and the action.
        """
        try:
            self._check_stages()
            done: dict[Action, tuple[int, int]] = {}
            for rank, row in enumerate(self.actions):
                for position, action in enumerate(row):
                    self._check_action(rank, position, action, done)
                    done[action] = (rank, position)
            self._check_complete(done)
            for _ in replay(self.actions, self.stages, self.microbatches):
                pass
        except ValueError as error:
            raise ValueError(f"schedule {self.name}: {error}") from None
        return self

    def _check_stages(self) -> None:
        if self.microbatches < 1 or not self.stages:
            raise ValueError(f"{self.stages} stages and {self.microbatches} microbatches; have 1 or more of each")
        for stage, rank in enumerate(self.stage_ranks):
            if not 0 <= rank < self.ranks:
                raise ValueError(f"stage {stage} is held by rank {rank}, and the ranks are 0 to {self.ranks - 1}")
        for rank in range(self.ranks):
            if not self.stages_of(rank):
                raise ValueError(f"rank {rank} holds no stage; give it one or use fewer ranks")

    def _check_action(self, rank: int, position: int, action: Action, done: dict[Action, tuple[int, int]]) -> None:
        where = f"rank {rank}, position {position}, {action}"
        if not 0 <= action.stage < self.stages:
            raise ValueError(f"{where}: there are stages 0 to {self.stages - 1} only")
        if self.stage_ranks[action.stage] != rank:
            raise ValueError(f"{where}: stage {action.stage} is held by rank {self.stage_ranks[action.stage]}")
        if action in done:
            raise ValueError(f"{where}: it was done already at position {done[action][1]}")
        if action.kind is Kind.REDUCE:
            return self._check_reduce(where, action, done)
        if action.micro is None or not 0 <= action.micro < self.microbatches:
            raise ValueError(f"{where}: there are microbatches 0 to {self.microbatches - 1} only")
        if action.kind is Kind.BACKWARD and Action(Kind.FORWARD, action.stage, action.micro) not in done:
            raise ValueError(f"{where}: its forward {action.stage}F{action.micro} does not come before it")

    def _check_reduce(self, where: str, action: Action, done: dict[Action, tuple[int, int]]) -> None:
        if action.micro is not None:
            raise ValueError(f"{where}: a reduction is of a whole stage, write {action.stage}R")
        row = self.actions[self.stage_ranks[action.stage]]
        for backward in action.needs(self.stages, self.microbatches):
            if backward not in done and backward in row:  # one that is nowhere is named as missing, later
                raise ValueError(f"{where}: the backward {backward} does not come before it")

    def _check_complete(self, done: dict[Action, tuple[int, int]]) -> None:
        for stage, rank in enumerate(self.stage_ranks):
            micros = range(self.microbatches)
            wanted = [Action(Kind.FORWARD, stage, micro) for micro in micros]
            if not self.forward_only:
                wanted += [Action(Kind.BACKWARD, stage, micro) for micro in micros] + [Action(Kind.REDUCE, stage)]
            for action in wanted:
                if action not in done:
                    raise ValueError(f"rank {rank}: {action} is missing from its row")

    def to_csv(self) -> str:
        """One line per rank, its actions in order, with commas between them."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.actions)

    @classmethod
    def from_csv(cls, text: str, name: str = "custom") -> Schedule:
        """The validated schedule of a text as `to_csv` writes it.

        Empty cells are passed over. torch's cells are the same without R: where no R is written, one follows the
        last backward of each stage. A text without B is a schedule for evaluation. Raises ValueError
        on an unknown cell, naming its row and column (from 1), and whatever `validate` refuses.
        """
        rows = tuple(_row(name, i, cells) for i, cells in enumerate(csv.reader(text.rstrip().splitlines()), start=1))
        cells = [(rank, action) for rank, row in enumerate(rows) for action in row]
        homes: dict[int, int] = {}
        for rank, action in cells:
            homes.setdefault(action.stage, rank)
        stages = max(homes, default=-1) + 1
        if len(homes) < stages:
            gone = next(stage for stage in range(stages) if stage not in homes)
            raise ValueError(f"schedule {name}: no rank does stage {gone}, and the last stage is {stages - 1}")
        if not any(action.kind is Kind.REDUCE for _, action in cells):
            rows = tuple(with_reductions(row) for row in rows)
        microbatches = 1 + max((action.micro for _, action in cells if action.micro is not None), default=-1)
        return cls(name, microbatches, tuple(homes[stage] for stage in range(stages)), rows).validate()

    def __str__(self) -> str:
        head = f"{self.name}: {self.ranks} ranks, {self.stages} stages, {self.microbatches} microbatches"
        rows = (f"rank {rank}   {' '.join(map(str, row))}" for rank, row in enumerate(self.actions))
        return "\n".join((head, *rows))


def _row(name: str, number: int, cells: list[str]) -> Row:
    row = []
    for column, cell in enumerate(cells, start=1):
        try:
            row += [Action.parse(cell.strip())] if cell.strip() else []
        except ValueError as error:
            raise ValueError(f"schedule {name}, row {number}, column {column}: {error}") from None
    return tuple(row)


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards; a rank holds every microbatch's activations (Huang et al. 2019)."""
    return _woven("gpipe", ranks, microbatches, 1, lambda p: microbatches)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """A backward as soon as one can run: rank p holds at most P - p activations (Narayanan et al. 2019)."""
    return _woven("1f1b", ranks, microbatches, 1, lambda p: ranks - 1 - p)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with `chunks` stages per rank, stage s on rank s % ranks: a smaller bubble, more messages.

    Any number of microbatches will do (see `weave`). Each rank starts one more forward ahead per rank that
    follows it than 1F1B does, so messages travel while it computes (Narayanan et al. 2021, section 2.2).
    """
    def warmup(p: int) -> int:
        return 2 * (ranks - 1 - p) + (chunks - 1) * len(rounds(ranks, microbatches)[0])

    return _woven("interleaved", ranks, microbatches, chunks, warmup)


def forward_only(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The forwards alone, for evaluation."""
    return _woven("forward", ranks, microbatches, chunks, lambda p: 0).evaluation()


def build(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule called `gpipe`, `1f1b` or `interleaved`, or the one in a file whose name ends in `.csv`.

    `chunks` is the number of stages per rank; gpipe and 1f1b have one. Raises ValueError on an unknown name
    and on a file that is for other numbers.

    Example:
        >>> build("interleaved", ranks=2, microbatches=4, chunks=2).stage_ranks
        (0, 1, 0, 1)
    """
    if name.endswith(".csv"):
        schedule = read(name)
        if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
            raise ValueError(
                f"schedule {name} is for {schedule.ranks} ranks and {schedule.microbatches} microbatches, "
                f"and {ranks} ranks with {microbatches} microbatches were asked for"
            )
        return schedule
    match name:
        case "gpipe" | "1f1b" if chunks != 1:
            raise ValueError(f"{name} has 1 stage per rank and chunks={chunks} was asked for; use interleaved")
        case "gpipe":
            return gpipe(ranks, microbatches)
        case "1f1b":
            return one_f_one_b(ranks, microbatches)
        case "interleaved":
            return interleaved(ranks, microbatches, chunks)
    raise ValueError(f"no schedule is called {name!r}; take gpipe, 1f1b, interleaved or a file that ends in .csv")


def read(path: str) -> Schedule:
    """The validated schedule in a CSV file. Raises ValueError where it cannot be read or executed."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # as spreadsheets write it
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"schedule {path} cannot be read: {error}") from None
    return Schedule.from_csv(text, path)


def _woven(name: str, ranks: int, microbatches: int, chunks: int, warmup: Callable[[int], int]) -> Schedule:
    for what, count in (("ranks", ranks), ("microbatches", microbatches), ("chunks", chunks)):
        if count < 1:
            raise ValueError(f"{name} with {what}={count}: there must be 1 or more")
    rows = tuple(weave(*strands(p, ranks, microbatches, chunks), warmup(p)) for p in range(ranks))
    return Schedule(name, microbatches, tuple(s % ranks for s in range(ranks * chunks)), rows)
