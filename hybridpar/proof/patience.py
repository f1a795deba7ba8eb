"""An end to a script that hangs: each rank says where it is, and the job ends.

    [rank 0] verify: the script's first steps took more than 600 s. It is at train.py:31 in <module>, ...
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

HUNG = 75  # the exit code; "try again later" in sysexits.h
_OTHERS_SECONDS = 3.0  # until the other ranks have told too: the first that exits ends them all
_DEEPEST = 3  # frames told besides the script's own


@contextmanager
def patience(seconds: float, script: str, rank: int) -> Iterator[None]:
    """End the process with HUNG, saying where its main thread is, if the `with` takes longer than `seconds`.

    Example:
        >>> with patience(600, "train.py", rank=0):             # doctest: +SKIP
        ...     runpy.run_path("train.py")
    """
    over = threading.Event()
    main = threading.get_ident()

    def watch() -> None:
        if over.wait(seconds):
            return
        where = place(traceback.extract_stack(sys._current_frames()[main]), script)
        words = f"[rank {rank}] verify: the script's first steps took more than {seconds:g} s. It is at {where}\n"
        sys.stderr.write(words)
        sys.stderr.flush()
        time.sleep(_OTHERS_SECONDS)
        os._exit(HUNG)

    threading.Thread(target=watch, daemon=True, name="patience").start()
    try:
        yield
    finally:
        over.set()


def place(stack: traceback.StackSummary, script: str) -> str:
    """The script's innermost line, and the innermost frames below it.

    Example:
        >>> frame = traceback.FrameSummary
        >>> place([frame("t.py", 3, "<module>"), frame("/x/engine.py", 9, "train_step")], "t.py")
        't.py:3 in <module>, engine.py:9 in train_step'
    """
    frames = list(stack)
    own = [at for at, frame in enumerate(frames) if os.path.basename(frame.filename) == os.path.basename(script)]
    below = frames[own[-1] + 1 :] if own else frames
    told = [_frame(frames[own[-1]])] if own else []
    told += ["..."] * (len(below) > _DEEPEST) + [_frame(frame) for frame in below[-_DEEPEST:]]
    return ", ".join(told)


def _frame(frame: traceback.FrameSummary) -> str:
    return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
