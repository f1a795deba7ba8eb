"""The line that the first rank shows: alive on a terminal, a new line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from hybridpar.watch.metrics import Metrics

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS = {True: 0.1, False: 5.0}  # between two pictures on a terminal; between two lines in a file


class Line:
    """Shows reports on `stream` (stderr unless given); `total` is the number of the last step, if it is known.

    `columns` are those of the terminal at the other end, where `hybridpar run` passes on what is printed.

    Example:
        >>> line = Line(total=300)                  # doctest: +SKIP
        >>> line.show(metrics)                      # doctest: +SKIP
    """

    def __init__(self, total: int | None = None, stream: TextIO | None = None, columns: int | None = None) -> None:
        self._total, self._stream = total, sys.stderr if stream is None else stream
        alive = columns or self._stream.isatty()
        self._live: Progress | None = _live(self._stream, total, columns) if alive else None
        self._shown, self._last = 0.0, None

    def show(self, metrics: Metrics) -> None:
        """Show a report; one that comes right after another waits, and the last of all is shown by `close`."""
        for warning in metrics.warnings:
            self.say(f"warning: {warning}")
        now = time.monotonic()
        self._last = metrics
        if now - self._shown >= _SECONDS[self._live is not None]:
            self._shown, self._last = now, None
            self._draw(metrics)

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Show what has not been shown yet, and leave the line as it is."""
        if self._last is not None:
            self._draw(self._last)
            self._last = None
        if self._live is not None:
            self._live.stop()

    def _draw(self, metrics: Metrics) -> None:
        words = metrics.words(self._total)
        if self._live is None:
            print(words, file=self._stream, flush=True)
        else:
            self._live.update(self._live.task_ids[0], completed=metrics.step, description=words)
            self._live.refresh()


def _live(stream: TextIO, total: int | None, columns: int | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    text = TextColumn("{task.description}", markup=False)
    # Drawn by `show` only: a thread that draws by itself would take time from the training.
    console = Console(file=stream, force_terminal=bool(columns) or None, width=columns)
    live = Progress(BarColumn(12), text, console=console, auto_refresh=False)
    live.add_task("", total=total)
    live.start()
    return live
