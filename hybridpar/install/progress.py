"""A long command with its output in a log and a sign of life on the screen.

    on a terminal      one line, rewritten:  Building Horovod 0.28.1  37 %  1:05
    else               a line every 15 seconds

The share is make's own, so the last percents, which hold the largest files, take longest.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

PLAIN_SECONDS = 15.0
_PERCENT = re.compile(r"^\s*\[\s*(\d{1,3})%\]")


def percent(line: str) -> int | None:
    """How far make says it is, if `line` says so.

    Example:
        >>> percent("  [ 37%] Building CXX object a.cc.o")
        37
    """
    found = _PERCENT.match(line)
    return int(found.group(1)) if found else None


def clock(seconds: float) -> str:
    """Minutes and seconds.

    Example:
        >>> clock(65)
        '1:05'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Line:
    """The sign of life for one command; `update` may be called as often as one likes."""

    def __init__(self, title: str, out: TextIO) -> None:
        self._title, self._out, self._terminal = title, out, out.isatty()
        self._start, self._next = time.monotonic(), 0.0

    def update(self, share: int) -> None:
        """Show `share` percent, if it is time to."""
        seconds = time.monotonic() - self._start
        if seconds < self._next:
            return
        self._next = seconds + (0.2 if self._terminal else PLAIN_SECONDS)
        text = f"{self._title}  {share:3d} %  {clock(seconds)}"
        self._out.write(f"\r{text}" if self._terminal else f"{text}\n")
        self._out.flush()

    def end(self, word: str) -> None:
        """Close the line with `word` and the time it took."""
        text = f"{self._title}  {word} in {clock(time.monotonic() - self._start)}"
        self._out.write(f"\r{text}    \n" if self._terminal else f"{text}\n")
        self._out.flush()


def follow(command: list[str], environment: Mapping[str, str], log: Path, title: str, out: TextIO) -> int:
    """Run `command`, write its output to `log` and show how far it is on `out`; returns its exit code.

    When interrupted, it ends the whole process group before it lets the interruption through.
    """
    line, share = Line(title, out), [0]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        reader = threading.Thread(target=_copy, args=(process.stdout, log, share), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                line.update(share[0])
                time.sleep(0.2)
            reader.join()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            line.end("stopped")
            raise
    line.end("failed" if process.returncode else "done")
    return process.returncode


def _copy(source: TextIO, log: Path, share: list[int]) -> None:
    with log.open("w") as file:
        for text in source:
            file.write(text)
            file.flush()
            share[0] = max(share[0], percent(text) or 0)
