"""Lead what a rank prints through a small process of its own, which tags each line and keeps a copy in a file.

    rank 3: fd 1, 2 ---pipes---> this ---> "[rank 3] ..." to where they led before, and to FOLDER/rank-3.log

It is outside Python's sys.stdout, so what C code prints is treated alike, whatever started the rank. It writes whole
lines, and ends when nobody is left who could print, so the last words of a rank that is killed are not lost.
"""

from __future__ import annotations

import os
import re
import select
import signal
from contextlib import suppress
from pathlib import Path

_CHUNK = 65536
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")  # \r, of a bar of progress, ends none
_UNFINISHED_BYTES = 65536  # a line so long is passed on before it ends


def lead(rank: int, tag: bool, folder: str) -> None:
    """From now on what this process and its children print goes through the pipes. `folder` "" keeps no copy.

    Raises ValueError where the file cannot be written.
    """
    copy = _file(Path(folder), rank) if folder else None
    prefix = f"[rank {rank}] ".encode() if tag else b""
    pipes = {number: os.pipe() for number in (1, 2)}
    if os.fork() == 0:
        with suppress(BaseException):
            _become_nobody()
            for _, write in pipes.values():
                os.close(write)
            _pass_on({read: number for number, (read, _) in pipes.items()}, prefix, copy)
        os._exit(0)
    for number, (read, write) in pipes.items():
        os.dup2(write, number)
        os.close(read)
        os.close(write)
    if copy is not None:
        os.close(copy)


def _file(folder: Path, rank: int) -> int:
    path = folder / f"rank-{rank}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ValueError(
            f"--output-dir: {path.absolute()} cannot be written ({error.strerror}): choose another folder"
        ) from None


def _become_nobody() -> None:
    """Live as long as there is something to read, whatever is sent to the rank's processes."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _pass_on(ways: dict[int, int], prefix: bytes, copy: int | None) -> None:
    rest = dict.fromkeys(ways, b"")
    poll = select.poll()
    for read in ways:
        poll.register(read, select.POLLIN)
    while rest:
        for read, _ in poll.poll():
            came = os.read(read, _CHUNK)
            text = rest[read] + came
            cut = len(text) if not came or len(text) > _UNFINISHED_BYTES else text.rfind(b"\n") + 1
            rest[read] = text[cut:]
            _write(text[:cut], ways[read], prefix, copy)
            if not came:
                poll.unregister(read)
                os.close(ways[read])
                del rest[read]


def _write(text: bytes, to: int, prefix: bytes, copy: int | None) -> None:
    if not text:
        return
    if copy is not None:
        with suppress(OSError):  # a full disk ends no training
            os.write(copy, text)
    tagged = b"".join(line if line.startswith(prefix) else prefix + line for line in _LINES.findall(text))
    with suppress(OSError):
        while tagged:
            tagged = tagged[os.write(to, tagged) :]
