"""From the output of a failed build to one sentence that names what is missing, and the lines that show it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The first that matches speaks: specific causes before the general ones.
CAUSES: tuple[tuple[str, str], ...] = (
    (r"No space left on device",
     "the disk is full: the build needs about 1 GiB under the temporary folder (set TMPDIR to another disk)"),
    (r"Killed signal terminated program|: Killed\b|Cannot allocate memory|out of memory allocating",
     "the compiler ran out of memory: each needs about 2 GiB; run again with `--jobs 1`"),
    (r"fatal error: Python\.h",
     "Python.h is missing: on Debian and Ubuntu `apt-get install python3-dev`"),
    (r"fatal error: mpi\.h|Could NOT find MPI\b|Could NOT find MPI_CXX",
     "MPI's headers are missing: on Debian and Ubuntu `apt-get install libopenmpi-dev`, or use `--mpi pypi`"),
    (r"Could NOT find NCCL",
     "NCCL is missing: set HOROVOD_NCCL_HOME to the folder that holds its include and lib, or unset "
     "HOROVOD_GPU_OPERATIONS"),
    (r"Could NOT find CUDAToolkit|No CMAKE_CUDA_COMPILER could be found|Unable to find cudart library",
     "the CUDA toolkit is not whole: set CUDA_HOME to one that has bin/nvcc, include and lib64, or unset "
     "HOROVOD_GPU_OPERATIONS"),
    (r"No CMAKE_CXX_COMPILER could be found|CMAKE_CXX_COMPILER not set",
     "a C++ compiler is missing: on Debian and Ubuntu `apt-get install g++`"),
    (r"No CMAKE_C_COMPILER could be found|CMAKE_C_COMPILER not set",
     "a C compiler is missing: on Debian and Ubuntu `apt-get install gcc`"),
    (r"CMAKE_MAKE_PROGRAM is not set|unable to find a build program",
     "make is missing: on Debian and Ubuntu `apt-get install make`"),
    (r"Compatibility with CMake < 3\.5 has been removed",
     "this CMake is too new for Horovod 0.28.1: unset HOROVOD_CMAKE, or point it to a CMake between 3.13 and 3.31"),
    (r"C\+\+(17|20|23) or later",
     "this torch asks for a newer C++ than this build used: use the torch that the documentation names, or a compiler "
     "that knows C++20 (GCC 11 or newer)"),
    (r"unrecognized command.line option .-std=c\+\+",
     "the compiler is too old for this torch: GCC 9 or newer is needed (11 from torch 2.14 on); choose one with CXX="),
    (r"ModuleNotFoundError: No module named 'distutils'",
     "setuptools is missing or broken: `python -m pip install --force-reinstall setuptools`"),
    (r"DO NOT MATCH THE HASHES",
     "the Horovod source that pip found is not the published 0.28.1: check the package index that pip is set to use"),
    (r"CERTIFICATE_VERIFY_FAILED",
     "pip does not trust the package index's certificate: set PIP_CERT to your certificate authority's file"),
    (r"Temporary failure in name resolution|Failed to establish a new connection|Network is unreachable|"
     r"Could not fetch URL|Connection (refused|reset)|ReadTimeout",
     "pip cannot reach the package index: check the network, or set PIP_INDEX_URL to a mirror"),
    (r"No matching distribution found for",
     "pip's package index lacks a package that is needed (the lines below name it): check the network and "
     "PIP_INDEX_URL"),
    (r"Permission denied",
     "a folder cannot be written (the lines below name it)"),
)  # fmt: skip

_TELLING = re.compile(r"(?i)\berror\b|CMake Error|Error \d|undefined reference|not found|Killed|No space left")
_EMPTY = re.compile(r"subprocess-exited-with-error|exit code: |This error originates|See above for output|-Werror")


def name(lines: Sequence[str]) -> str:
    """One sentence on why the build with these output lines failed.

    Example:
        >>> name(["x.cc:3: fatal error: Python.h: No such file or directory"])
        'Python.h is missing: on Debian and Ubuntu `apt-get install python3-dev`'
    """
    text = "\n".join(lines)
    for pattern, sentence in CAUSES:
        if re.search(pattern, text):
            return sentence
    return "the cause is none that is known here: the lines below and the log tell more"


def telling(lines: Sequence[str], most: int = 8) -> list[str]:
    """The last lines that look like errors, at most `most`; the very last ones where none does."""
    ends = [i for i, line in enumerate(lines) if "subprocess-exited-with-error" in line]
    own = [line.strip()[:300] for line in lines[: ends[0] if ends else None] if line.strip()]
    # CMake's messages stand in the lines below "CMake Error at".
    found = [i for i, line in enumerate(own) if _TELLING.search(line) and not _EMPTY.search(line)]
    shown = {j for i in found for j in range(i, i + (3 if own[i].startswith("CMake Error") else 1)) if j < len(own)}
    unique = list(dict.fromkeys(own[i] for i in sorted(shown)))
    return unique[-most:] or own[-most:]
