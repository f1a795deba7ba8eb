"""The end of a save, on the first rank: Hugging Face's index, the manifest, and the rename that makes it count."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

from hybridpar.checkpoint import folders, manifest, writing
from hybridpar.checkpoint.manifest import File, Manifest
from hybridpar.checkpoint.writers import WIDTHS

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


def complete(
    folder: Path, goal: Path, token: str, told: Manifest, config: str | None, before: Callable[[], None] | None
) -> None:
    """Make `folder`, in which all tensors are, the checkpoint `goal`, after `before` has made way for it.

    OSError where the disk does not take it.
    """
    beside = {INDEX: index(told)} | ({CONFIG: config} if config is not None else {})
    for name, text in beside.items():
        manifest.write_synced(folder / name, text)
    told = replace(told, files={**told.files, **{name: _file(text) for name, text in beside.items()}})
    writing.forget_notes(folder)
    manifest.write_synced(folder / manifest.NAME, told.text())
    manifest.sync_folder(folder)
    if before is not None:
        before()
    folders.place(folder, goal, token)


def index(told: Manifest) -> str:
    """Hugging Face's: which tensor of the model is in which file."""
    model = told.tensors.get("model", {})
    total = sum(WIDTHS[one.dtype] * prod(one.shape) for one in model.values())
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": {name: one.file for name, one in model.items()}}, indent=1
    )


def _file(text: str) -> File:
    return File(len(text.encode()), zlib.crc32(text.encode()))
