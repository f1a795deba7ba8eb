"""Ends this rank when a host or a rank falls silent, which MPI would wait for, for ever.

The ranks stand in a ring, each with a TCP connection to the next:

    host a                      host b
    rank 0 ------> rank 1 ----> rank 2 ------> rank 3 ----.
       ^--------------------------------------------------'

    a cut link, a lost host     the kernel finds it: keepalive and TCP_USER_TIMEOUT need no Python
    a stopped rank              sends no beat; many seconds are allowed, since a busy interpreter sends none either
    a dead rank                 its connection ends without a goodbye; the launcher has some seconds to end us first
    no more mpirun or orted     the process that started us has ended, so nobody could end us later

Who finds a cut tells its neighbours, who pass it on: a cut divides the ring into arcs, and both ends of each arc see
it. The launcher is then given some seconds to end both sides in order, as `hybridpar run` makes it do. One that does
not notice would hang even when all ranks have gone, so the ranks end their host's part of it, and themselves.

Between failures each rank sends a byte every few seconds. Rank 0 also decides which rank may print an error that many
have at once on several hosts.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.wires.address import Place, connected
from hybridpar.wires.mpi import MpiAxis

if TYPE_CHECKING:
    from mpi4py import MPI

LOST = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
SILENT_SECONDS = 300.0  # without a beat
LINK_SECONDS = 9.0  # without an answer of the other kernel
_LAUNCHER_SECONDS = 10.0  # that the launcher has to end us when a rank has died or a host is lost
_DAEMONS = ("mpirun", "mpiexec", "orterun", "orted", "prte")  # how their names begin
_ANSWER_SECONDS = 2.0  # of rank 0 to a question
_RING, _SPEAK = b"r", b"s"  # what a connection is for
_BEAT, _BYE, _LOST, _YES, _NO = b".", b"b", b"l", b"y", b"n"


@dataclass(frozen=True)
class Peer:
    """Where a rank listens."""

    rank: int
    name: str  # of its host
    place: Place

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.name}"


@dataclass
class _Link:
    """A connection of the ring, and when something last came over it."""

    peer: Peer
    socket: socket.socket
    heard: float
    ended: float | None = None  # without a goodbye


class Watchdog:
    """Watches from its making until `close`; all ranks of `comm` make it together.

    `lost(sentence)` is called by the watching thread, to tell what has happened, and returns; "" means that another
    rank tells it. Afterwards the process ends with code LOST.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        lost: Callable[[str], None],
        silent_seconds: float = SILENT_SECONDS,
        link_seconds: float = LINK_SECONDS,
    ) -> None:
        self._lost, self._silent, self._cut = lost, silent_seconds, link_seconds
        # A beat that goes into a cut link puts off the kernel's question, so that its own answer must be soon.
        self._beat = min(link_seconds, silent_seconds or link_seconds) / 4.5
        self._ear = _listener()
        mine = Peer(comm.rank, socket.gethostname(), Place.here(self._ear.getsockname()[1]))
        told = MpiAxis(comm, "everyone").objects((mine, secrets.token_bytes(16)))
        self._peers = [peer for peer, _ in told]
        self._token, self._rank = told[0][1], comm.rank
        self.several_hosts = len({peer.place.host for peer in self._peers}) > 1
        self._parent = _opened(os.getppid())
        self._next: _Link | None = None
        self._before: _Link | None = None
        self._spoken, self._over = threading.Lock(), False
        self._bell = socket.socketpair()
        os.register_at_fork(after_in_child=self._forget)
        self._watching = threading.Thread(target=self._watch, name="hybridpar-watchdog", daemon=True)
        self._watching.start()

    def close(self) -> None:
        """All ranks have ended their script: stop watching."""
        self._over = True
        self._bell[0].send(b"\0")
        self._watching.join(_ANSWER_SECONDS)
        self._tell(_BYE)

    def may_speak(self) -> bool:
        """Whether this rank is the first of the job to ask. A rank 0 that does not answer has ended, or is cut off."""
        if self._rank == 0:
            return self._spoken.acquire(blocking=False)
        with suppress(OSError), connected(self._peers[0].place, self._token + _SPEAK, _ANSWER_SECONDS) as asked:
            return asked.recv(1) != _NO
        time.sleep(_ANSWER_SECONDS)  # it has probably told why, and the launcher is about to end us
        return True

    def _watch(self) -> None:
        after = self._peers[(self._rank + 1) % len(self._peers)]
        with suppress(OSError):  # a firewall between hosts lets MPI through and not us: then there is no link
            link = connected(after.place, self._token + _RING + self._rank.to_bytes(4, "big"), self._cut)
            self._next = _Link(after, self._kept_alive(link), time.monotonic())
        judged = time.monotonic()
        while not self._over:
            poll = select.poll()
            links = [link for link in (self._next, self._before) if link is not None and link.ended is None]
            for one in (self._ear, self._bell[1], *(link.socket for link in links)):
                poll.register(one, select.POLLIN)
            if self._parent is not None:
                poll.register(self._parent, select.POLLIN)
            due = judged + self._beat - time.monotonic()
            ready = {number for number, _ in poll.poll(max(0.0, due) * 1000)}
            if self._parent in ready:
                os._exit(LOST)  # who would show what we print is gone
            if self._ear.fileno() in ready:
                self._answer()
            for link in links:
                if link.socket.fileno() in ready:
                    self._hear(link)
            if time.monotonic() >= judged + self._beat:  # not at once when one comes: a beat would chase the next one
                judged = self._judge(judged)

    def _judge(self, judged: float) -> float:
        """Send the beat, and end where one has been missing too long; every so often. Returns the time."""
        now = time.monotonic()
        if now - judged > 2 * self._beat + 1:  # we were stopped or starved ourselves: all clocks begin anew
            for link in (self._next, self._before):
                if link is not None:
                    link.heard = now
        if self._next is not None and self._next.ended is None:
            with suppress(OSError):  # told by the next look at it
                self._next.socket.send(_BEAT)
        for link in (self._next, self._before):
            if link is not None and link.ended is not None and now - link.ended > _LAUNCHER_SECONDS:
                self._abandon(f"{link.peer} has died, and the launcher has not ended the others", 0)
        before = self._before
        if self._silent and before is not None and before.ended is None and now - before.heard > self._silent:
            self._lost(
                f"{before.peer} has given no sign of life for {now - before.heard:.0f} s: it is stopped, or something "
                "in it holds Python's lock (HYBRIDPAR_SILENT_SECONDS allows more, 0 any time)"
            )
            os._exit(LOST)  # and the launcher ends the others, the stopped one too
        return now

    def _hear(self, link: _Link) -> None:
        try:
            came = link.socket.recv(4096)
        except (TimeoutError, OSError) as error:
            if isinstance(error, ConnectionResetError):
                link.ended = time.monotonic()
                return
            self._abandon(
                f"{link.peer} cannot be reached any more ({error.strerror}): its host or the network between is down"
            )
        link.heard = time.monotonic()
        if _LOST in came:
            self._abandon("")
        if _BYE in came:
            self._over = True
        elif not came:
            link.ended = time.monotonic()

    def _answer(self) -> None:
        """Somebody has connected: the rank before us in the ring, or one that asks whether it may speak."""
        with suppress(OSError):
            asker = self._ear.accept()[0]
            asker.settimeout(_ANSWER_SECONDS)
            said = b""
            while len(said) < len(self._token) + 1 and (more := asker.recv(len(self._token) + 1 - len(said))):
                said += more
            if said == self._token + _SPEAK:
                asker.sendall(_YES if self._spoken.acquire(blocking=False) else _NO)
            if said != self._token + _RING:
                asker.close()
                return
            rank = int.from_bytes(asker.recv(4, socket.MSG_WAITALL), "big")
            self._before = _Link(self._peers[rank], self._kept_alive(asker), time.monotonic())

    def _abandon(self, sentence: str, launcher_seconds: float = _LAUNCHER_SECONDS) -> None:
        """Let the launcher end the job, for so long, and end this host's part of it if it does not."""
        self._tell(_LOST)
        self._lost(sentence)
        limit = time.monotonic() + launcher_seconds
        while (left := limit - time.monotonic()) > 0:
            if select.select([self._ear], [], [], left)[0]:
                self._answer()  # another rank may want to tell the same
        _kill_daemon(os.getppid())
        os._exit(LOST)

    def _tell(self, what: bytes) -> None:
        for link in (self._next, self._before):
            if link is not None:
                with suppress(OSError):
                    link.socket.settimeout(0.2)
                    link.socket.sendall(what)

    def _kept_alive(self, link: socket.socket) -> socket.socket:
        """Let the kernel find out whether the other side is there."""
        link.settimeout(_ANSWER_SECONDS)
        patience = self._cut - self._beat
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(patience / 3)))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(patience / 3)))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))  # for beats not answered
        return link

    def _forget(self) -> None:
        """In a forked child: it is no rank, and must not keep the rank's connections open when that dies."""
        for one in (self._ear, *(link.socket for link in (self._next, self._before) if link is not None)):
            with suppress(OSError):
                os.close(one.detach())


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _opened(parent: int) -> int | None:
    """A file that becomes readable when the process `parent` ends; None where the kernel is too old or it is init."""
    with suppress(OSError, AttributeError):
        return os.pidfd_open(parent) if parent > 1 else None
    return None


def _kill_daemon(parent: int) -> None:
    """Kill the mpirun or orted that has started us, and what else it has started: ranks, and its ssh to the lost host.

    An orderly end of it would kill us first, and then wait for the lost host for ever.
    """
    with suppress(OSError):
        if not Path(f"/proc/{parent}/comm").read_text().startswith(_DAEMONS):
            return
        told = [task.read_text() for task in Path(f"/proc/{parent}/task").glob("*/children")]
        children = [int(pid) for pid in " ".join(told).split()]
        for pid in (*children, parent):
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
