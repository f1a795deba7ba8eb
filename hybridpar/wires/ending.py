"""How a job ends: an exception on any rank ends all of them, and is told once.

MPI alone would leave the others waiting for ever: a rank that leaves with an exception waits for them in
MPI_Finalize while they wait for its messages. So the first to fail prints and calls MPI_Abort.

    an exception, in any thread     told, MPI_Abort(1); 2 where hybridpar says what the user did wrong
    sys.exit(n), n not 0            MPI_Abort(n)
    the end of the script           the rank waits until all have come there (farewell.py)

    a cut link, a stopped rank      code 75, on both sides of a cut (watchdog.py)

Often many ranks fail at once, with the same error. Only one should speak: rank 0 does at once, the others a little
later, and not at all if they have been ended by then. Between equals a lock file decides on one host, and rank 0
between hosts.

A job of one process ends as Python ends, except that hybridpar's own errors are one sentence and not a traceback.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hybridpar.wires import place

if TYPE_CHECKING:
    from mpi4py import MPI

    from hybridpar.wires.farewell import Farewell
    from hybridpar.wires.watchdog import Watchdog

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit codes: something broke; the user asked for what cannot be; Ctrl-C

# How launchers tell a process its rank, for errors before MPI is up.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
# The rank among those of its host, or the host's number.
_LOCAL_RANK, _HOST = "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_NODEID"
# And what names the job on this host: two jobs must not silence each other.
_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID")
_STALE_SECONDS = 60.0  # a lock so much older than this process is of an earlier job with the same name
_ELSEWHERE_SECONDS = 2.0
_ABORT_SECONDS = 15  # MPI_Abort takes a moment; the process is killed if it does not return at all


class Ending:
    """Ends the whole job when this process fails, and holds a rank that finishes early until all have."""

    def __init__(self) -> None:
        told = [os.environ[name] for name in _RANKS if os.environ.get(name, "").isdigit()]
        self._rank, self._many = int(told[0]) if told else 0, bool(told)
        self._began = time.time()
        self._process = os.getpid()  # a forked child has our hooks, and must not end the job
        self._world: MPI.Intracomm | None = None
        self._farewell: Farewell | None = None
        self._watchdog: Watchdog | None = None
        local, host = os.environ.get(_LOCAL_RANK, str(self._rank)), os.environ.get(_HOST, "0")
        self._beside_first = self._rank == int(local) and host == "0"  # on the host of rank 0
        self._code, self._words = 0, ""  # of sys.exit
        self._excepthook, self._thread_hook = sys.excepthook, threading.excepthook
        job = "-".join(os.environ[name] for name in _JOBS if name in os.environ) or str(os.getppid())
        # Open MPI removes the folder when the job is over, and what is in it.
        folder = os.environ.get("PMIX_SERVER_TMPDIR", "")
        folder = folder if os.path.isdir(folder) else tempfile.gettempdir()
        self._lock = os.path.join(folder, f"hybridpar-{os.getuid()}-{job}.told")

    @classmethod
    @functools.cache
    def installed(cls) -> Ending:
        """The one that watches this process; installed by the first call."""
        ending = cls()
        ending._install()
        return ending

    @property
    def rank(self) -> int:
        """This process's, as the launcher tells it before MPI is up."""
        return self._rank

    def join(self, world: MPI.Intracomm) -> None:
        """MPI is up: from now on a failure aborts `world`."""
        self._world, self._rank, self._many = world, world.rank, world.size > 1
        if not faulthandler.is_enabled() and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__, all_threads=False)  # a crash tells where in Python it was

    def watch(
        self, comm: MPI.Intracomm, data_ranks: tuple[int, ...], silent_seconds: float, link_seconds: float
    ) -> None:
        """Horovod is up: a rank of `comm` that ends its script waits for the others. All of them call it together.

        One that gives no sign of life for `silent_seconds` (0: for ever) ends the job, and so does a host that the
        network cannot reach for `link_seconds`.
        """
        from hybridpar.wires.farewell import Farewell
        from hybridpar.wires.watchdog import Watchdog

        if self._farewell is None and comm.size > 1:
            self._farewell = Farewell(comm, data_ranks, self._refuse)
            self._watchdog = Watchdog(comm, self._lost, silent_seconds, link_seconds)
        # Horovod stops itself at exit, under the feet of the other ranks: exit functions run last in, first out.
        atexit.unregister(self._leave)
        atexit.register(self._leave)

    def failed(self, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        """Say what happened, on one rank, and end the job."""
        where = place.of_error(trace) if issubclass(kind, ValueError | RuntimeError) else None
        if os.getpid() != self._process or (where is None and not self._many):
            self._excepthook(kind, error, trace)
            return
        if where is not None:
            code = MISUSED if issubclass(kind, ValueError) else FAILED
            self._refuse(str(error), where, code)
        lines = "".join(traceback.format_exception(kind, error, trace)).splitlines(keepends=True)
        self._end(lines, INTERRUPTED if issubclass(kind, KeyboardInterrupt) else FAILED)

    def end_untold(self, code: int) -> None:
        """End the job with `code`, in silence: what happened is told elsewhere."""
        self._end([], code)

    def _install(self) -> None:
        sys.excepthook = self.failed
        threading.excepthook = self._failed_thread
        sys.exit = self._exit
        atexit.register(self._leave)

    def _failed_thread(self, args: Any) -> None:
        if self._many and not issubclass(args.exc_type, SystemExit):  # which ends just the thread
            self.failed(args.exc_type, args.exc_value, args.exc_traceback)
        else:
            self._thread_hook(args)

    def _exit(self, code: Any = None) -> None:
        """sys.exit. The exception that it raises may be caught, so only the interpreter's end counts."""
        raise _Exit(self._exiting, code)

    def _exiting(self, code: Any) -> Any:
        """The interpreter is about to end with `code`: returns what it shall end with."""
        if os.getpid() != self._process or not self._many or code in (None, 0):
            return code
        if isinstance(code, int):
            self._code, self._words = code % 256 or FAILED, f"hybridpar: sys.exit({code}) ends the job\n"
        else:
            self._code, self._words = FAILED, f"{code}\n"
        return self._code

    def _leave(self) -> None:
        """The interpreter ends."""
        if os.getpid() != self._process or not self._many:
            return
        if self._code:
            self._end([self._words], self._code)
        if getattr(sys, "last_value", None) is not None:  # told by somebody else's excepthook, put in place of ours
            self._abort(FAILED)
        if self._farewell is not None and not self._mpi_is_over():
            try:
                self._farewell.leave()
                if self._watchdog is not None:
                    self._watchdog.close()
            except KeyboardInterrupt:
                self._end(["interrupted, waiting for the others to end\n"], INTERRUPTED)

    def _refuse(self, sentence: str, where: str, code: int) -> None:
        self._end([f"hybridpar: {sentence}\n", f"    at {where}\n"], code)

    def _lost(self, sentence: str) -> None:
        if sentence and self._may_speak():
            with suppress(OSError):  # who would show it may be lost too
                self._say([f"hybridpar: {sentence}\n"])

    def _end(self, lines: Sequence[str], code: int) -> None:
        """Say `lines`, unless another rank has spoken, and end the job."""
        if self._may_speak():
            self._say(lines)
        else:
            time.sleep(5)  # the one who speaks ends us all; should it be killed before, we end the job
        self._abort(code)

    def _may_speak(self) -> bool:
        if not self._many:
            return True
        if self._rank:
            time.sleep(0.3 + 0.1 * self._rank.bit_length())
        if self._watchdog is None and not self._beside_first:
            time.sleep(_ELSEWHERE_SECONDS)  # nobody to ask yet: let those beside rank 0 speak first
        try:
            if os.path.exists(self._lock) and os.path.getmtime(self._lock) < self._began - _STALE_SECONDS:
                os.remove(self._lock)
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass  # no room for a lock file: better told twice than not at all
        if self._watchdog is not None and self._watchdog.several_hosts:
            return self._watchdog.may_speak()
        return True

    def _say(self, lines: Sequence[str]) -> None:
        sys.stdout.flush()
        where = f"[rank {self._rank}] " if self._many else ""
        sys.stderr.write("".join(where + line for line in lines))
        sys.stderr.flush()

    def _abort(self, code: int) -> None:
        if not self._many:
            raise SystemExit(code)  # out of sys.excepthook: Python ends with this code, and as it always does
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.1)  # let the launcher forward what was written
        if self._world is not None and not self._mpi_is_over():
            signal.alarm(_ABORT_SECONDS)
            self._world.Abort(code)
        os._exit(code)

    def _mpi_is_over(self) -> bool:
        from mpi4py import MPI

        return MPI.Is_finalized()


class _Exit(SystemExit):
    """What sys.exit raises: it tells `exiting` when the interpreter, and not the user's code, asks for its code."""

    def __init__(self, exiting: Any, code: Any) -> None:
        super().__init__(*([] if code is None else [code]))
        self._exiting = exiting

    @property
    def code(self) -> Any:
        code = SystemExit.code.__get__(self)
        return code if sys._getframe().f_back is not None else self._exiting(code)
