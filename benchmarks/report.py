"""The result of a run as tables: on the terminal, in Markdown, in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.table import Table

from benchmarks.candidates import LIMIT, Candidate
from benchmarks.launch import Turn
from benchmarks.verdict import Outcome, Spread, ratios
from benchmarks.work import Work

Grid = tuple[tuple[str, ...], list[tuple[str, ...]]]  # header, rows


@dataclass(frozen=True)
class Result:
    """All that a run found out. `turns[name]` has one turn per round."""

    work: Work
    machine: dict[str, str | int]
    candidates: tuple[Candidate, ...]
    turns: dict[str, list[Turn]]
    losses: dict[str, list[float]]
    outcomes: list[Outcome]
    failures: dict[str, str]
    disagreement: str | None

    def seconds(self, name: str) -> list[float]:
        """Seconds per step, one value per round."""
        return [turn.seconds_per_step for turn in self.turns[name]]

    @property
    def passed(self) -> bool:
        return not self.disagreement and not self.failures and all(outcome.passed for outcome in self.outcomes)

    @property
    def others(self) -> float:
        """The share of the cores that went to processes outside the benchmark, in the worst turn that counts."""
        return max((turn.others for turns in self.turns.values() for turn in turns), default=0.0)

    def to_json(self) -> dict[str, object]:
        """Plain values; every turn is kept, so that other statistics can be taken later."""
        return {
            "machine": self.machine,
            "work": asdict(self.work),
            "candidates": {one.name: one.what for one in self.candidates},
            "seconds_per_step": {name: asdict(Spread.of(self.seconds(name))) for name in self.turns},
            "turns": {name: [asdict(turn) for turn in turns] for name, turns in self.turns.items()},
            "losses": self.losses,
            "bars": [{**asdict(outcome), "passed": outcome.passed} for outcome in self.outcomes],
            "others_at_worst": self.others,
            "failures": self.failures,
            "disagreement": self.disagreement,
        }


def speeds(result: Result) -> Grid:
    """One row per candidate; without ratios where the candidates did not train alike."""
    header = ("", "what", "ms per step", "min - max", "tokens/s", "of the limit", "CPU s", "MB")
    rows = []
    for one in result.candidates:
        if not result.turns.get(one.name):
            rows.append((one.name, one.what, "failed", "", "", "", "", ""))
            continue
        spread, turns = Spread.of(result.seconds(one.name)), result.turns[one.name]
        share = ""
        if result.turns.get(LIMIT) and not result.disagreement:
            share = f"{ratios(result.seconds(one.name), result.seconds(LIMIT)).median:.0%}"
        rows.append((
            one.name,
            one.what,
            f"{spread.median * 1e3:.0f}",
            f"{spread.low * 1e3:.0f} - {spread.high * 1e3:.0f}",
            f"{result.work.batch * result.work.tokens / spread.median:,.0f}",
            share,
            f"{median(turn.cpu_seconds / turn.steps for turn in turns):.2f}",
            f"{turns[-1].peak_mb:.0f}",
        ))  # fmt: skip
    return header, rows


def bars(result: Result) -> Grid:
    """One row per bar."""
    header = ("bar", "speed", "min - max", "needed", "")
    rows = []
    for outcome in result.outcomes:
        bar, ratio = outcome.bar, outcome.ratio
        rival = f"{bar.rival} x bubble" if bar.bubble else bar.rival
        rows.append((
            f"{bar.ours} / {rival}",
            f"{ratio.median:.2f}x",
            f"{ratio.low:.2f} - {ratio.high:.2f}",
            f"{bar.speed:.2f}x",
            "PASS" if outcome.passed else "FAIL",
        ))  # fmt: skip
    return header, rows


def conditions(result: Result) -> str:
    """Work and machine in two lines."""
    work, machine = result.work, result.machine
    rounds = max(map(len, result.turns.values()), default=0)
    steps = max((turns[0].steps for turns in result.turns.values() if turns), default=0)
    return (
        f"GPT {work.width} wide, {work.depth} layers, {work.tokens} tokens, vocabulary {work.vocabulary}, "
        f"batch {work.batch} in {work.microbatches} microbatches, fp32, AdamW; "
        f"{rounds} interleaved round{'s' * (rounds != 1)} of {steps} step{'s' * (steps != 1)}, medians.\n"
        f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, {machine['mpi']}, "
        f"Horovod {machine['horovod']}, Python {machine['python']}, {machine['date']}; "
        f"other processes took {result.others:.0%} of the cores at worst."
    )


def on_terminal(grid: Grid, title: str) -> Table:
    header, rows = grid
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 or name == "what" else "right", no_wrap=name != "what")
    for row in rows:
        table.add_row(*row)
    return table


def in_markdown(grid: Grid) -> str:
    header, rows = grid
    rule = ["---" if place == 0 or name == "what" else "---:" for place, name in enumerate(header)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def markdown(result: Result) -> str:
    """The whole report, to be pasted into a document."""
    parts: Sequence[str] = (conditions(result), in_markdown(speeds(result)))
    if result.disagreement:
        return "\n\n".join((*parts, f"No ratios: {result.disagreement}."))
    return "\n\n".join((*parts, in_markdown(bars(result)))) if result.outcomes else "\n\n".join(parts)
