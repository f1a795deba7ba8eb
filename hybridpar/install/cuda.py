"""The CUDA toolkit and NCCL for Horovod's GPU build, put where its CMake finds them.

nvcc needs a wrapper as the C++ compiler does: Horovod compiles its kernels as C++11, and the standard library of
GCC 12 is no longer C++11. Horovod takes nvcc from its toolkit's folder, so the build gets a folder of links to the
real toolkit in which bin/nvcc is the wrapper.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def home(environment: Mapping[str, str]) -> str | None:
    """The first folder that is a whole toolkit; nvcc on PATH may be a link or a script outside of it."""
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    named = [environment.get(name) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH")]
    places = [*named, str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    whole = (p for p in places if p and Path(p, "bin/nvcc").exists() and Path(p, "include/cuda_runtime.h").exists())
    return next(whole, None)


def nccl(environment: Mapping[str, str], cuda_home: str) -> str | None:
    """The folder of NCCL's include and lib: the machine's, else what torch brings from PyPI."""
    places = [environment.get("HOROVOD_NCCL_HOME"), cuda_home, "/usr", "/usr/local", str(pypi_nccl())]
    return next((p for p in places if p and Path(p, "include/nccl.h").exists()), None)


def pypi_nccl() -> Path:
    """Where NCCL from PyPI is, if it is installed."""
    return Path(sysconfig.get_path("purelib"), "nvidia", "nccl")


def toolkit(real: Path, wrapper: str, folder: Path) -> dict[str, str]:
    """Make `folder` a toolkit of links to `real` with `wrapper` as its nvcc; returns the settings that name it."""
    (folder / "bin").mkdir(parents=True)
    for entry in real.iterdir():
        if entry.name != "bin":
            (folder / entry.name).symlink_to(entry)
    for entry in (real / "bin").iterdir():
        if entry.name != "nvcc":
            (folder / "bin" / entry.name).symlink_to(entry)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(wrapper)
    nvcc.chmod(0o755)
    return {"HOROVOD_CUDA_HOME": str(folder), "CUDA_HOME": str(real)}


def linkable_nccl(pypi: Path, folder: Path) -> dict[str, str]:
    """Give NCCL from PyPI the libnccl.so that linkers look for, in `folder`; returns the settings that name it."""
    folder.mkdir()
    (folder / "libnccl.so").symlink_to(next((pypi / "lib").glob("libnccl.so.*")))
    return {
        "HOROVOD_NCCL_INCLUDE": str(pypi / "include"),
        "HOROVOD_NCCL_LIB": str(folder),
        "HOROVOD_NCCL_LINK": "SHARED",
    }
