"""This rank's files of one checkpoint: streamed to the disk beside the gathering, or behind the training.

    gathering -> Pipe, a few tensors -> thread: write, checksum, fsync           a save that is waited for
    gathering -> all of them, then the step goes on;  thread: the same           an asynchronous one

Threads here use no MPI. An asynchronous save ends by files: each writer leaves a receipt, and the first rank, which
looks for them, puts the checkpoint in its place. A writer that fails only renames a file: a full disk allows that.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from threading import Thread

from torch import Tensor

from hybridpar.checkpoint.manifest import File
from hybridpar.checkpoint.stream import Stream
from hybridpar.checkpoint.writers import Item

Files = Mapping[str, Sequence[Item]]  # by file name, the tensors in it
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what more room, or a larger limit, would mend
_AHEAD = 2  # tensors gathered and not yet written
_POLL_SECONDS = (0.005, 0.25)
_SENTENCE_BYTES = 1024


def write(folder: Path, files: Files, tensors: Iterator[Tensor], goal: Path) -> dict[str, File]:
    """Write `files` in `folder`; `tensors` gives theirs in order. `goal` is what the checkpoint will be called.

    Raises RuntimeError, and leaves nothing of the file at hand, where the disk does not take it.
    """
    written = {}
    for name, items in files.items():
        stream = None
        try:
            stream = Stream(folder / name, items)
            for _ in items:
                stream.write(next(tensors))
            written[name] = stream.close()
        except OSError as error:
            if stream is not None:
                with suppress(OSError):
                    stream.abandon()
            raise RuntimeError(refusal(goal, error, sum(item.nbytes for i in files.values() for item in i))) from error
    return written


def refusal(goal: Path, error: OSError, wanted: int = 0) -> str:
    """Why there is no checkpoint, in a sentence."""
    failed = f"the checkpoint {goal} could not be written ({error.strerror or error})"
    if error.errno not in _ROOM:
        return f"{failed}: all earlier ones are as they were; save to a folder in which this user can write"
    free = ""
    with suppress(OSError):
        free = f" and {shutil.disk_usage(goal.parent).free:,} are free there"
    return (
        f"{failed}: this rank has {wanted:,} bytes for it{free}; all earlier ones are as they were; "
        "make room or save elsewhere"
    )


class Pipe:
    """A few tensors between the thread that gathers and the one that writes."""

    def __init__(self, folder: Path, files: Files, goal: Path) -> None:
        self._queue: Queue[Tensor] = Queue(maxsize=_AHEAD)
        self._count = sum(len(items) for items in files.values())
        self._taken = 0
        self._written: dict[str, File] = {}
        self._error: RuntimeError | None = None
        self._thread = Thread(target=self._run, args=(folder, files, goal), name="hybridpar-save", daemon=True)
        self._thread.start()

    def put(self, x: Tensor) -> None:
        """The next tensor."""
        self._queue.put(x)

    def finish(self) -> dict[str, File]:
        """Return when all is on the disk. Raises what `write` raised."""
        self._thread.join()
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error
        return self._written

    def _run(self, folder: Path, files: Files, goal: Path) -> None:
        try:
            self._written = write(folder, files, self._come(), goal)
        except RuntimeError as error:
            self._error = error
            for _ in self._come():  # the other side must not wait for room
                pass

    def _come(self) -> Iterator[Tensor]:
        while self._taken < self._count:
            self._taken += 1
            yield self._queue.get()


def drained(tensors: list[Tensor]) -> Iterator[Tensor]:
    """One after another, none held longer than it is needed."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def begin(folder: Path, rank: int) -> None:
    """Note that `rank` will write in `folder`, with room for a sentence should the disk be full later."""
    _note(folder, "writing", rank).write_bytes(b" " * _SENTENCE_BYTES)


def leave_receipt(folder: Path, rank: int, written: Mapping[str, File]) -> None:
    """Say that this rank's files are on the disk."""
    text = json.dumps({name: asdict(file) for name, file in written.items()})
    _overwrite(_note(folder, "writing", rank), text)
    os.rename(_note(folder, "writing", rank), _note(folder, "receipt", rank))


def leave_failure(folder: Path, rank: int, sentence: str) -> None:
    """Say that they will never be, and why."""
    with suppress(OSError):
        _overwrite(_note(folder, "writing", rank), sentence)
    with suppress(OSError):
        os.rename(_note(folder, "writing", rank), _note(folder, "failed", rank))


def await_receipts(folder: Path, ranks: Sequence[int]) -> dict[str, File]:
    """What all `ranks` have written. Raises RuntimeError, when none of them writes any more, if one has failed."""
    written: dict[str, File] = {}
    waiting, failed, pause = set(ranks), {}, _POLL_SECONDS[0]
    while waiting:
        for rank in sorted(waiting):
            receipt, failure = (_note(folder, kind, rank) for kind in ("receipt", "failed"))
            if receipt.exists():
                written |= {name: File(**file) for name, file in json.loads(receipt.read_text()).items()}
                waiting.discard(rank)
            elif failure.exists():
                failed[rank] = failure.read_text().strip()
                waiting.discard(rank)
        if waiting:
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])
    if failed:
        rank = min(failed)
        raise RuntimeError(failed[rank] or f"the checkpoint {folder} could not be written by rank {rank}")
    return written


def forget_notes(folder: Path) -> None:
    """Remove the notes, before the folder becomes a checkpoint."""
    for kind in ("writing", "receipt", "failed"):
        for note in folder.glob(f".{kind}-*"):
            note.unlink()


def _overwrite(note: Path, text: str) -> None:
    """In place: a full disk has no new room."""
    with open(note, "r+b") as file:
        file.write(text.encode().ljust(_SENTENCE_BYTES))


def _note(folder: Path, kind: str, rank: int) -> Path:
    return folder / f".{kind}-{rank:05d}"
