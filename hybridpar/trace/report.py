"""What `hybridpar trace --simulate` prints and writes: a schedule's picture and figures, without running it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from hybridpar.pipeline import simulate as simulation
from hybridpar.pipeline.schedule import Schedule, build, read
from hybridpar.trace.chrome import chrome as chrome_of
from hybridpar.trace.spans import Trace
from hybridpar.trace.svg import svg as svg_of
from hybridpar.trace.text import gantt

File = str | PathLike[str] | None


def simulate(
    schedule: str = "1f1b",
    pipeline: int = 4,
    microbatches: int = 8,
    chunks: int = 2,
    svg: File = None,
    chrome: File = None,
    csv: File = None,
    forward: float = 1.0,
    backward: float = 2.0,
    transfer: float = 0.0,
    reduce: float = 0.0,
    width: int = 100,
    colour: bool = False,
) -> str:
    """The text picture of a schedule and its figures; `svg`, `chrome` and `csv` name files to write besides.

    `forward` and `backward` are the seconds that one microbatch takes on a rank, all its stages together, so that
    schedules can be compared; `transfer` those of a message between ranks, `reduce` those of a rank's reduction.
    `chunks` counts for `interleaved` only. A schedule from a `.csv` file has its own ranks and microbatches.
    Raises ValueError on an unknown or wrong schedule and on a file that cannot be written.

    Example:
        >>> print(simulate("gpipe", pipeline=2, microbatches=2).splitlines()[1])
        rank 0 |0---1---            0=======1=======|
    """
    order = _order(schedule, pipeline, microbatches, chunks)
    trace = predict(order, forward, backward, transfer, reduce)
    if svg is not None:
        _write(svg, svg_of(trace, title=_title(order)))
    if chrome is not None:
        _write(chrome, chrome_of(trace))
    if csv is not None:
        _write(csv, order.to_csv())
    return "\n".join([gantt(trace, width=width, colour=colour), f"activations held at most: {_held(order)}"])


def predict(
    schedule: Schedule, forward: float = 1.0, backward: float = 2.0, transfer: float = 0.0, reduce: float = 0.0
) -> Trace:
    """The trace of a schedule whose ranks each take the given seconds per microbatch, spread over their stages."""
    share = [len(schedule.stages_of(rank)) for rank in schedule.stage_ranks]
    even = simulation.Cost.even(schedule.stages, schedule.ranks, transfer=transfer)
    cost = simulation.Cost(
        forward=tuple(forward / n for n in share),
        backward=tuple(backward / n for n in share),
        transfer=even.transfer,
        reduce=tuple(reduce / n for n in share),
    )
    return simulation.simulate(schedule, cost)


def _order(schedule: str, pipeline: int, microbatches: int, chunks: int) -> Schedule:
    if schedule.endswith(".csv"):
        return read(schedule)
    return build(schedule, pipeline, microbatches, chunks if schedule == "interleaved" else 1)


def _write(file: str | PathLike[str], text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror}; name a file in a folder that exists") from None


def _held(schedule: Schedule) -> str:
    return ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(simulation.held(schedule)))


def _title(schedule: Schedule) -> str:
    stages = f", {schedule.stages} stages" if schedule.stages > schedule.ranks else ""
    return f"{schedule.name}: {schedule.microbatches} microbatches on {schedule.ranks} ranks{stages}"
