"""How Horovod 0.28.1 is built: compiler wrapper, build settings, how many compilers at once.

Horovod asks for C++14; torch's headers need 17 since torch 2.1 and 20 since 2.14. Horovod appends its own -std last,
so CXXFLAGS cannot change it: a wrapper around the compiler does. GCC 13 no longer includes <stdexcept> and
<string> on the way, and the wrapper adds those too. It drops -g, which nearly doubles the time and serves nobody.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from hybridpar.install.probe import Compiler, Facts, Torch, version_of

VECTOR_FLAGS = ("f16c", "avx", "fma")
# The settings that Horovod's build reads; others that begin with HOROVOD_ are for running it.
BUILD_NAMES = (
    "HOROVOD_GPU", "HOROVOD_NCCL_", "HOROVOD_CUDA_HOME", "HOROVOD_ROCM_HOME", "HOROVOD_RCCL_HOME", "HOROVOD_BUILD_",
    "HOROVOD_CPU_OPERATIONS", "HOROVOD_ALLOW_MIXED_GPU_IMPL", "HOROVOD_DEBUG", "HOROVOD_WITH", "HOROVOD_CMAKE",
)  # fmt: skip


def standard(compiler: Compiler, torch: Torch) -> int:
    """The C++ standard to build with: 20 where torch's headers or the compiler need it.

    GCC 14 and clang 19 refuse the span in Horovod's flatbuffers, in whose place C++20 has its own.

    Example:
        >>> gcc = Compiler(("g++",), "gcc", "12.2.0")
        >>> standard(gcc, Torch("2.13.0+cpu", None, True)), standard(gcc, Torch("2.14.0", None, True))
        (17, 20)
    """
    strict = compiler.major >= (14 if compiler.vendor == "gcc" else 19)
    return 20 if strict or version_of(torch.version) >= (2, 14) else 17


def wrapper(compiler: Compiler, torch: Torch) -> str:
    """A shell script that stands in for the compiler and raises every older -std, without debug information."""
    wanted, extra = standard(compiler, torch), []
    if compiler.vendor != "gcc" or compiler.major >= 13:
        extra += ["-include", "stdexcept", "-include", "string"]
    if wanted == 20:
        extra += ["-DFLATBUFFERS_USE_STD_SPAN"]
    return _raising([*compiler.command, *extra], wanted)


def nvcc_wrapper(cuda_home: str, compiler: Compiler, torch: Torch) -> str:
    """The same for nvcc."""
    return _raising([f"{cuda_home}/bin/nvcc"], standard(compiler, torch))


def _raising(command: list[str], wanted: int) -> str:
    old = ["0x", "11", "1y", "14", *(["1z", "17"] if wanted == 20 else [])]
    patterns = "|".join(f"-std={dialect}++{year}" for year in old for dialect in ("c", "gnu"))
    return (
        "#!/bin/sh\n"
        f'for a; do shift; case $a in {patterns}) a=-std=c++{wanted};; -g) continue;; esac; set -- "$@" "$a"; done\n'
        f'exec {shlex.join(command)} "$@"\n'
    )


def arch_flags(facts: Facts) -> str:
    """The CPU's instruction sets, pinned: Horovod's build would ask the compiler and tell nobody.

    Never empty, because an empty setting counts as none.
    """
    if facts.machine not in ("x86_64", "AMD64"):
        return "-fPIC"
    found = [f"-m{flag}" for flag in VECTOR_FLAGS if flag in facts.cpu_flags]
    return " ".join(found) or "-msse2"


def jobs(facts: Facts) -> int:
    """How many compilers at once: one per core, and 2 GiB for each, as torch's headers need.

    Example: 16 cores and 7 GiB free give 3.
    """
    return max(1, min(facts.cores, int(facts.memory_gib // 2)))


def build_settings(facts: Facts, environment: Mapping[str, str]) -> dict[str, str]:
    """What Horovod's build is told through the environment; the user's own settings win where they do not break it."""
    wished = {k: v for k, v in environment.items() if k.startswith(BUILD_NAMES)}
    gpu = {}
    if facts.cuda_home and facts.nccl and not any(k.startswith("HOROVOD_GPU") for k in wished):
        gpu = {"HOROVOD_GPU_OPERATIONS": "NCCL"}
    return {
        "HOROVOD_BUILD_ARCH_FLAGS": arch_flags(facts),
        **gpu,
        **wished,
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
    }


def gpu_note(facts: Facts, settings: Mapping[str, str]) -> str | None:
    """What to say about GPUs, if torch has CUDA."""
    if facts.torch.cuda is None:
        return None
    if settings.get("HOROVOD_GPU_OPERATIONS"):
        return f"GPU: Horovod gets {settings['HOROVOD_GPU_OPERATIONS']}, with the CUDA toolkit in {facts.cuda_home}"
    lacks = "nccl.h" if facts.cuda_home else "the CUDA toolkit (nvcc)"
    return (
        f"GPU: torch has CUDA {facts.torch.cuda} but {lacks} is not on this machine, so Horovod is built without NCCL "
        "and copies gradients through the CPU; to change that install the CUDA toolkit and NCCL's headers, set "
        "CUDA_HOME and HOROVOD_NCCL_HOME, and run `python -m hybridpar.install --force`"
    )
