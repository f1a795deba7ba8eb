"""What this machine and this Python environment offer to a build of Horovod."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridpar.install import cuda

OLDEST_PYTHON = (3, 10)
TESTED_TORCH = "2.13.0"
ASK_TORCH = """
import json, torch
print(json.dumps([torch.__version__, torch.version.cuda, bool(torch.compiled_with_cxx11_abi())]))
"""


class Missing(Exception):
    """Something that the build needs is not there; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Torch:
    """The installed torch: exact version with its local tag, CUDA version or None, which C++ ABI."""

    version: str
    cuda: str | None
    cxx11_abi: bool


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, `gcc` or `clang`, and its version."""

    command: tuple[str, ...]
    vendor: str
    version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Facts:
    """All that decides how Horovod is built, MPI aside."""

    python: str  # cp311
    machine: str  # x86_64
    libc: str
    cores: int
    memory_gib: float  # that is free now
    cpu_flags: frozenset[str]
    torch: Torch
    compiler: Compiler
    cuda_home: str | None  # a CUDA toolkit, if torch has CUDA
    cuda_version: tuple[int, ...]
    nccl: str | None  # the folder that holds NCCL's include and lib


def scripts() -> Path:
    """Where this environment's commands are (`.venv/bin`)."""
    return Path(sysconfig.get_path("scripts"))


def prefix() -> Path:
    """Where this environment's packages put what is not Python (`.venv`)."""
    return Path(sysconfig.get_path("data"))


def version_of(text: str) -> tuple[int, ...]:
    """The first dotted number in `text`, as numbers.

    Example:
        >>> version_of("cmake version 3.25.1")
        (3, 25, 1)
    """
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(int(n) for n in found.group().split(".")) if found else ()


def output(command: list[str], environment: Mapping[str, str] | None = None) -> str | None:
    """What `command` prints, or None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_python() -> None:
    """Raise Missing unless pip can install into this interpreter's environment."""
    if sys.version_info < OLDEST_PYTHON:
        raise Missing(
            f"this is Python {platform.python_version()} and hybridpar needs 3.10 or newer: "
            "choose another with `make PYTHON=python3.11 ...` or by its own path"
        )
    if sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        raise Missing(
            f"{sys.executable} belongs to the operating system, which forbids pip to change it: make an environment "
            "first, `python3 -m venv .venv && . .venv/bin/activate`, and run this again in it"
        )
    if importlib.util.find_spec("pip") is None:
        raise Missing(
            f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, or where uv made the environment, "
            "`uv pip install pip`"
        )


def find_torch() -> Torch:
    """The torch of this environment. Raises Missing where there is none or it does not start."""
    if importlib.util.find_spec("torch") is None:
        raise Missing(
            f"torch is not installed for {sys.executable}, and Horovod is built against it: "
            f"run `{sys.executable} -m pip install torch=={TESTED_TORCH}` first"
        )
    done = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Missing(f"torch is installed for {sys.executable} but `import torch` fails: {last}")
    version, cuda, abi = json.loads(done.stdout.splitlines()[-1])
    return Torch(version, cuda, abi)


def find_compiler(environment: Mapping[str, str]) -> Compiler | None:
    """$CXX if it is set, else the first of g++, clang++ and c++ on PATH."""
    wanted = [environment["CXX"]] if environment.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        command = shlex.split(name)
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            continue
        told = output([*command, "--version"], environment) or ""
        number = output([*command, "-dumpfullversion", "-dumpversion"], environment) or told
        version = ".".join(str(n) for n in version_of(number)) or number.strip()
        if version:
            return Compiler(tuple(command), "clang" if "clang" in told else "gcc", version)
    return None


def has_headers() -> bool:
    """Whether Python.h is installed."""
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def missing_tools(has_compiler: bool, headers: bool, has_make: bool) -> str | None:
    """One sentence that names all that is missing, with Debian's and Fedora's command; None if nothing is.

    Example:
        >>> missing_tools(True, True, True) is None
        True
    """
    lacks = [
        (has_compiler, "a C++ compiler", "g++", "gcc-c++"),
        (headers, f"Python.h (the headers of Python {platform.python_version()})", "python3-dev", "python3-devel"),
        (has_make, "make", "make", "make"),
    ]
    gone = [row for row in lacks if not row[0]]
    if not gone:
        return None
    names = " and ".join(row[1] for row in gone)
    debian, fedora = (" ".join(row[i] for row in gone) for i in (2, 3))
    return (
        f"{names} {'is' if len(gone) == 1 else 'are'} missing, and Horovod is compiled here: on Debian and Ubuntu "
        f"`apt-get install {debian}`, on Fedora and RHEL `dnf install {fedora}`"
    )


def find_tools(environment: Mapping[str, str], headers: bool) -> Compiler:
    """The compiler, `headers` saying whether Python's are there. Raises Missing, naming all that a build lacks."""
    compiler = find_compiler(environment)
    lacks = missing_tools(compiler is not None, headers, shutil.which("make") is not None)
    if lacks or compiler is None:
        raise Missing(lacks or "")
    return compiler


def gather(environment: Mapping[str, str], torch: Torch, compiler: Compiler) -> Facts:
    """All the facts."""
    cuda_home = cuda.home(environment) if torch.cuda else None
    return Facts(
        python=f"cp{sys.version_info[0]}{sys.version_info[1]}",
        machine=platform.machine(),
        libc="-".join(platform.libc_ver()),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=_free_memory(),
        cpu_flags=_cpu_flags(),
        torch=torch,
        compiler=compiler,
        cuda_home=cuda_home,
        cuda_version=version_of((output([f"{cuda_home}/bin/nvcc", "--version"]) if cuda_home else None) or ""),
        nccl=cuda.nccl(environment, cuda_home) if cuda_home else None,
    )


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _free_memory() -> float:
    try:
        found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found.group(1)) / 2**20 if found else 4.0
