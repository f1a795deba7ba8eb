"""One rank of a candidate: builds its side, then trains whenever the driver asks and sleeps in between.

    driver                          rank
           <-- hello: rank, pid
           --> steps: 3                    barrier, 3 steps under the clock
           <-- seconds, losses, ...
           --> (closed)                    exit

One JSON value per line over a Unix socket. A rank that waits is blocked in `readline`, outside MPI and gloo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from benchmarks.bound import die_with_parent
from benchmarks.side import Seat, Side
from benchmarks.work import Work


def main() -> None:
    parser = argparse.ArgumentParser(description="One rank of a benchmark candidate; started by benchmarks.compare.")
    for name in ("builder", "work", "socket", "meeting"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("rank", "ranks", "threads"):
        parser.add_argument(f"--{name}", required=True, type=int)
    given = parser.parse_args()
    die_with_parent()
    torch.set_num_threads(given.threads)
    work = Work.from_json(given.work)
    module, function = given.builder.split(":")
    build = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    side = build(work, Seat(given.rank, given.ranks, Path(given.meeting)))
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(given.socket)
        with wire.makefile("rw") as lines:
            serve(side, work.batches(), lines)


def serve(side: Side, batches: Iterator[tuple[Tensor, Tensor]], lines: TextIO) -> None:
    """Answer the driver's requests until it closes the socket."""
    say(lines, {"rank": side.rank, "pid": os.getpid()})
    for line in lines:
        ready = [next(batches) for _ in range(json.loads(line)["steps"])]
        side.barrier()
        begin = _clocks()
        losses = [side.step(ids, targets) for ids, targets in ready]
        seconds, cpu, main_cpu = (after - before for before, after in zip(begin, _clocks()))
        told = {"seconds": seconds, "cpu_seconds": cpu, "main_cpu_seconds": main_cpu, "losses": losses}
        say(lines, {**told, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def _clocks() -> tuple[float, float, float]:
    """Seconds on the wall, of CPU in all threads, of CPU in this one (which also runs the backward pass)."""
    return time.perf_counter(), time.process_time(), time.thread_time()


def say(lines: TextIO, value: object) -> None:
    lines.write(json.dumps(value) + "\n")
    lines.flush()


if __name__ == "__main__":
    main()
