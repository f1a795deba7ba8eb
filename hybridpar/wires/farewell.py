"""A rank that has ended its script waits for the others; who waits for it in vain is told.

    rank 1  ... end of script | leaves -------- answers: gone ---------------
    rank 0  ......... waits for rank 1 -- 10 s: asks ----- 30 s: says so, and ends the job

Leaving early is no error: Horovod and MPI must live until the last rank has ended, which may take it long for good
reasons (it saves the model). It is one where another rank still waits for a message or a collective of the one that has
left. Time alone cannot tell these apart, so each rank watches itself: a thread looks now and then where the others are.
If one has been in a single call into a carrier for long, the ranks that this call needs are asked whether they have
left. A rank that computes, or waits for one that computes, is never ended.

Nothing is sent while all goes well. The messages go by a communicator of their own, and by buffer calls only.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from mpi4py import MPI

from hybridpar.wires import opening, place

_LOOK_SECONDS = 2.0
_ASK_SECONDS = 10.0
_END_SECONDS = 30.0  # one call may take so long to bring what the other sent before it left
_INTERRUPT_SECONDS = 6.0  # for Python to act on Ctrl-C itself
_QUESTION, _GONE = 1, 2  # tags
_FAILED, _INTERRUPTED = 1, 130
_WIRES = os.path.dirname(os.path.abspath(__file__)) + os.sep
_HOROVOD, _DISTRIBUTED = "/horovod/torch/", "/torch/distributed/"


@dataclass
class _Call:
    """A call into a carrier: who is in it, at which instruction of which frame, since when."""

    frame: FrameType | None  # None at the first look: to hold a frame is to hold its tensors
    number: int
    instruction: int
    since: float


class Farewell:
    """Watches this rank's calls from its making on, and lets the rank leave.

    `data_ranks` are those of Horovod's world. `stuck(sentence, place, code)` is called by the watching thread when this
    rank can never go on, and must end the job.
    """

    def __init__(
        self, comm: MPI.Intracomm, data_ranks: tuple[int, ...], stuck: Callable[[str, str, int], None]
    ) -> None:
        self._comm, self._data_ranks, self._stuck = comm.Dup(), data_ranks, stuck
        self._calls: dict[int, _Call] = {}  # by thread
        self._asked: set[int] = set()
        self._gone: set[int] = set()
        self._interrupted: float | None = None
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        with suppress(ValueError):  # not in the main thread: then interrupts stay as they are
            other = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            if other != -1:
                signal.set_wakeup_fd(other)
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="hybridpar-farewell", daemon=True)
        self._watching.start()

    def leave(self) -> None:
        """This rank has ended its script: return when all have. Whoever asks is told that it will send nothing more."""
        self._over.set()
        self._bell.send(b"\0")
        self._watching.join()
        barrier, pause = self._comm.Ibarrier(), 0.001
        while not barrier.Test():
            for asker in self._arrived(_QUESTION):
                self._send(asker, _GONE)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _watch(self) -> None:
        while not self._over.is_set():
            if select.select([self._ear], [], [], _LOOK_SECONDS)[0] and signal.SIGINT in self._ear.recv(64):
                # Python acts on it when the main thread is back from the call that it is in, which may be never.
                self._interrupted = time.monotonic()
            elif not self._over.is_set():
                self._look()

    def _look(self) -> None:
        """Note who is in which call, and act on one that takes long."""
        now, before, self._calls = time.monotonic(), self._calls, {}
        for thread, frame in sys._current_frames().items():
            if not _in_a_carrier(frame):
                continue
            was = before.get(thread)
            same = was is not None and (was.number, was.instruction) == (id(frame), frame.f_lasti)
            # A frame may be a later one in the same place of memory, unless the earlier one is still held.
            since = was.since if same and was.frame is frame else now
            self._calls[thread] = _Call(frame if same else None, id(frame), frame.f_lasti, since)
        for thread, call in self._calls.items():
            if call.frame is not None:
                self._judge(thread, call, now)

    def _judge(self, thread: int, call: _Call, now: float) -> None:
        if self._interrupted is not None and now - self._interrupted > _INTERRUPT_SECONDS:
            began_before = call.since - self._interrupted < 2 * _LOOK_SECONDS
            if began_before and thread == threading.main_thread().ident:
                self._stuck("interrupted while waiting for others", place.of_thread(call.frame), _INTERRUPTED)
        if now - call.since < _ASK_SECONDS:
            return
        needed = self._needed(call.frame) - {self._comm.rank}
        for rank in needed - self._asked:
            self._asked.add(rank)
            self._send(rank, _QUESTION)
        self._gone.update(self._arrived(_GONE))
        gone = sorted(self._gone & needed)
        if gone and now - call.since > _END_SECONDS:
            self._stuck(
                f"this rank has waited {now - call.since:.0f} s for rank {gone[0]}, which has ended its script and can "
                "never come: let all ranks make the same calls, and the same number of steps",
                place.of_thread(call.frame),
                _FAILED,
            )

    def _needed(self, frame: FrameType | None) -> set[int]:
        """The ranks without which the call that `frame` is in cannot end; none where that is not known."""
        path = frame.f_code.co_filename if frame is not None else ""
        while frame is not None and _in_a_carrier(frame):
            ranks = getattr(frame.f_locals.get("self"), "ranks", ())  # an axis, or a handle
            if ranks:
                return set(ranks)
            frame = frame.f_back
        if path == opening.__file__:
            return set(range(self._comm.size))
        return set(self._data_ranks) if _HOROVOD in path else set()

    def _send(self, rank: int, tag: int) -> None:
        self._comm.Isend([bytearray(), MPI.BYTE], rank, tag).Free()  # no bytes: it has left at once

    def _arrived(self, tag: int) -> Iterator[int]:
        """The senders of what has come with `tag`."""
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, tag, status):
            self._comm.Recv([bytearray(), MPI.BYTE], status.source, tag)
            yield status.source


def _in_a_carrier(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path != __file__ and (path.startswith(_WIRES) or _HOROVOD in path or _DISTRIBUTED in path)
