"""Values as JSON and back, exactly: what schedulers, scalers, loaders, generators and users have to keep.

    (1, 2)             {"__tuple__": [1, 2]}
    {3: "x"}           {"__map__": [[3, "x"]]}             keys that JSON has not
    inf                {"__float__": "inf"}
    a tensor           {"__tensor__": "F32", "shape": [2], "bytes": base64}

No pickle: a file from a stranger runs no code.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridpar.checkpoint.stream import DTYPES, dtype_name, raw


def to_plain(value: Any, place: str) -> Any:
    """`value` as JSON knows it. ValueError names `place` where it holds what cannot be kept.

    Example:
        >>> to_plain({"betas": (0.9, 0.95)}, "options")
        {'betas': {'__tuple__': [0.9, 0.95]}}
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"__float__": repr(value)}
    if isinstance(value, Tensor):
        bits = base64.b85encode(raw(value.detach())).decode()
        return {"__tensor__": dtype_name(value.dtype, place), "shape": list(value.shape), "bytes": bits}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b85encode(value).decode()}
    if isinstance(value, list):
        return [to_plain(one, f"{place}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, tuple):
        return {"__tuple__": [to_plain(one, f"{place}[{i}]") for i, one in enumerate(value)]}
    if isinstance(value, Mapping):
        return _mapping(value, place)
    raise ValueError(
        f"{place} is a {type(value).__name__}: a checkpoint keeps numbers, strings, lists, tuples, dicts and tensors"
    )


def from_plain(value: Any) -> Any:
    """What `to_plain` was given.

    Example:
        >>> from_plain({'betas': {'__tuple__': [0.9, 0.95]}})
        {'betas': (0.9, 0.95)}
    """
    if isinstance(value, list):
        return [from_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "__tuple__" in value:
        return tuple(from_plain(one) for one in value["__tuple__"])
    if "__float__" in value:
        return float(value["__float__"])
    if "__bytes__" in value:
        return base64.b85decode(value["__bytes__"])
    if "__tensor__" in value:
        bits, dtype = bytearray(base64.b85decode(value["bytes"])), DTYPES[value["__tensor__"]]
        return (torch.frombuffer(bits, dtype=dtype) if bits else torch.empty(0, dtype=dtype)).view(value["shape"])
    for tag, kind in (("__map__", dict), ("__counter__", Counter)):
        if tag in value:
            return kind({from_plain(key): from_plain(one) for key, one in value[tag]})
    return {key: from_plain(one) for key, one in value.items()}


def _mapping(value: Mapping[Any, Any], place: str) -> dict[str, Any]:
    pairs = [(key, to_plain(one, f"{place}[{key!r}]")) for key, one in value.items()]
    counts = isinstance(value, Counter)
    if not counts and all(isinstance(key, str) and not key.startswith("__") for key, _ in pairs):
        return dict(pairs)
    return {"__counter__" if counts else "__map__": [[to_plain(key, f"a key of {place}"), one] for key, one in pairs]}
