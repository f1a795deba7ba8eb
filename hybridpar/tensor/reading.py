"""Rules of a region that move rows: what they share.

    rows here -> fetch the rows that this index's outputs read (their halo) -> torch's own function, unpadded there

Padding that is zeros (for a maximum: -inf) is filled in by the fetch; an index that has no output row still takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hybridpar.shard import balanced
from hybridpar.tensor.halo import Ranges, Spread, Window, trade
from hybridpar.tensor.region import Region, Rows, Rule
from hybridpar.tensor.rows import fetch


def alone(rule: Rule, to_one: bool = False) -> Rule:
    """`rule`, or on an axis of size 1 torch's function itself; `to_one` says that one row is a whole result."""

    @wraps(rule)
    def either(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if region.axis.size > 1:
            return rule(region, func, args, kwargs)
        rows, out = region.same((args, kwargs)), func(*args, **kwargs)
        if out.dim() < -rows.dim or to_one and out.shape[rows.dim] == 1:
            return region.whole(out)
        return region.cut(out, Rows(rows.dim, out.shape[rows.dim]))

    return either


def wanted(region: Region, x: Tensor, rows: Rows, reads: tuple[Ranges, ...], fill: float = 0.0) -> Tensor:
    """The rows `reads[index]` of `x`."""
    return fetch(x, x.dim() + rows.dim, trade(rows.length, reads, region.axis.index), region.axis, fill)


def place(region: Region, x: Tensor, rows: Rows, dims: int) -> int:
    """Which of the spatial `dims` is cut."""
    if x.dim() != dims + 2 or x.dim() + rows.dim < 2:
        region.refuse(f"{dims}-d work on a tensor of {x.dim()} dims cut along dim {x.dim() + rows.dim}")
    return dims + rows.dim


def nothing(x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> Tensor:
    """A result without rows that the backward pass still comes through, since peers wait for this index there."""
    return _Nothing.apply(tuple(shape), x, *parameters)


class _Nothing(Function):
    """One node, as the function that peers call is: so gradients come to `parameters` in the same order as there."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if one is None else torch.zeros_like(one) for one in ctx.saved_tensors)


def none_here(region: Region, length: int) -> bool:
    first, stop = balanced(length, region.axis.size)[region.axis.index]
    return first == stop


def check_some(region: Region, length: int, rows: Rows, window: Window | Spread) -> None:
    if length < 1:
        region.refuse(f"a window of {window.span} rows (padding {window.padding}) on {rows.length} rows")


def each(value: Any, n: int) -> tuple:
    """One value for each of n dims."""
    if value is None or isinstance(value, int | float):
        return (value,) * n
    return tuple(value) * (n if len(value) == 1 else 1)


def without(values: tuple, at: int) -> tuple:
    return (*values[:at], 0, *values[at + 1 :])
