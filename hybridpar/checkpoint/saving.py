"""An asynchronous save that is under way: a thread, and who is told should it fail."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread


class Saving:
    """What `hp.save` returns. `path` is where the checkpoint will be.

    A save that fails is told once: in `wait`, in the next save of the model, or when the script ends, which then ends
    with code 1.

    Example:
        >>> saving = hp.save("run/last", model, optimizer, asynchronous=True)   # doctest: +SKIP
        >>> saving.wait()                                                       # doctest: +SKIP
    """

    def __init__(self, path: Path, work: Callable[[], None] | None = None) -> None:
        self.path = path
        self._work, self._thread = work, None
        self._error: RuntimeError | None = None
        if work is not None:
            self._thread = Thread(target=self._run, name="hybridpar-save", daemon=True)
            self._thread.start()
            atexit.register(self._end)  # runs before MPI ends, since it is registered after hp.init

    def __repr__(self) -> str:
        return f"Saving({str(self.path)!r}, {'done' if self.done else 'under way'})"

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once; on the first rank this means that the checkpoint is in its place."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when this rank's part is on the disk, on the first rank when the checkpoint is in its place.

        Raises RuntimeError, once, where it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self._end)
        error, self._error = self._error, None
        if error is not None:
            raise RuntimeError(str(error)) from error

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is, a checkpoint that was asked for is not there
            self._error = error if isinstance(error, RuntimeError) else RuntimeError(f"{self.path}: {error!r}")
        self._work = None  # and the tensors that it holds

    def _end(self) -> None:
        try:
            self.wait()
        except RuntimeError as error:
            with suppress(SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # Python's own end would have the code 0
