"""Processes that end with their parent: `python -m benchmarks.bound COMMAND...` becomes COMMAND, so bound.

A paused process could not notice by itself that whoever was to resume it is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Have the kernel end this process with its parent; it lasts over exec."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2), which Linux has and others have not
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
