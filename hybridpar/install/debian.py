"""Parts of Debian's and Ubuntu's Python that are packages of their own, fetched without root.

`apt-get download` needs no root, and `dpkg -x` unpacks into any folder. Elsewhere, and where apt knows no packages,
these functions return None and the user is told what to install.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path


def unpack(packages: Iterable[str], folder: Path) -> bool:
    """Fetch `packages` and unpack them in `folder`; whether that worked."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return False
    with tempfile.TemporaryDirectory() as work:
        if subprocess.run(["apt-get", "-q", "download", *packages], cwd=work, capture_output=True).returncode:
            return False
        done = [
            subprocess.run(["dpkg", "-x", str(file), str(folder)], capture_output=True).returncode
            for file in Path(work).glob("*.deb")
        ]
    return bool(done) and not any(done)


def headers(folder: Path) -> str | None:
    """The CPATH under which compilers find this Python's headers, unpacked in `folder`; None where there are none."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if sysconfig.get_paths()["include"] != f"/usr/include/{name}":
        return None  # not the operating system's Python
    include = folder / "usr" / "include"
    if not (include / name / "Python.h").exists() and not unpack([f"lib{name}-dev"], folder):
        return None
    return f"{include / name}:{include}"


def pip_wheel(folder: Path) -> Path | None:
    """pip as a wheel, which Python can also run as it is; None where there is none."""
    if not unpack(["python3-pip-whl"], folder):
        return None
    return next(iter((folder / "usr/share/python-wheels").glob("pip-*.whl")), None)
