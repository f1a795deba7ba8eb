"""The model of a checkpoint as one safetensors file, for whoever knows nothing of checkpoints."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hybridpar.checkpoint import look, manifest
from hybridpar.checkpoint.stream import DTYPES, Stream
from hybridpar.checkpoint.writers import Item, in_order


def export(path: Path, target: Path, dtype: str | None = None, tied: bool = False) -> int:
    """Write the model part of the checkpoint `path` to the file `target`; returns how many tensors it has.

    `dtype` (such as "BF16") is what floating point tensors become. With `tied`, tied tensors are written under all of
    their names, for loaders that know of no ties; Hugging Face's want one. One tensor is in memory at a time.

    Raises ValueError for an unknown dtype, a damaged checkpoint, a file that is there already, a folder that is not,
    and a name that does not end in .safetensors.

    Example:
        >>> export(Path("run/step-00000300"), Path("model.safetensors"), dtype="BF16")      # doctest: +SKIP
        148
    """
    told = manifest.read(path)
    if dtype is not None and (dtype not in DTYPES or not DTYPES[dtype].is_floating_point):
        floating = ", ".join(name for name, one in DTYPES.items() if one.is_floating_point)
        raise ValueError(f"dtype={dtype} is none that floating point numbers can have: {floating}")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} does not end in .safetensors, by which loaders know the format: name it so")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} in: make it first")
    if target.exists():
        raise ValueError(f"{target} is there already: remove it, or name another file")
    model = told.tensors["model"]
    for name in sorted({one.file for one in model.values()}):
        wrong = manifest.flaw(path, name, told.files[name])
        if wrong:
            raise ValueError(wrong)
    names = {name: name for name in model} | (dict(told.tied) if tied else {})
    items = in_order(_item(name, model[first], dtype) for name, first in names.items())
    new = target.with_name(f".tmp-{target.name}")
    new.unlink(missing_ok=True)
    stream = Stream(new, items)
    try:
        for item in items:
            stream.write(look.tensor(path, told, "model", names[item.name]).to(DTYPES[item.dtype]))
        stream.close()
    except BaseException:
        stream.abandon()
        raise
    os.replace(new, target)
    return len(items)


def _item(name: str, one: manifest.Stored, dtype: str | None) -> Item:
    item = Item("model", name, one.shape, one.dtype, pipeline=0)
    return replace(item, dtype=dtype) if dtype is not None and DTYPES[one.dtype].is_floating_point else item
