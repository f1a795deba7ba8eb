"""Start MPI so that Horovod can live beside it.

What must be true before MPI starts is set here, in the process itself, so that it holds under every launcher:

    mpi4py first            it then owns MPI: Horovod joins, and never finalises MPI under our feet
    THREAD_MULTIPLE         Horovod's background thread calls MPI while the main thread does
    yield when idle         a rank that waits gives its core away; without it Horovod's thread starves the computation
    OPAL_PREFIX             an Open MPI from PyPI finds its parts only through it
    a remote shell          where there is no ssh, Open MPI refuses to start even one process unless told another
    a Slurm step            where srun offers no PMI that Open MPI knows, it would end us before we could say why

And one thing is taken back: a process that no launcher has started is told by MPI that it is rank 0 of a job, and what
it starts later, an mpirun for one, would believe it too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

# What launchers tell each process they start: how many there are. The first one counts: an mpirun inside a Slurm job
# starts its daemons as a step of their own. A batch script's own shell is not a launched process, so SLURM_NTASKS is
# not among them.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_STEP = "SLURM_STEP_ID"
_PMIX = "PMIX_RANK"
_CYCLE = "HOROVOD_CYCLE_TIME"
_GLOO = "GLOO_SOCKET_IFNAME"


def start_mpi() -> MPI.Intracomm:
    """MPI's world, with full thread support.

    Raises RuntimeError with one sentence where MPI is missing, too old, or the launcher's world did not come up.
    """
    if "mpi4py.MPI" not in sys.modules:
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if os.path.exists(os.path.join(sys.prefix, "lib", "libmpi.so")):
            os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        if not (shutil.which("ssh") or shutil.which("rsh")):
            os.environ.setdefault("OMPI_MCA_plm_rsh_agent", "false")
    try:
        import mpi4py

        mpi4py.rc.thread_level = "multiple"
        with _no_step_without_pmi(), _no_job_for_children():
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py; no MPI library that it could load
        raise RuntimeError(
            f"MPI is missing ({str(error).splitlines()[0]}): run `python -m hybridpar.install`, which installs one "
            "where the machine has none"
        ) from error
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            f"MPI was started with thread level {MPI.Query_thread()}, and Horovod beside mpi4py needs "
            f"MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE}): do not set mpi4py.rc.thread_level"
        )
    _check_size(MPI.COMM_WORLD.size)
    return MPI.COMM_WORLD


@contextmanager
def idle_horovod() -> Iterator[None]:
    """Let a Horovod that is started meanwhile wake up seldom, unless the user has said how often.

    With one replica it has nothing to reduce, and its thread, awake each millisecond, cost 7 % of a step.
    """
    if _CYCLE in os.environ:
        yield
        return
    with cycle_time(20):
        yield


def wished_cycle_time() -> float | None:
    """What HOROVOD_CYCLE_TIME says, in ms, if it is set."""
    return float(os.environ[_CYCLE]) if os.environ.get(_CYCLE) else None


@contextmanager
def cycle_time(milliseconds: float) -> Iterator[None]:
    """Let a Horovod that is started meanwhile wake up this often; a later world of this process may want another."""
    os.environ[_CYCLE] = f"{milliseconds:g}"
    try:
        yield
    finally:
        del os.environ[_CYCLE]


@contextmanager
def gloo_interface(name: str | None) -> Iterator[None]:
    """Let what gloo opens meanwhile use this network interface, unless the user has named one.

    It would take the one that the host's own name leads to, which on many hosts is no way in from others.
    """
    if name is None or _GLOO in os.environ:
        yield
        return
    os.environ[_GLOO] = name
    try:
        yield
    finally:
        del os.environ[_GLOO]


@contextmanager
def _no_step_without_pmi() -> Iterator[None]:
    """Hide Slurm's step meanwhile from an Open MPI that cannot join it.

    In a step Open MPI insists on a PMI, and where srun offers none that it knows it ends the process with a page of its
    own. Without a step it makes a world of one: right for `srun -n 1` and for an interactive step, and where there
    should be more, _check_size says so.
    """
    if _STEP not in os.environ or _PMIX in os.environ or _knows_slurm_pmi():
        yield
        return
    step = os.environ.pop(_STEP)
    try:
        yield
    finally:
        os.environ[_STEP] = step


@contextmanager
def _no_job_for_children() -> Iterator[None]:
    """Take back what MPI meanwhile puts into the environment of a process that no launcher has started.

    It writes past `os.environ`, which therefore does not show it, and children inherit it all the same.
    """
    if _PMIX in os.environ or any(name in os.environ for name in _SIZES):
        yield
        return
    before = _inherited_names()
    try:
        yield
    finally:
        for name in _inherited_names() - before:
            os.unsetenv(name)


def _inherited_names() -> set[bytes]:
    """The names in the environment that children get, whoever wrote them; see environ(7)."""
    try:
        entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    except ValueError:  # a C library that keeps it elsewhere
        return set()
    names: set[bytes] = set()
    place = 0
    while entry := entries[place]:
        names.add(entry.partition(b"=")[0])
        place += 1
    return names


def _knows_slurm_pmi() -> bool:
    """Whether this Open MPI was built for Slurm's own PMI-1 or PMI-2 too. Those of PyPI and Debian know PMIx alone."""
    path = f"{os.path.join(sys.prefix, 'bin')}:{os.environ.get('PATH', '')}"
    command = shutil.which("ompi_info", path=path)
    if command is None:
        return True  # nobody to ask: leave it to MPI
    asked = subprocess.run([command, "--parsable", "--param", "pmix", "all"], capture_output=True, text=True)
    return asked.returncode != 0 or any(f"mca:pmix:{name}:" in asked.stdout for name in ("s1", "s2"))


def _check_size(size: int) -> None:
    told = [(name, int(os.environ[name])) for name in _SIZES if os.environ.get(name, "").isdigit()]
    if size > 1 or not told or told[0][1] == 1:  # a world that did not come up is many of one process
        return
    name, started = told[0]
    raise RuntimeError(
        f"the launcher started {started} processes ({name}={started}) and this one sees an MPI world of {size}: "
        + (
            f"srun did not offer the PMIx by which the MPI of {sys.prefix} finds the others; start with "
            "`srun --mpi=pmix`, or mpirun inside the allocation"
            if _STEP in os.environ and name != _SIZES[0]
            else f"mpirun belongs to another MPI than the one of {sys.prefix}; start with `hybridpar run`, or the "
            "mpirun of the MPI that `hybridpar doctor` names"
        )
    )
