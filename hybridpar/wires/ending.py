"""How a job ends: an exception on any rank ends all of them, and is told once.

MPI alone would leave the others waiting for ever: a rank that leaves with an exception waits for them in
MPI_Finalize while they wait for its messages. So the first to fail prints and calls MPI_Abort.

Often many ranks fail at once, with the same error. Only one should speak: rank 0 does at once, the others a little
later, and not at all if they have been ended by then; on one host a lock file decides between equals.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import threading
import time
import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

FAILED, MISUSED = 1, 2  # exit codes: something broke; the user asked for what cannot be

# How launchers tell a process its rank, for errors before MPI is up.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


class Ending:
    """Ends the whole job when this process fails, and holds a rank that finishes early until all have."""

    def __init__(self) -> None:
        told = [os.environ[name] for name in _RANKS if os.environ.get(name, "").isdigit()]
        self._rank, self._many = int(told[0]) if told else 0, bool(told)
        self._world: MPI.Intracomm | None = None
        self._exit_code: Any = 0
        # The lock names the job, so that two jobs on one host do not silence each other.
        job = os.environ.get("OMPI_MCA_ess_base_jobid") or os.environ.get("SLURM_JOB_ID") or str(os.getppid())
        self._lock = os.path.join(tempfile.gettempdir(), f"hybridpar-{os.getuid()}-{job}.failed")

    @classmethod
    def installed(cls) -> Ending:
        """The one that watches this process; installed by the first call."""
        found = getattr(sys.excepthook, "__self__", None)
        if isinstance(found, cls):
            return found
        ending = cls()
        ending._install()
        return ending

    def join(self, world: MPI.Intracomm) -> None:
        """MPI is up: from now on a failure aborts `world`."""
        self._world, self._rank, self._many = world, world.rank, world.size > 1

    def failed(self, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        """Say what happened, on one rank, and end the job."""
        place = _raised_here(kind, trace)
        code = 130 if issubclass(kind, KeyboardInterrupt) else FAILED
        if place is not None:
            code = MISUSED if issubclass(kind, ValueError) else FAILED
            lines = [f"hybridpar: {error}\n", f"    at {place}\n"]
        else:
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines(keepends=True)
        if self._may_speak():
            where = f"[rank {self._rank}] " if self._many else ""
            sys.stdout.flush()
            sys.stderr.write("".join(where + line for line in lines))
            sys.stderr.flush()
        else:
            time.sleep(5)  # the one who speaks ends us all; should it be killed before, we end the job
        self._abort(code)

    def _install(self) -> None:
        if self._rank == 0:
            _remove(self._lock)
        leave = sys.exit

        def remember(code: Any = None) -> None:
            if threading.current_thread() is threading.main_thread():
                self._exit_code = code
            leave(code)

        sys.exit = remember
        sys.excepthook = self.failed
        threading.excepthook = lambda args: self.failed(args.exc_type, args.exc_value, args.exc_traceback)
        atexit.register(self._leave)

    def _may_speak(self) -> bool:
        if self._rank:
            time.sleep(0.3 + 0.1 * self._rank.bit_length())
        try:
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return True  # no room for a lock file: better told twice than not at all
        return True

    def _abort(self, code: int) -> None:
        if self._many and self._world is not None:
            time.sleep(0.1)  # let the launcher forward what was written
            self._world.Abort(code)
        os._exit(code)

    def _leave(self) -> None:
        if self._exit_code not in (0, None):
            sys.stdout.flush()
            if isinstance(self._exit_code, str):
                sys.stderr.write(f"[rank {self._rank}] {self._exit_code}\n" if self._many else f"{self._exit_code}\n")
                sys.stderr.flush()
            if self._many:
                self._abort(self._exit_code if isinstance(self._exit_code, int) else FAILED)
        elif self._world is not None:
            # A rank that leaves early would shut Horovod down under the others.
            self._world.Barrier()
        _remove(self._lock)


def _raised_here(kind: type[BaseException], trace: TracebackType | None) -> str | None:
    """Where the user's code called hybridpar, if hybridpar itself raised this to the user, else None.

    Such an error is a sentence that needs no traceback.
    """
    if not issubclass(kind, ValueError | RuntimeError) or trace is None:
        return None
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    frames = traceback.extract_tb(trace)
    if not frames[-1].filename.startswith(ours):
        return None
    users = [f for f in frames if not os.path.abspath(f.filename).startswith(ours)]
    return f"{users[-1].filename}:{users[-1].lineno}" if users else "<hybridpar>"


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except OSError:
        return
