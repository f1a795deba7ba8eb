"""Traces as Chrome trace JSON, for https://ui.perfetto.dev and chrome://tracing.

Each trace is a process, each rank two threads: its work, and the reductions that go on beside it.
"""

from __future__ import annotations

import json
from typing import Any

from hybridpar.trace.spans import Span, Trace

KINDS = {"F": "forward", "B": "backward", "R": "reduce"}


def chrome(*traces: Trace) -> str:
    """The traces as JSON text; times are in microseconds, as the format wants them.

    Example:
        >>> text = chrome(Trace((Span(0, "F", 0, 3, 0.0, 1.0),), "one forward"))
        >>> json.loads(text)["traceEvents"][-1]["name"]
        '0F3'
    """
    events = [event for process, trace in enumerate(traces) for event in _events(process, trace)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _events(process: int, trace: Trace) -> list[dict[str, Any]]:
    spans = trace.from_zero().spans
    events = [_name("process_name", process, 0, trace.name)]
    threads = sorted({(span.rank, span.kind == "R") for span in spans})
    events += [
        _name("thread_name", process, _thread(rank, beside), f"rank {rank}{' reduce' if beside else ''}")
        for rank, beside in threads
    ]
    return events + [_event(process, span) for span in spans]


def _event(process: int, span: Span) -> dict[str, Any]:
    return {
        "name": f"{span.stage}{span.kind}{'' if span.micro is None else span.micro}",
        "cat": KINDS.get(span.kind, span.kind),
        "ph": "X",
        "ts": span.start * 1e6,
        "dur": span.seconds * 1e6,
        "pid": process,
        "tid": _thread(span.rank, span.kind == "R"),
        "args": {"stage": span.stage, "micro": span.micro},
    }


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _thread(rank: int, beside: bool) -> int:
    return 2 * rank + beside
