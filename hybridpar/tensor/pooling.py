"""Rules of a region for pools.

max pool        a halo of rows; -inf where there are none
average pool    a halo of rows, summed and divided by torch's count of them
adaptive pools  to one row: whole, a mean or maximum over the axis; to more (averages): cut
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridpar.shard import balanced
from hybridpar.tensor import collectives
from hybridpar.tensor.halo import Window, pooled, windows
from hybridpar.tensor.pointwise import bound
from hybridpar.tensor.reading import alone, check_some, each, none_here, nothing, place, wanted, without
from hybridpar.tensor.region import Region, Rows, Rule
from hybridpar.tensor.rows import total


def _max_pool(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    defaults = {"padding": 0, "dilation": 1, "ceil_mode": False}
    x, kernel, stride, padding, dilation, ceil = bound(args, kwargs, names, defaults)
    n = int(func.__name__[8])
    rows = region.rows(x)
    at = place(region, x, rows, n)
    kernel, padding, dilation = each(kernel, n), each(padding, n), each(dilation, n)
    stride = each(stride or kernel, n)
    window = Window(kernel[at], stride[at], padding[at], dilation[at])
    length = window.outputs(rows.length, padding[at], ceil)
    check_some(region, length, rows, window)
    x = wanted(region, x, rows, windows(window, length, region.axis.size), -inf)
    options = (kernel, stride, without(padding, at), dilation, ceil)
    out = _pooled_ornone_here(region, func, x, length, rows, options)
    return region.cut(out, Rows(rows.dim, length))


def _pooled_ornone_here(
    region: Region, func: Callable[..., Any], x: Tensor, length: int, rows: Rows, options: tuple
) -> Tensor:
    """func(x, *options); without rows here, the other dims' sizes are found with a kernel's worth of them."""
    if not none_here(region, length):
        return func(x, *options)
    shape = list(x.shape)
    shape[rows.dim] = (options[0][x.dim() - 2 + rows.dim] - 1) * options[3][x.dim() - 2 + rows.dim] + 1
    shape = list(func(x.new_zeros(shape), *options).shape)
    shape[rows.dim] = 0
    return nothing(x, shape)


def _avg_pool(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    defaults = {"padding": 0, "ceil_mode": False, "count_include_pad": True}
    x, kernel, stride, padding, ceil, include, divisor = bound(args, kwargs, names, defaults)
    n = int(func.__name__[8])
    rows = region.rows(x)
    at = place(region, x, rows, n)
    kernel, padding = each(kernel, n), each(padding, n)
    stride = each(stride or kernel, n)
    window = Window(kernel[at], stride[at], padding[at])
    length = window.outputs(rows.length, padding[at], ceil)
    check_some(region, length, rows, window)
    lengths = [*x.shape[2:]]
    lengths[at] = rows.length
    x = wanted(region, x, rows, windows(window, length, region.axis.size))

    def summed(x: Tensor, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool) -> Tensor:
        if n == 1:  # torch's 1-d pool knows no divisor
            x = F.avg_pool2d(x[..., None], (*kernel, 1), (*stride, 1), (*padding, 0), ceil, True, 1)
            return x[..., 0]
        return (F.avg_pool2d, F.avg_pool3d)[n - 2](x, kernel, stride, padding, ceil, True, 1)

    out = _pooled_ornone_here(region, summed, x, length, rows, (kernel, stride, without(padding, at), (1,) * n, ceil))
    if divisor:
        out = out / divisor
    else:
        first, stop = balanced(length, region.axis.size)[region.axis.index]
        for d, one in enumerate(map(Window, kernel, stride, padding)):
            sizes = counts(one, lengths[d], include, *((first, stop) if d == at else (0, out.shape[d + 2])))
            out = out / torch.tensor(sizes, dtype=out.dtype, device=out.device).view(-1, *(1,) * (n - 1 - d))
    return region.cut(out, Rows(rows.dim, length))


@lru_cache(maxsize=1024)
def counts(window: Window, length: int, include: bool, first: int, stop: int) -> list[int]:
    """What torch's average pool divides each of these outputs by, in one dim."""
    found = []
    for o in range(first, stop):
        begin = o * window.stride - window.padding
        end = min(begin + window.kernel, length + window.padding)
        found.append(end - begin if include else min(end, length) - max(begin, 0))
    return found


def _adaptive(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """To one row: whole. To more: cut, each a mean of the rows that torch chooses."""
    x, size = bound(args, kwargs, ("input", "output_size"), {})
    n, rows = int(func.__name__[-2]), region.rows(x)
    at = place(region, x, rows, n)
    size = [size] * n if size is None or isinstance(size, int) else list(size)
    length, size[at] = size[at] or rows.length, 1
    largest = "max" in func.__name__
    if length != 1 and largest:
        region.refuse(f"{func.__name__} to {length} rows (1 is)")
    if length == 1 and largest:
        x = x if x.shape[rows.dim] else _lowest(x, rows)
        x = collectives.gather_sum(func(x, tuple(size)), region.axis, rows.dim)
        return region.whole(func(x, tuple(size)))
    if length == 1:
        x = total(x.sum(rows.dim, keepdim=True), region.axis) / rows.length
        return region.whole(func(x, tuple(size)))
    bins = pooled(rows.length, length)
    reads = tuple(
        (((bins[a][0], bins[b - 1][1]),) if a < b else ((0, 0),)) for a, b in balanced(length, region.axis.size)
    )
    x = wanted(region, x, rows, reads)
    (begin, _), (first, stop) = reads[region.axis.index][0], balanced(length, region.axis.size)[region.axis.index]
    means = [x.narrow(rows.dim, a - begin, b - a).mean(rows.dim, keepdim=True) for a, b in bins[first:stop]]
    x = torch.cat(means, rows.dim) if means else x
    size[at] = x.shape[rows.dim]
    shape = [s or h for s, h in zip(size, x.shape[2:])]
    out = func(x, tuple(size)) if means else nothing(x, (*x.shape[:2], *shape[:at], 0, *shape[at + 1 :]))
    return region.cut(out, Rows(rows.dim, length))


def _lowest(x: Tensor, rows: Rows) -> Tensor:
    """A row of -inf in place of none."""
    shape = list(x.shape)
    shape[rows.dim] = 1
    return nothing(x, shape) - inf


POOLS: dict[str, Rule] = {f"max_pool{n}d": alone(_max_pool) for n in (1, 2, 3)}
POOLS |= {f"avg_pool{n}d": alone(_avg_pool) for n in (1, 2, 3)}
POOLS |= {f"adaptive_{kind}_pool{n}d": alone(_adaptive, to_one=True) for kind in ("avg", "max") for n in (1, 2, 3)}
