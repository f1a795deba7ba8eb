"""Launches of candidates: started once, stopped while others run, asked for a few steps when it is their turn.

    start --> rounds of (resume, run warm-up steps, run timed steps, pause) --> close

A paused launch has all its ranks stopped (SIGSTOP), background threads included, so it costs the others nothing.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.candidates import Candidate
from benchmarks.machine import busy_seconds, cores, environment
from benchmarks.work import Work
from hybridpar.install import mpi

START_SECONDS, TURN_SECONDS, END_SECONDS = 300, 600, 10  # how long to wait for a start, a turn, an end


@dataclass(frozen=True)
class Turn:
    """What one request gave: the slowest rank's seconds; CPU seconds of all ranks, of their main threads alone, and of
    everything else on the machine."""

    steps: int
    seconds: float
    cpu_seconds: float
    main_cpu_seconds: float
    other_cpu_seconds: float
    losses: tuple[float, ...]
    peak_mb: float

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def others(self) -> float:
        """The share of the cores that went to processes outside the benchmark."""
        return self.other_cpu_seconds / (self.seconds * cores())


class Launch:
    """The running ranks of one candidate. RuntimeError, with the end of its log, when a rank ends or hangs."""

    def __init__(self, candidate: Candidate, work: Work, folder: Path) -> None:
        self.candidate = candidate
        self._log = folder / f"{candidate.name}.log"
        address = str(folder / f"{candidate.name}.socket")
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(address)
        self._door.listen()
        self._processes: list[subprocess.Popen] = []
        self._wires: list[socket.socket] = []
        self._lines: list[TextIO] = []
        self._pids: list[int] = []
        arguments = _arguments(candidate, work, address, folder)
        with self._log.open("w") as log:
            for command in _commands(candidate, arguments):
                started = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(candidate),
                    start_new_session=True,  # Ctrl-C ends the rounds, not the ranks
                )  # fmt: skip
                self._processes.append(started)

    def greet(self) -> None:
        """Wait until all ranks have built their side."""
        deadline = time.monotonic() + START_SECONDS
        for _ in range(self.candidate.ranks):
            self._await(self._door, deadline)
            wire, _ = self._door.accept()
            self._wires.append(wire)
            self._lines.append(wire.makefile("r"))
            self._pids.append(json.loads(self._hear(self._lines[-1], deadline))["pid"])

    def run(self, steps: int) -> Turn:
        """Train for `steps` more steps."""
        others = busy_seconds()
        for wire in self._wires:
            wire.sendall(json.dumps({"steps": steps}).encode() + b"\n")
        deadline = time.monotonic() + TURN_SECONDS
        told = [json.loads(self._hear(lines, deadline)) for lines in self._lines]
        cpu = sum(rank["cpu_seconds"] for rank in told)
        return Turn(
            steps=steps,
            seconds=max(rank["seconds"] for rank in told),
            cpu_seconds=cpu,
            main_cpu_seconds=sum(rank["main_cpu_seconds"] for rank in told),
            other_cpu_seconds=max(busy_seconds() - others - cpu, 0.0),
            losses=tuple(map(_mean, zip(*(rank["losses"] for rank in told)))),
            peak_mb=max(rank["peak_mb"] for rank in told),
        )

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the ranks: kindly, then not."""
        self.resume()
        for closing in (*self._lines, *self._wires):
            closing.close()
        self._door.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1) if self._lines else 0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _hear(self, lines: TextIO, deadline: float) -> str:
        self._await(lines, deadline)
        line = lines.readline()
        if not line:
            raise self._failure("ended in the middle of a turn")
        return line

    def _await(self, source: Any, deadline: float) -> None:
        while not select.select([source], [], [], 0.2)[0]:
            if any(process.poll() for process in self._processes):
                raise self._failure("failed")
            if time.monotonic() > deadline:
                raise self._failure("did not answer in time")

    def _failure(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self.candidate.name} {what}; the end of its log:\n{_tail(self._log)}")


def _arguments(candidate: Candidate, work: Work, address: str, folder: Path) -> list[str]:
    given = {
        "builder": candidate.builder,
        "work": work.to_json(),
        "socket": address,
        "meeting": folder / f"{candidate.name}.meeting",
        "ranks": candidate.ranks,
        "threads": cores() if candidate.all_cores else 1,
    }
    return [sys.executable, "-m", "benchmarks.rank", *(f"--{name}={value}" for name, value in given.items())]


def _commands(candidate: Candidate, arguments: list[str]) -> list[list[str]]:
    """One command per rank, or one mpirun that starts them all."""
    if candidate.launcher == "python":
        return [[*arguments, f"--rank={rank}"] for rank in range(candidate.ranks)]
    bound = [sys.executable, "-m", "benchmarks.bound"]
    return [[*bound, *mpi.mpirun(candidate.ranks, [*arguments, "--rank=-1"])]]


def _environment(candidate: Candidate) -> dict[str, str]:
    threads = str(cores() if candidate.all_cores else 1)
    here = str(Path(__file__).parent.parent)
    own = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
    return {**mpi.settings(os.environ, *environment()), **own}


def _mean(losses: tuple[float | None, ...]) -> float:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known)


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
