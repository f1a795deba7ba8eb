"""Pass on what a job prints as errors, without the pages in which mpirun tells that a rank has failed.

    --------------------------------------------------------------------------
    mpirun noticed that process rank 3 with PID 766 on node b exited on signal 9 (Killed).
    --------------------------------------------------------------------------
                         becomes         hybridpar: rank 3 on b was ended by signal 9 (Killed)

A rank that fails tells why itself, once (wires/ending.py), so most pages say nothing new. Pages that are not known
here, and all else, are passed on as they come.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable
from contextlib import suppress

_EDGE = re.compile(rb"-{70,80}\n")
_LONGEST = 40  # lines
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")  # a bar of progress, which uses \r, is one
_PAUSE_SECONDS = 0.2  # after which a line that has begun is passed on
_UNKNOWN = re.compile(rb'\S*?(mpirun|mpiexec|orterun|prterun): Error: unknown option "([^"]*)"')
_UNLESS_TOLD = "the page itself"  # it is passed on, unless the reason is known already
# What is known, and what is said in its place; {0} is the pattern's first group.
_KNOWN = (
    (re.compile(r"MPI_ABORT was invoked on rank"), ""),
    (re.compile(r"Primary job +terminated normally"), ""),
    (re.compile(r"An MPI communication peer process has unexpectedly disconnected"), ""),
    (re.compile(r"\w+run has exited due to process rank"), ""),
    (re.compile(r"WARNING: Open MPI failed to TCP connect"), _UNLESS_TOLD),
    (
        re.compile(r"run noticed that process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+ \([^)]*\))"),
        "rank {0} on {1} was ended by signal {2}",
    ),
    (
        re.compile(r"\w+run detected that one or more processes exited with.*?\[\[.*?\],(\d+)\].*?code: +(\d+)", re.S),
        "rank {0} was the first to end, with code {1}",
    ),
    (
        re.compile(r"The specified (\w+) policy is not recognized:\s+Policy: (\S+)"),
        "mpirun knows no {0} policy {1}: see what --mpi-args and OMPI_MCA_* say",
    ),
    (
        re.compile(r"\w+ has lost communication with a remote daemon.*Remote daemon\s*: \S+ on node (\S+)", re.S),
        "host {0} is lost: it or the network between is down",
    ),
)
_OPENINGS = re.compile(
    rb"MPI_ABORT was|Primary job|WARNING: Open MPI failed|An MPI communication peer|The specified"
    rb"|\w+run (has exited due|noticed|detected)|\w+ has lost"
)
_NOISE = re.compile(
    rb"srun: cluster configuration lacks support for cpu binding|\[warn\] Epoll "
    rb"|\[\S+:\d+\] (\d+ more process|Set MCA parameter|PMIX ERROR|plm:rsh: Warning: setpgid"
    rb"|.*(Out of resource|Data unpack would read past end of buffer) in file .*show_help)"
    rb"|Type '\S*(mpi|orte|prte)\w+ --help' for (usage|help)"
)
# What Slurm tells of a job step that ends since a rank has failed.
_SLURM = re.compile(
    rb"srun: (error: .*(Killed|Exited with exit code|Terminated)|Job step aborted|launch/slurm: _step_signal)"
    rb"|slurmstepd-\S+: error: \*\*\* STEP"
)


class Pages:
    """Reads from the file number `source` to its end, and writes to `to`.

    `elsewhere` says whether a rank's failure has been told in another way than by what is read here.
    """

    def __init__(self, source: int, to: int, elsewhere: Callable[[], bool] = bool) -> None:
        self._source, self._to, self._elsewhere = source, to, elsewhere
        self._page: list[bytes] = []
        self._begun = b""  # a line that has begun, and may be the edge of a page
        self._inside = False  # a line of which a part was passed on
        self.told = False  # that some rank or a sentence of ours has said what happened
        self.misused = False  # that the launcher has refused its options

    def pass_on(self) -> None:
        """Returns at the end of the source."""
        while True:
            if (self._page or self._begun) and not select.select([self._source], [], [], _PAUSE_SECONDS)[0]:
                self._release()
            came = os.read(self._source, 65536)
            if not came:
                return self._release()
            self._take(came)

    def say(self, sentence: str) -> None:
        """A sentence of ours."""
        self.told = True
        self._write(f"hybridpar: {sentence}\n".encode())

    def _take(self, came: bytes) -> None:
        for line in _LINES.findall(self._begun + came):
            self._begun = b""
            whole = line.endswith(b"\n")
            if self._inside or not (whole or line.startswith((b"-", b"[")) or self._page):
                self._inside = not whole
                self._write(line)
            elif whole:
                self._line(line)
            else:
                self._begun = line

    def _line(self, line: bytes) -> None:
        edge = _EDGE.fullmatch(line) is not None
        if self._page and edge and len(self._page) == 1:  # that was the end of a page, and this begins another
            self._write(line)
        elif self._page:
            self._page.append(line)
            if edge:
                self._turn()
            elif len(self._page) > _LONGEST or (len(self._page) == 2 and not _OPENINGS.match(line)):
                self._release()
        elif edge:
            self._page = [line]
        elif not self.told and (unknown := _UNKNOWN.match(line)):
            self.misused = True
            program, option = (word.decode(errors="replace") for word in unknown.groups())
            self.say(f"{program} has no option {option}: see what --mpi-args gives, and `{program} --help`")
        elif not _NOISE.match(line) and not (self.told and _SLURM.match(line)):
            self.told |= line.startswith(b"[rank ") or b"Traceback" in line
            self._write(line)

    def _turn(self) -> None:
        """A page is whole: say in a sentence what it says, where it says something new."""
        text = b"".join(self._page).decode(errors="replace")
        for pattern, sentence in _KNOWN:
            found = pattern.search(text)
            if found is not None:
                self.told = self.told or self._elsewhere()
                if sentence == _UNLESS_TOLD and not self.told:
                    break
                self._page = []
                if sentence and not self.told:
                    self.say(sentence.format(*found.groups()))
                return
        self._release()

    def _release(self) -> None:
        held, self._page, self._begun = b"".join(self._page) + self._begun, [], b""
        self._inside = bool(held) and not held.endswith(b"\n")
        self._write(held)

    def _write(self, text: bytes) -> None:
        with suppress(OSError):  # nobody reads it any more
            while text:
                text = text[os.write(self._to, text) :]
