"""Where in the user's own code something happened: the line that a sentence names."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType

OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def of_error(trace: TracebackType | None) -> str | None:
    """The user's line that called hybridpar, if hybridpar itself raised the error to the user, else None.

    Such an error is a sentence, which needs no traceback. One that torch or MPI raised inside hybridpar is none.
    """
    frames = traceback.extract_tb(trace)
    if not frames or not _is_ours(frames[-1]) or not (frames[-1].line or "").startswith("raise"):
        return None
    return of_frames(frames)


def of_thread(frame: FrameType) -> str:
    """The user's line at which a thread is whose innermost frame is `frame`."""
    return of_frames(traceback.extract_stack(frame))


def of_frames(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of `frames`, outermost first, that belongs to no library."""
    libraries = tuple({sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "purelib", "platlib")})
    others = [f for f in frames if not _is_ours(f)]
    users = [f for f in others if not f.filename.startswith((*libraries, "<"))] or others
    return f"{users[-1].filename}:{users[-1].lineno}" if users else "hybridpar"


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return os.path.abspath(frame.filename).startswith(OURS)
