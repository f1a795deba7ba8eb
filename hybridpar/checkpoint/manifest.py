"""The manifest of a checkpoint: all that is known of it, in one JSON file that is written last.

    {"format": "hybridpar checkpoint", "version": 1, "checksum": of the content, "content": {...}}

A folder is a checkpoint if it has a manifest; a save that was cut short has none. Sizes and CRC-32 sums of all other
files are in it. A CRC tells every accidental damage but one in 4e9; it is no signature.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = "hybridpar checkpoint"
VERSION = 1
_CHUNK_BYTES = 1 << 22


class Damaged(ValueError):
    """A checkpoint was here, and can be read no more."""


@dataclass(frozen=True)
class File:
    """Length in bytes, and CRC-32 of the content."""

    size: int
    crc: int


@dataclass(frozen=True)
class Stored:
    """A tensor: its file, the name that it has there, its global shape and its dtype as safetensors spell it."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    `tensors` has one map for each kind: "model", "optimizer" (and "optimizer.1", ...), "replica.1" and so on for
    buffers of other replicas that differ from the first one's. `tied` gives for each other name of a tied parameter
    the one that it is stored under. `states` are the values of everything else, as `plain` encodes them.

    Example:
        >>> one = Manifest(step=7, written="2026-01-01T00:00:00Z", layout={"data": 2, "pipeline": 1, "tensor": 1})
        >>> parse(one.text(), "here") == one
        True
    """

    step: int
    written: str
    layout: dict[str, int]
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, dict[str, Stored]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_held(self) -> int:
        """Of all files that it speaks of."""
        return sum(file.size for file in self.files.values())

    def text(self) -> str:
        """As JSON, with its checksum."""
        content = asdict(self)
        head = {"format": FORMAT, "version": VERSION, "checksum": _checksum(json.loads(json.dumps(content)))}
        return json.dumps({**head, "content": content}, indent=1)


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint `folder`.

    Raises ValueError where it is foreign or newer than this version, and of its kind Damaged where there is none or it
    cannot be read.
    """
    path = folder / NAME
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise Damaged(f"{folder} is no checkpoint of hybridpar: it has {_there(folder)} and no {NAME}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({error}): take an earlier checkpoint") from None
    return parse(text, str(path))


def parse(text: str, place: str) -> Manifest:
    """The manifest that `text` is; `place` is named where it is none."""
    try:
        told = json.loads(text)
    except ValueError:
        raise Damaged(f"{place} is damaged: it is no JSON; take an earlier checkpoint") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(f'{place} is foreign: its format is not "{FORMAT}"; load weights by hp.parallelize(weights=)')
    if not isinstance(told.get("version"), int) or told["version"] > VERSION:
        raise ValueError(
            f"{place} has version {told.get('version')} of the format and this hybridpar reads up to {VERSION}: "
            "load it with a newer hybridpar"
        )
    content = told.get("content")
    if not isinstance(content, dict) or told.get("checksum") != _checksum(content):
        raise Damaged(f"{place} is damaged: its checksum is not that of its content; take an earlier checkpoint")
    return _built(content)


def flaw(folder: Path, name: str, file: File, deep: bool = True) -> str | None:
    """What is wrong with a file of the checkpoint `folder`, in words; None if nothing is. `deep` reads all of it."""
    path = folder / name
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path} is lost: the manifest speaks of it"
    if size != file.size:
        return f"{path} is {'truncated' if size < file.size else 'too long'}: {size} bytes instead of {file.size}"
    try:
        if deep and crc_of(path) != file.crc:
            return f"{path} is corrupted: its CRC-32 is not the one in the manifest"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None


def crc_of(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_synced(path: Path, text: str) -> None:
    """Write a small file, which is on the disk when this returns."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in `folder`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _built(content: Mapping[str, Any]) -> Manifest:
    tensors = {
        kind: {name: Stored(**{**one, "shape": tuple(one["shape"])}) for name, one in several.items()}
        for kind, several in content["tensors"].items()
    }
    return Manifest(
        **{**content, "tensors": tensors, "files": {name: File(**one) for name, one in content["files"].items()}}
    )


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _there(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing (it is not there)" if not folder.exists() else "no files (it is a file itself)"
    names = sorted(path.name for path in folder.iterdir())[:3]
    return ", ".join(names) or "nothing"
