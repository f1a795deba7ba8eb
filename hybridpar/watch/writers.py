"""Files that reports are written to: JSON lines, and what TensorBoard reads.

TensorBoard's file is a row of records, each a protocol buffer of one event (tensorflow/core/util/event.proto) between
its length and its checksum. The few fields that a number needs are written here, so nothing has to be installed.

    record   length [8 bytes]   crc of the length [4]   event [length]   crc of the event [4]
    event    1: wall time, double   2: step, int64   3: version, only in the first   5: summary
    summary  1: value, one for each number   ( 1: tag   2: float )
"""

from __future__ import annotations

import json
import struct
import time
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TextIO

from hybridpar.watch.metrics import Metrics

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class JsonLines:
    """One line of JSON for each report, at the end of the file `path`.

    Example:
        >>> JsonLines("run/metrics.jsonl").write(metrics)       # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self._file: TextIO = _made(Path(path)).open("a", encoding="utf-8", buffering=1)

    def write(self, metrics: Metrics) -> None:
        """Add a line; whoever reads the file sees it at once."""
        self._file.write(json.dumps(metrics.record()) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """A file of events in `folder`, for `tensorboard --logdir`.

    Example:
        >>> TensorBoard("run/tensorboard").write(metrics)       # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        made = time.time()
        path = Path(folder) / f"events.out.tfevents.{made:.6f}.hybridpar"
        self._file: BinaryIO = _made(path).open("wb")
        self._file.write(record(_field(1, _FIXED64, made) + _field(3, _BYTES, b"brain.Event:2")))

    def write(self, metrics: Metrics) -> None:
        """Add the numbers of a report; TensorBoard groups `sent.data` and its like under `sent`."""
        values = b""
        for name, number in metrics.numbers().items():
            value = _field(1, _BYTES, name.replace(".", "/").encode()) + _field(2, _FIXED32, number)
            values += _field(1, _BYTES, value)
        when = _field(1, _FIXED64, time.time()) + _field(2, _VARINT, metrics.step)
        self._file.write(record(when + _field(5, _BYTES, values)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def record(event: bytes) -> bytes:
    """`event` as it lies in the file.

    Example:
        >>> record(b"").hex()
        '000000000000000029039807d8ea82a2'
    """
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


def _field(number: int, kind: int, value: float | bytes) -> bytes:
    """A field of a protocol buffer: its number and kind, then its value."""
    key = bytes([number << 3 | kind])
    if kind == _BYTES:
        return key + _varint(len(value)) + value
    return key + (_varint(value) if kind == _VARINT else struct.pack("<d" if kind == _FIXED64 else "<f", value))


def _varint(value: int) -> bytes:
    """Seven bits in each byte, the low ones first."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _checksum(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and offset as in the TFRecord format."""
    crc = 0xFFFFFFFF
    table = _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@lru_cache(1)
def _table() -> tuple[int, ...]:
    entries = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        entries.append(entry)
    return tuple(entries)


def _made(path: Path) -> Path:
    """`path`, whose folder is there now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name a place that can be made") from None
    return path
