"""`python -m benchmarks.compare`: hybridpar beside torch's own parallelism, all candidates interleaved in one run."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import report, verdict
from benchmarks.candidates import BARS, CANDIDATES, Candidate
from benchmarks.launch import Launch, Turn
from benchmarks.machine import describe
from benchmarks.work import Work

Tell = Callable[[str], None]
DISTURBED = 0.03  # the share of the cores that others may take in a turn

SIZES = {
    "tokens": "In a sample.",
    "batch": "Samples, of all ranks together.",
    "microbatches": "Into which the batch is cut.",
    "seed": "Of weights and tokens.",
}
EXAMPLES = """
\b
Examples:
  python -m benchmarks.compare                                 everything, some minutes
  python -m benchmarks.compare --only limit,data,ddp --rounds 3
  python -m benchmarks.compare --json bench.json --check       exit code 1 where a bar is missed
  python -m benchmarks.compare --markdown > table.md
"""


def compare(
    work: Work, candidates: tuple[Candidate, ...], rounds: int, steps: int, warmup: int, patience: int, tell: Tell
) -> report.Result:
    """Run the candidates in turns and judge them.

    Each round gives every candidate `warmup` steps and then `steps` timed ones, in an order that is turned round
    from one round to the next; a first round is not counted. A turn that other processes disturb is repeated, up to
    `patience` times. A candidate that fails is left out and named in `failures`. Ctrl-C ends the rounds early; only
    whole rounds count.
    """
    turns: dict[str, list[Turn]] = {}
    losses: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    failures: dict[str, str] = {}
    wrong = None
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        launches = _start(candidates, work, stack, failures, tell)
        for number in range(rounds + 1):
            timed = {}
            for name, launch in list(launches.items())[:: 1 if number % 2 else -1]:
                tell(f"round {number} of {rounds}: {name}")
                try:
                    timed[name] = _turn(launch, warmup, steps, patience if number else 0, losses[name])
                except RuntimeError as error:
                    failures[name] = str(error)
                    del launches[name]
                    turns.pop(name, None)
            if number:
                for name, turn in timed.items():
                    turns.setdefault(name, []).append(turn)
            wrong = verdict.disagreement(candidates, losses)
            if wrong:
                break
    seconds = {name: [turn.seconds_per_step for turn in listed] for name, listed in turns.items()}
    outcomes = [] if wrong else verdict.judge(BARS, seconds, work.microbatches)
    return report.Result(work, describe(), candidates, turns, losses, outcomes, failures, wrong)


def _start(
    candidates: tuple[Candidate, ...], work: Work, stack: ExitStack, failures: dict[str, str], tell: Tell
) -> dict[str, Launch]:
    """One after another, so that no start disturbs another; all are left paused."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    launches = {}
    for candidate in candidates:
        tell(f"starting {candidate.name}")
        try:
            launch = Launch(candidate, work, folder)
            stack.callback(launch.close)
            launch.greet()
            launch.pause()
        except RuntimeError as error:
            failures[candidate.name] = str(error)
        else:
            launches[candidate.name] = launch
    return launches


def _turn(launch: Launch, warmup: int, steps: int, patience: int, losses: list[float]) -> Turn:
    """The least disturbed of some attempts; the first undisturbed one ends them."""
    launch.resume()
    attempts: list[Turn] = []
    while not attempts or (attempts[-1].others > DISTURBED and len(attempts) <= patience):
        if warmup:
            losses += launch.run(warmup).losses
        attempts.append(launch.run(steps))
        losses += attempts[-1].losses
    launch.pause()
    return min(attempts, key=lambda turn: turn.others)


def _chosen(_context: click.Context, _option: click.Parameter, names: str | None) -> tuple[Candidate, ...]:
    if not names:
        return CANDIDATES
    known = {candidate.name: candidate for candidate in CANDIDATES}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise click.BadParameter(f"{', '.join(unknown)}: the candidates are {', '.join(known)}")
    return tuple(known[name] for name in known if name in wanted)


def _sizes(command: Callable) -> Callable:
    """One option for each size of the work."""
    for size in reversed(fields(Work)):
        about = SIZES.get(size.name, "Of the model.")
        command = click.option(f"--{size.name}", type=int, default=size.default, show_default=True, help=about)(command)
    return command


@click.command(epilog=EXAMPLES)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Counted rounds.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Timed steps of a turn.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Steps before those, not timed.")
@click.option("--patience", type=click.IntRange(0), default=3, show_default=True, help="Repeats of a disturbed turn.")
@click.option("--only", "candidates", callback=_chosen, metavar="A,B", help="These candidates only.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write all that was measured.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of tables for the terminal.")
@click.option("--check", is_flag=True, help="Exit with 1 where a bar is missed or a candidate fails.")
@_sizes
def main(
    rounds: int,
    steps: int,
    warmup: int,
    patience: int,
    candidates: tuple[Candidate, ...],
    path: Path | None,
    markdown: bool,
    check: bool,
    **sizes: int,
) -> None:
    """Time hybridpar, torch DDP, DTensor and pipelining on the same model and batches, two ranks of one thread each.

    Candidates take turns in one run, and only the one whose turn it is runs. No ratio is printed unless all report
    the same losses.
    """
    try:
        work = Work(**sizes)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("", total=len(candidates) * (rounds + 2))

        def tell(what: str) -> None:
            progress.update(task, description=f"{what:32}", advance=1)

        result = compare(work, candidates, rounds, steps, warmup, patience, tell)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    _show(result, markdown, screen)
    sys.exit(1 if result.disagreement or (check and not result.passed) else 0)


def _show(result: report.Result, markdown: bool, screen: Console) -> None:
    for failure in result.failures.values():
        screen.print(failure, style="red", markup=False, highlight=False)
    if markdown:
        click.echo(report.markdown(result))
        return
    out = Console() if sys.stdout.isatty() else Console(width=120)
    out.print(report.on_terminal(report.speeds(result), "One step"))
    if result.disagreement:
        out.print(f"No ratios: {result.disagreement}.", style="red", markup=False, highlight=False)
    elif result.outcomes:
        out.print(report.on_terminal(report.bars(result), "Bars: times as fast, median of the rounds' ratios"))
    out.print(report.conditions(result), markup=False, highlight=False)


if __name__ == "__main__":
    main()
