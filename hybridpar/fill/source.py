"""Where weights come from: a state dict in memory, or safetensors of which only the wanted slices are read.

    x.safetensors                        one file
    folder/*.safetensors.index.json      Hugging Face's index: {"weight_map": {name: file}}
    folder/*.safetensors                 all of them, where there is no index

The format: https://huggingface.co/docs/safetensors. A file is mapped into memory, never read whole; slices are copied
out of it range by range.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hybridpar.global_view import take
from hybridpar.shard import Spec

Request = tuple[str, Spec]  # the stored name, and what is wanted of it; the spec speaks of the model's name


class Source(Protocol):
    """Stored weights."""

    def names(self) -> list[str]:
        """All stored names."""

    def parts(self, requests: Iterable[Request], index: int) -> Iterator[tuple[Request, Tensor]]:
        """The shard that `index` holds of each, in any order. ValueError where a shape is not the spec's."""

    def fingerprint(self) -> object:
        """What must be equal on all ranks."""


class Held:
    """A state dict in memory: whole tensors by name."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: x for name, x in state.items() if isinstance(x, Tensor)}

    def names(self) -> list[str]:
        return list(self._state)

    def parts(self, requests: Iterable[Request], index: int) -> Iterator[tuple[Request, Tensor]]:
        for name, spec in requests:
            yield (name, spec), take(self._state[name].detach(), spec, index)

    def fingerprint(self) -> object:
        return {name: (tuple(x.shape), _crc(x)) for name, x in self._state.items()}


class Files:
    """Safetensors. ValueError where there are none, or one is not what it should be."""

    def __init__(self, path: Path) -> None:
        self._files = _files(path)

    @classmethod
    def listed(cls, files: Mapping[str, Path]) -> Files:
        """Those that `files` names: {stored name: file}."""
        source = cls.__new__(cls)
        source._files = dict(files)
        return source

    def names(self) -> list[str]:
        return list(self._files)

    def parts(self, requests: Iterable[Request], index: int) -> Iterator[tuple[Request, Tensor]]:
        by_file: dict[Path, list[Request]] = {}
        for request in requests:
            by_file.setdefault(self._files[request[0]], []).append(request)
        for file, wanted in by_file.items():
            with _opened(file) as reader:
                for request in wanted:
                    yield request, _read(reader.get_slice(request[0]), request[1], index)

    def fingerprint(self) -> object:
        return {name: file.name for name, file in self._files.items()}


def _read(stored: object, spec: Spec, index: int) -> Tensor:
    """The shard, copied out of the mapped file."""
    shape = tuple(stored.get_shape())
    if shape != spec.shape:
        raise ValueError(f"{spec.name} has shape {list(spec.shape)} in this model and {list(shape)} in what is loaded")
    if spec.dim is None:
        return stored[:] if shape else stored[()]
    before = (slice(None),) * spec.dim
    pieces = [stored[(*before, slice(a, b))] for a, b in spec.held(index) or ((0, 0),)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, spec.dim)


def _files(path: Path) -> dict[str, Path]:
    """{name: the file that has it}"""
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise ValueError(f"{path} has {len(indices)} indices ({', '.join(p.name for p in indices)}): name one")
        files = sorted(path.glob("*.safetensors"))
        if not indices and not files:
            there = sorted(p.name for p in path.iterdir())[:3]
            raise ValueError(f"{path} has no safetensors (it has {', '.join(there) or 'nothing'}): save them as such")
        return _files(indices[0]) if indices else _unique(files)
    if not path.exists():
        raise ValueError(f"there is no {path} on this host; every rank reads its own slices of it")
    if path.suffix != ".json":
        return _unique([path])
    try:
        told = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not an index of safetensors: {{"weight_map": {{name: file}}}}') from None
    lost = [file for file in dict.fromkeys(told.values()) if not (path.parent / file).exists()]
    if lost:
        raise ValueError(f"{path} speaks of {lost[0]}, which is not beside it")
    return {name: path.parent / file for name, file in told.items()}


def _unique(files: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as reader:
            for name in reader.keys():  # noqa: SIM118 (it is no mapping)
                if name in found:
                    raise ValueError(f"{name} is in {found[name].name} and in {file.name}: name one of the two")
                found[name] = file
    return found


def _opened(file: Path) -> object:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None


def _crc(x: Tensor) -> int:
    flat = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy()) if flat.numel() and not x.is_meta else 0
