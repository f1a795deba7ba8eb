"""A server of weights: this rank's piece of them, which workers add to and read, each at its own pace.

    worker w    what it moved -->  piece += moved, clock of w += 1
                <-- piece, clocks  as soon as no worker is more than `staleness` steps behind w

A thread receives and answers, so that nobody waits for what this rank computes. Ho et al. 2013, More Effective
Distributed ML via a Stale Synchronous Parallel Parameter Server, https://papers.nips.cc/paper/4894: the bound is its
SSP; Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server: servers sharded over machines.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridpar.wires.axis import Axis, Handle

_PUSH, _ANSWER = 1, 2  # tags
_QUICK_SECONDS, _SLOW_SECONDS = 1e-4, 2e-3


class _Note(enum.IntEnum):
    """The last number of what a worker sends."""

    MOVED = 0
    RESTS = 1  # it sends nothing until all meet: nobody waits for it
    LEAVES = 2


class Server:
    """Piece `axis.index` of `pieces`, each [n], for the workers along `axis`, which is used by nothing else.

    Example:
        >>> server = Server(axis, torch.zeros(8).chunk(2), staleness=2)     # doctest: +SKIP
        >>> weights, clocks = server.exchange(moved.chunk(2))               # doctest: +SKIP
    """

    def __init__(self, axis: Axis, pieces: Sequence[Tensor], staleness: int) -> None:
        self._axis, self._staleness = axis, staleness
        self._weights = pieces[axis.index].clone()
        self._lengths = {w: len(piece) for w, piece in enumerate(pieces) if w != axis.index}
        self._clocks, self._resting = [0] * axis.size, [False] * axis.size
        self._waiting: set[int] = set()
        self._change = threading.Condition(threading.RLock())
        self._sent: list[Handle] = []
        self._notes: list[Handle] = []
        self._letters = {w: self._weights.new_empty(len(self._weights) + 1) for w in self._lengths}
        self._requests = {w: axis.recv(letter, w, _PUSH) for w, letter in self._letters.items()}
        self._thread = threading.Thread(target=self._serve, name="hybridpar-server", daemon=True)
        self._thread.start()

    # ---- as this rank's worker sees it

    def exchange(self, moved: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
        """Send each server its piece of what this rank's worker `moved`, and return the weights as they are then, and
        the clocks of the workers at each server: as soon as the bound allows it."""
        answers = {w: self._axis.recv(self._weights.new_empty(n + self._axis.size), w, _ANSWER)
                   for w, n in self._lengths.items()}  # fmt: skip
        sent = [self._send(w, moved[w], _Note.MOVED) for w in answers]
        told = {self._axis.index: self._own(moved[self._axis.index])}
        for w, letter in answers.items():
            told[w] = letter.wait().split([self._lengths[w], self._axis.size])
        for handle in sent:
            handle.wait()
        several = [told[w] for w in range(self._axis.size)]
        return torch.cat([piece for piece, _ in several]), [[int(c) for c in clocks] for _, clocks in several]

    def _own(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        mine = self._axis.index
        with self._change:
            self._add(mine, moved)
            self._answer()
            self._change.wait_for(lambda: mine not in self._waiting)
            return self._weights.clone(), torch.tensor(self._clocks)

    def rest(self) -> None:
        """This rank's worker sends nothing until it is told to begin anew: others need not wait for it."""
        with self._change:
            self._resting[self._axis.index] = True
            self._answer()
        self._notes = [note for note in self._notes if not note.done()] + self._tell(_Note.RESTS)

    def all_rest(self) -> None:
        """Return when all workers rest: nothing that they sent is under way to this server."""
        with self._change:
            self._change.wait_for(lambda: all(self._resting))

    def look(self) -> Tensor:
        """The piece as it is now."""
        with self._change:
            return self._weights.clone()

    def reset(self, weights: Tensor) -> None:
        """Begin anew from `weights` [n]; all servers do so while all workers rest."""
        with self._change:
            self._weights.copy_(weights)
            self._clocks, self._resting = [0] * self._axis.size, [False] * self._axis.size

    def leave(self) -> None:
        """Serve until all workers have left, this rank's with this call."""
        notes = self._tell(_Note.LEAVES)
        self._thread.join()
        for note in [*notes, *self._sent, *self._notes]:
            note.wait()

    # ---- the thread

    def _serve(self) -> None:
        pause = _QUICK_SECONDS
        while self._requests:
            with self._change:
                received = self._received()
                self._answer()
            pause = _QUICK_SECONDS if received else min(1.5 * pause, _SLOW_SECONDS)
            time.sleep(pause)

    def _received(self) -> bool:
        """Take what has come; whether something has."""
        arrived = [w for w, request in self._requests.items() if request.done()]
        for w in arrived:
            letter = self._requests[w].wait()
            note = _Note(int(letter[-1]))
            if note is _Note.LEAVES:
                self._resting[w] = True
                del self._requests[w]
                continue
            if note is _Note.RESTS:
                self._resting[w] = True
            else:
                self._add(w, letter[:-1])
            self._requests[w] = self._axis.recv(self._letters[w], w, _PUSH)
        self._sent = [handle for handle in self._sent if not handle.done()]
        return bool(arrived)

    def _add(self, worker: int, moved: Tensor) -> None:
        self._weights.add_(moved)
        self._clocks[worker] += 1
        self._waiting.add(worker)

    def _answer(self) -> None:
        """Answer those whom the bound allows to go on."""
        behind = [clock for clock, rests in zip(self._clocks, self._resting) if not rests]
        for w in sorted(self._waiting):
            if behind and self._clocks[w] - min(behind) > self._staleness:
                continue
            self._waiting.discard(w)
            if w != self._axis.index:
                told = torch.cat([self._weights, self._weights.new_tensor(self._clocks)])
                self._sent.append(self._axis.send(told, w, _ANSWER))
        self._change.notify_all()

    def _tell(self, note: _Note) -> list[Handle]:
        """Begin to send `note` to all other servers."""
        return [self._send(w, self._weights.new_zeros(n), note) for w, n in self._lengths.items()]

    def _send(self, server: int, moved: Tensor, note: _Note) -> Handle:
        return self._axis.send(torch.cat([moved, moved.new_tensor([float(note)])]), server, _PUSH)
