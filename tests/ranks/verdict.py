"""What the ranks reported of one test, as the reports that pytest shows: those of one rank.

    a rank failed              the first to fail, and what the others did meanwhile
    the launch ended           which ranks had not finished, where they were, and what mpirun said
    the time is over           where each rank waits
    some skipped, some passed  a failure: a test skips everywhere or nowhere
    else                       rank 0's
"""

from __future__ import annotations

import pytest

from tests.ranks.launch import Run


def merged(config: pytest.Config, item: pytest.Item, run: Run) -> list[pytest.TestReport]:
    """The reports of `run`."""
    failed = [rank for rank, record in run.ended.items() if record["outcome"] == "failed"]
    if failed:
        first = min(failed, key=lambda rank: (run.ended[rank]["seconds"], rank))
        return _of_rank(config, run, first, f"rank {first} of {run.size} failed first{_others(run, first)}")
    if run.crash:
        return [refused(item, f"The launch ended under the test: {run.crash.rstrip()}{_others(run)}")]
    if len(run.ended) == run.size and len({record["outcome"] for record in run.ended.values()}) == 1:
        return _of_rank(config, run, 0)
    if any(record["outcome"] == "skipped" for record in run.ended.values()):
        return [refused(item, f"A test skips on all of its {run.size} ranks or on none{_others(run)}")]
    late = f"{len(run.waiting)} of {run.size} ranks wait"
    return [refused(item, f"Not done after {run.timeout:g} s, {late}{_others(run)}")]


def refused(item: pytest.Item, text: str) -> pytest.TestReport:
    """A failure of `item` that no rank could report itself."""
    keywords = {name: 1 for name in item.keywords}
    return pytest.TestReport(item.nodeid, item.location, keywords, "failed", text, "call")


def _of_rank(config: pytest.Config, run: Run, rank: int, note: str = "") -> list[pytest.TestReport]:
    reports = [
        config.hook.pytest_report_from_serializable(config=config, data=data) for data in run.ended[rank]["reports"]
    ]
    for report in reports:
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # a skip's place and reason; JSON has no tuples
        if report.failed and note:
            if hasattr(report.longrepr, "addsection"):
                report.longrepr.addsection("ranks", note)
            else:
                report.longrepr = f"{report.longrepr}\n{note}"
    return reports


def _others(run: Run, but: int | None = None) -> str:
    """A paragraph per rank: where it waits or how it ended, and the last it printed."""
    text = ""
    for rank in range(run.size):
        if rank == but:
            continue
        if rank in run.ended:
            text += f"\n\nrank {rank} {run.ended[rank]['outcome']}"
        elif run.waiting[rank]:
            text += f"\n\nrank {rank} was at\n" + _indented(run.waiting[rank])
        elif not run.crash:
            text += f"\n\nrank {rank} did not say where it was"
        if run.printed[rank] and rank not in run.ended:
            text += f"\n\nrank {rank} had printed\n" + _indented(run.printed[rank])
    return text


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
