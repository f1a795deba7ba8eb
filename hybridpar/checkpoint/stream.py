"""Safetensors, written as a stream: the header first, then each tensor when it comes; no more than one is held.

    8 bytes: length of the header | header: JSON, padded to 8 bytes | tensors, one after another

The format: https://huggingface.co/docs/safetensors. Wide elements come first, so each tensor lies aligned.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridpar.checkpoint.manifest import File
from hybridpar.checkpoint.writers import Item

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = {"format": "pt"}  # Hugging Face asks for it


def dtype_name(dtype: torch.dtype, place: str) -> str:
    """What safetensors call `dtype`. ValueError names `place` where they have no such."""
    if dtype not in _NAMES:
        raise ValueError(f"{place} is {dtype}, which safetensors cannot hold: convert it, or register it elsewhere")
    return _NAMES[dtype]


def raw(x: Tensor) -> memoryview:
    """The bytes of `x`, where they lie if it is contiguous on the CPU."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


class Stream:
    """One safetensors file that is being written: `items` are its tensors in the order in which they will come.

    Example:
        >>> stream = Stream(Path("x.safetensors"), [Item("model", "w", (2,), "F32", 0)])    # doctest: +SKIP
        >>> stream.write(torch.zeros(2)); stream.close()                                    # doctest: +SKIP
        File(size=80, crc=...)
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self._left = len(items)
        self._size = self._crc = 0
        self._file = open(path, "xb", buffering=0)
        self._write(memoryview(header(items)))

    def write(self, x: Tensor) -> None:
        """The next tensor, on the CPU."""
        self._left -= 1
        self._write(raw(x))

    def close(self) -> File:
        """Return when all of it is on the disk."""
        assert self._left == 0, f"{self._left} tensors did not come"
        os.fsync(self._file.fileno())
        self._file.close()
        return File(self._size, self._crc)

    def abandon(self) -> None:
        """Give up, and give the room on the disk back."""
        self._file.close()
        os.unlink(self._file.name)

    def _write(self, piece: memoryview) -> None:
        self._crc = zlib.crc32(piece, self._crc)
        self._size += len(piece)
        while len(piece):
            piece = piece[self._file.write(piece) :]  # a full disk takes a part first


def header(items: Sequence[Item]) -> bytes:
    """The begin of a file with these tensors.

    Raises ValueError where two go by one name.
    """
    told: dict[str, object] = {"__metadata__": _METADATA}
    start = 0
    for item in items:
        if item.name in told:
            raise ValueError(f"two tensors go by the name {item.name}")
        told[item.name] = {
            "dtype": item.dtype, "shape": list(item.shape), "data_offsets": [start, start + item.nbytes],
        }  # fmt: skip
        start += item.nbytes
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
