"""A server of weights: this rank's piece of them, which workers add to and read, each at its own pace.

    worker w    what it moved, its clock -->  piece += moved, clock of w = its clock
                <-- piece, clocks             as soon as no worker is more than `staleness` steps behind that clock

A thread receives and answers, so that nobody waits for what this rank computes, and sends and takes answers for this
rank's worker, so that the worker does not wait for a slow link either:

    worker      step | step | step | step | step | ...        goes on with the last answer and what it moved since
    link        [1 ------------][1][2 3 4 ---------][4] ...   one letter at a time: what moves meanwhile goes together

It stops only where the last answers are older than the bound allows. Ho et al. 2013, More Effective Distributed ML via
a Stale Synchronous Parallel Parameter Server, https://papers.nips.cc/paper/4894: bound and cache are its SSP, reads of
one's own writes included; Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server: servers
sharded over machines.
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
    """The last number of what a worker sends; the one before it is its clock."""

    MOVED = 0
    RESTS = 1  # it sends nothing until all meet: nobody waits for it
    LEAVES = 2


class _Copy:
    """What this rank's worker knows of another's server: its last answer, and what it has not heard of then."""

    def __init__(self, weights: Tensor, workers: int) -> None:
        self.weights, self.clocks = weights.clone(), [0] * workers
        self.sent, self.unsent = torch.zeros_like(weights), torch.zeros_like(weights)
        self.answer: Handle | None = None  # that of the letter under way

    def now(self) -> Tensor:
        return self.weights + self.sent + self.unsent


class Server:
    """Piece `axis.index` of `pieces`, each [n], for the workers along `axis`, which is used by nothing else.

    Example:
        >>> server = Server(axis, torch.zeros(8).chunk(2), staleness=2)     # doctest: +SKIP
        >>> weights, clocks = server.exchange(moved.chunk(2))               # doctest: +SKIP
    """

    def __init__(self, axis: Axis, pieces: Sequence[Tensor], staleness: int) -> None:
        self._axis, self._staleness, self._others = axis, staleness, [w for w in range(axis.size) if w != axis.index]
        self._change = threading.Condition(threading.RLock())
        self._sent: list[Handle] = []
        self._hurry = False  # this rank's worker waits
        self.reset(pieces)
        self._letters = {w: self._weights.new_empty(len(self._weights) + 2) for w in self._others}
        self._requests = {w: axis.recv(letter, w, _PUSH) for w, letter in self._letters.items()}
        self._thread = threading.Thread(target=self._serve, name="hybridpar-server", daemon=True)
        self._thread.start()

    # ---- as this rank's worker sees it

    def exchange(self, moved: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
        """This rank's worker has moved by `moved`, a piece for each server: return the weights as far as they are known
        here, and the clocks of the workers [server, worker] in them, as soon as the bound allows it."""
        mine = self._axis.index
        with self._change:
            self._weights.add_(moved[mine])
            self._clocks[mine] += 1
            for w, copy in self._copies.items():
                copy.unsent.add_(moved[w])
                self._post(w)
            self._answer()
            self._hurry = True
            self._change.wait_for(self._fresh)
            self._hurry = False
            pieces = {mine: self._weights.clone(), **{w: copy.now() for w, copy in self._copies.items()}}
            clocks = {mine: list(self._clocks), **{w: list(copy.clocks) for w, copy in self._copies.items()}}
            for seen in clocks.values():
                seen[mine] = self._clocks[mine]  # its own steps are in each piece, answered or not
            return torch.cat([pieces[w] for w in sorted(pieces)]), [clocks[w] for w in sorted(clocks)]

    def rest(self) -> None:
        """This rank's worker sends nothing until it is told to begin anew: others need not wait for it."""
        self._tell(_Note.RESTS)

    def all_rest(self) -> None:
        """Return when all workers rest: nothing that they sent is under way to this server, and no answer to us."""
        with self._change:
            self._hurry = True
            self._change.wait_for(lambda: all(self._resting) and not self._awaited())
            self._hurry = False

    def look(self) -> Tensor:
        """The piece as it is now."""
        with self._change:
            return self._weights.clone()

    def reset(self, pieces: Sequence[Tensor]) -> None:
        """Begin anew from the weights `pieces`; all servers do so while all workers rest."""
        with self._change:
            self._weights = pieces[self._axis.index].clone()
            self._copies = {w: _Copy(pieces[w], self._axis.size) for w in self._others}
            self._clocks, self._resting = [0] * self._axis.size, [False] * self._axis.size
            self._waiting: dict[int, int] = {}  # worker -> the clock of its letter

    def leave(self) -> None:
        """Serve until all workers have left, this rank's with this call."""
        self._tell(_Note.LEAVES)
        self._thread.join()
        for handle in self._sent:
            handle.wait()

    # ---- the thread

    def _serve(self) -> None:
        pause = _QUICK_SECONDS
        while self._requests or self._awaited():
            with self._change:
                received = self._received() + self._answered()
                self._answer()
                hurry = self._hurry
            pause = _QUICK_SECONDS if received else min(1.5 * pause, _SLOW_SECONDS / 8 if hurry else _SLOW_SECONDS)
            time.sleep(pause)

    def _received(self) -> int:
        """Take the letters that have come; how many."""
        arrived = [w for w, request in self._requests.items() if request.done()]
        for w in arrived:
            letter = self._requests[w].wait()
            clock, note = int(letter[-2]), _Note(int(letter[-1]))
            self._weights.add_(letter[:-2])
            self._clocks[w] = clock
            if note is _Note.MOVED:
                self._waiting[w] = clock
            else:
                self._resting[w] = True
            if note is _Note.LEAVES:
                del self._requests[w]
            else:
                self._requests[w] = self._axis.recv(self._letters[w], w, _PUSH)
        self._sent = [handle for handle in self._sent if not handle.done()]
        return len(arrived)

    def _answered(self) -> int:
        """Take the answers that have come to this rank's worker, and send what it has moved since; how many."""
        arrived = [w for w, copy in self._copies.items() if copy.answer is not None and copy.answer.done()]
        for w in arrived:
            copy = self._copies[w]
            assert copy.answer is not None
            copy.weights, clocks = copy.answer.wait().split([len(copy.weights), self._axis.size])
            copy.clocks, copy.answer = [int(clock) for clock in clocks], None
            copy.sent.zero_()
            self._post(w)
        return len(arrived)

    def _answer(self) -> None:
        """Answer those whom the bound allows to go on, and those that need no answer but await one."""
        least = self._least(self._clocks)
        for w, clock in sorted(self._waiting.items()):
            if clock - least > self._staleness and not self._resting[w]:
                continue
            del self._waiting[w]
            told = torch.cat([self._weights, self._weights.new_tensor(self._clocks)])
            self._sent.append(self._axis.send(told, w, _ANSWER))
        self._change.notify_all()

    # ---- both, holding the lock

    def _fresh(self) -> bool:
        """Whether what is known here is no older than the bound allows this rank's worker."""
        mine = self._clocks[self._axis.index]
        known = [self._clocks, *(copy.clocks for copy in self._copies.values())]
        return all(mine - self._least(clocks) <= self._staleness for clocks in known)

    def _least(self, clocks: Sequence[int]) -> float:
        """The clock of the slowest worker, of the others that do not rest; our own is known better than `clocks` do."""
        behind = [clock for w, clock in enumerate(clocks) if w != self._axis.index and not self._resting[w]]
        if not self._resting[self._axis.index]:
            behind.append(self._clocks[self._axis.index])
        return min(behind, default=float("inf"))

    def _post(self, w: int) -> None:
        """Send server `w` what was moved, unless a letter is under way or nothing was."""
        copy, mine = self._copies[w], self._axis.index
        if copy.answer is not None or self._resting[mine] or copy.clocks[mine] == self._clocks[mine]:
            return
        copy.answer = self._axis.recv(copy.weights.new_empty(len(copy.weights) + self._axis.size), w, _ANSWER)
        self._send(w, _Note.MOVED)

    def _tell(self, note: _Note) -> None:
        """Send all other servers what they have not got yet, and `note`."""
        with self._change:
            for w in self._others:
                self._send(w, note)
            self._resting[self._axis.index] = True
            self._answer()

    def _send(self, w: int, note: _Note) -> None:
        copy = self._copies[w]
        tail = copy.unsent.new_tensor([float(self._clocks[self._axis.index]), float(note)])
        self._sent.append(self._axis.send(torch.cat([copy.unsent, tail]), w, _PUSH))
        copy.sent.add_(copy.unsent)
        copy.unsent.zero_()

    def _awaited(self) -> bool:
        return any(copy.answer is not None for copy in self._copies.values())
