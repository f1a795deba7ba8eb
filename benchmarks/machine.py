"""The machine that the figures come from, and how busy it is."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from hybridpar.install import mpi


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> tuple[Path, Path]:
    """Where this interpreter's commands lie, and the prefix of its environment."""
    return Path(sys.executable).parent, Path(sys.prefix)


def busy_seconds() -> float:
    """CPU seconds that all cores together have worked since boot (/proc/stat); 0 where that is not told."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, str | int]:
    """What belongs beside a figure: processor, cores, versions, date."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "mpi4py": _version("mpi4py"),
        "horovod": _version("horovod"),
        "mpi": _mpi(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _mpi() -> str:
    inside, outside = mpi.find(os.environ, *environment())
    return str(inside or outside or "absent").partition(" in ")[0]  # without the folder
