"""Whatever modules hand to one another, as tensors and the rest: what travels between stages.

    ModelOutput(last=x, pair=(y, 3))     ->     [x, y]  and  bytes in which x and y are numbers

Any structure that can be pickled: tuples, dicts, dataclasses, the outputs of Hugging Face models.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def pack(value: Any) -> tuple[bytes, list[Tensor]]:
    """The structure of `value`, and its tensors, each once.

    Raises ValueError for what cannot travel.

    Example:
        >>> import torch
        >>> structure, tensors = pack({"x": torch.ones(2), "n": 3})
        >>> len(tensors), unpack(structure, tensors)["n"]
        (1, 3)
    """
    letter = io.BytesIO()
    pickler = _Pickler(letter)
    try:
        pickler.dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a {type(value).__name__} is handed from one pipeline stage to the next and cannot be sent ({error}); "
            "let the modules on both sides of the cut exchange tensors, tuples and dicts, or cut elsewhere with stages="
        ) from error
    return letter.getvalue(), list(pickler.tensors.values())


def unpack(structure: bytes, tensors: Sequence[Tensor]) -> Any:
    """What `pack` was given, with `tensors` in the places of its tensors."""
    unpickler = _Unpickler(io.BytesIO(structure))
    unpickler.tensors = tensors
    return unpickler.load()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in tensors(getattr(value, field.name, None))]
    return []


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.setdefault(id(value), value)
        return list(self.tensors).index(id(value))


class _Unpickler(pickle.Unpickler):
    tensors: Sequence[Tensor]

    def persistent_load(self, place: int) -> Tensor:
        return self.tensors[place]
