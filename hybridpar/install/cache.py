"""Built Horovod wheels, kept under a key of all that decides their content.

    ~/.cache/hybridpar/wheels/<key>/horovod-0.28.1-cp311-cp311-linux_x86_64.whl
    ~/.cache/hybridpar/logs/horovod-<key>.log

What is taken from here is tried before it is trusted: the key cannot know everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from hybridpar.install.mpi import FROM_PYPI, Mpi, parse
from hybridpar.install.probe import Facts

HOROVOD = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"


def key(facts: Facts, mpi: Mpi | None, settings: Mapping[str, str], wrapper: str) -> str:
    """16 hexadecimal digits that change with everything that a built wheel depends on.

    `mpi` None stands for the one from PyPI. An MPI inside the environment is known by its version alone, because
    the wheel finds it relative to itself; the machine's also by its folder.
    """
    told = (mpi.vendor, mpi.version, "" if mpi.inside else mpi.folder) if mpi else (*parse(_pypi_banner()), "")
    parts = {
        "horovod": [HOROVOD, SDIST_SHA256],
        "torch": asdict(facts.torch),
        "python": [facts.python, facts.machine, facts.libc],
        "mpi": told,
        "compiler": asdict(facts.compiler),
        "cuda": [facts.cuda_version, facts.nccl is not None],
        "settings": dict(sorted(settings.items())),
        "wrapper": wrapper,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def home(environment: Mapping[str, str]) -> Path:
    """The cache folder, made if need be; a folder under the temporary one where the user's cannot be written.

    Example: `/home/ann/.cache/hybridpar`.
    """
    users = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(users, "hybridpar"), Path(tempfile.gettempdir(), f"hybridpar-{os.getuid()}")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="hybridpar-"))


def find(folder: Path, key: str) -> Path | None:
    """The wheel under `key`, if there is one."""
    return next(iter(sorted((folder / "wheels" / key).glob("horovod-*.whl"))), None)


def store(folder: Path, key: str, wheel: Path) -> Path:
    """Put `wheel` under `key`, whole or not at all, and return where it is."""
    place = folder / "wheels" / key
    place.mkdir(parents=True, exist_ok=True)
    part = place / f"{wheel.name}.{os.getpid()}.part"
    shutil.copyfile(wheel, part)
    return part.replace(place / wheel.name)


def drop(folder: Path, key: str) -> None:
    """Forget what is under `key`."""
    shutil.rmtree(folder / "wheels" / key, ignore_errors=True)


def log(folder: Path, key: str) -> Path:
    """Where the build under `key` writes its output."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder / "logs" / f"horovod-{key}.log"


def _pypi_banner() -> str:
    return f"Open MPI {FROM_PYPI.split('==')[1]}"
