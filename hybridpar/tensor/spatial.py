"""Rules of a region for convolutions, pools, padding and resampling: what moves rows.

    rows here -> fetch the rows that this index's outputs read (`halo`) -> torch's own function without padding there

Padding that is zeros (for a maximum: -inf) is filled in by the fetch; an index that has no output row still takes part.
On an axis of size 1 nothing is fetched and torch's function is called as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridpar.shard import balanced
from hybridpar.tensor import collectives
from hybridpar.tensor.halo import Ranges, Spread, Window, bordered, places, pooled, runs, trade, windows
from hybridpar.tensor.pointwise import bound
from hybridpar.tensor.region import Region, Rows, Rule
from hybridpar.tensor.rows import fetch, total


def alone(rule: Rule) -> Rule:
    """On an axis of size 1 the function itself."""

    @wraps(rule)
    def either(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if region.axis.size > 1:
            return rule(region, func, args, kwargs)
        rows, out = region.same((args, kwargs)), func(*args, **kwargs)
        if out.dim() < -rows.dim or rule is _adaptive and out.shape[rows.dim] == 1:
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
    none = x.sum() * 0
    for p in parameters:
        none = none if p is None else none + p.sum() * 0
    return none.expand(*shape)


def _conv(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    x, weight, bias, stride, padding, dilation, groups = bound(args, kwargs, names, defaults)
    rows, n = region.rows(x), weight.dim() - 2
    at = place(region, x, rows, n)
    stride, dilation = _each(stride, n), _each(dilation, n)
    kernel = weight.shape[2:]
    before, after = _padding(padding, kernel, dilation)
    window = Window(kernel[at], stride[at], before[at], dilation[at])
    length = window.outputs(rows.length, after[at])
    _some(region, length, rows, window)
    x = wanted(region, x, rows, windows(window, length, region.axis.size))
    before, after = _without(before, at), _without(after, at)
    if before != after:  # of "same", where a kernel is even: torch pads the end more
        x = F.pad(x, [p for b, a in reversed([*zip(before, after)]) for p in (0, a - b)])
    if _none(region, length):
        shape = [Window(k, s, b, d).outputs(h, b) for k, s, b, d, h in zip(kernel, stride, before, dilation, x.shape[2:])]
        out = nothing(x, (len(x), len(weight), *shape[:at], 0, *shape[at + 1 :]), weight, bias)
    else:
        out = func(x, weight, bias, stride, before, dilation, groups)
    return region.cut(out, Rows(rows.dim, length))


def _conv_transpose(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    x, weight, bias, stride, padding, more, groups, dilation = bound(args, kwargs, names, defaults)
    rows, n = region.rows(x), weight.dim() - 2
    at = place(region, x, rows, n)
    stride, dilation, padding, more = (_each(value, n) for value in (stride, dilation, padding, more))
    spreads = [Spread(*one) for one in zip(weight.shape[2:], stride, padding, dilation)]
    spread = spreads[at]
    length = spread.outputs(rows.length, more[at])
    _some(region, length, rows, spread)
    reads = windows(spread, length, region.axis.size)
    x = wanted(region, x, rows, reads)
    first, stop = balanced(length, region.axis.size)[region.axis.index]
    if first == stop:
        shape = [one.outputs(h, m) for one, h, m in zip(spreads, x.shape[2:], more)]
        channels = weight.shape[1] * groups
        out = nothing(x, (len(x), channels, *shape[:at], 0, *shape[at + 1 :]), weight, bias)
    else:
        out = func(x, weight, bias, stride, _without(padding, at), _without(more, at), groups, dilation)
        out = out.narrow(rows.dim, first - spread.begins(reads[region.axis.index][0][0]), stop - first)
    return region.cut(out, Rows(rows.dim, length))


def _max_pool(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = {"padding": 0, "dilation": 1, "ceil_mode": False}
    x, kernel, stride, padding, dilation, ceil, indices = bound(args, kwargs, names, defaults)
    if indices:
        region.refuse("the indices of a max pool")
    n = int(func.__name__[8])
    rows = region.rows(x)
    at = place(region, x, rows, n)
    kernel, padding, dilation = _each(kernel, n), _each(padding, n), _each(dilation, n)
    stride = _each(stride or kernel, n)
    window = Window(kernel[at], stride[at], padding[at], dilation[at])
    length = window.outputs(rows.length, padding[at], ceil)
    _some(region, length, rows, window)
    x = wanted(region, x, rows, windows(window, length, region.axis.size), -inf)
    options = (kernel, stride, _without(padding, at), dilation, ceil)
    out = _pooled_or_none(region, func, x, length, rows, options)
    return region.cut(out, Rows(rows.dim, length))


def _pooled_or_none(
    region: Region, func: Callable[..., Any], x: Tensor, length: int, rows: Rows, options: tuple
) -> Tensor:
    """func(x, *options); without rows here, the other dims' sizes are found with a kernel's worth of them."""
    if not _none(region, length):
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
    kernel, padding = _each(kernel, n), _each(padding, n)
    stride = _each(stride or kernel, n)
    window = Window(kernel[at], stride[at], padding[at])
    length = window.outputs(rows.length, padding[at], ceil)
    _some(region, length, rows, window)
    lengths = [*x.shape[2:]]
    lengths[at] = rows.length
    x = wanted(region, x, rows, windows(window, length, region.axis.size))

    def summed(x: Tensor, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool) -> Tensor:
        if n == 1:  # torch's 1-d pool knows no divisor
            x = F.avg_pool2d(x[..., None], (*kernel, 1), (*stride, 1), (*padding, 0), ceil, True, 1)
            return x[..., 0]
        return (F.avg_pool2d, F.avg_pool3d)[n - 2](x, kernel, stride, padding, ceil, True, 1)

    out = _pooled_or_none(region, summed, x, length, rows, (kernel, stride, _without(padding, at), (1,) * n, ceil))
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
    x, size, indices = bound(args, kwargs, ("input", "output_size", "return_indices"), {})
    if indices:
        region.refuse("the indices of a max pool")
    n, rows = int(func.__name__[-2]), region.rows(x)
    at = place(region, x, rows, n)
    size = [size] * n if size is None or isinstance(size, int) else list(size)
    length, size[at] = size[at] or rows.length, 1
    largest = "max" in func.__name__
    if length != 1 and largest:
        region.refuse(f"{func.__name__} to {length} rows (1 is)")
    if length == 1 and largest:
        x = x if x.shape[rows.dim] else wanted_lowest(x, rows)
        x = collectives.gather_sum(func(x, tuple(size)), region.axis, rows.dim)
        return region.whole(func(x, tuple(size)))
    if length == 1:
        x = total(x.sum(rows.dim, keepdim=True), region.axis) / rows.length
        return region.whole(func(x, tuple(size)))
    bins = pooled(rows.length, length)
    reads = tuple((((bins[a][0], bins[b - 1][1]),) if a < b else ((0, 0),)) for a, b in balanced(length, region.axis.size))
    x = wanted(region, x, rows, reads)
    (begin, _), (first, stop) = reads[region.axis.index][0], balanced(length, region.axis.size)[region.axis.index]
    means = [x.narrow(rows.dim, a - begin, b - a).mean(rows.dim, keepdim=True) for a, b in bins[first:stop]]
    x = torch.cat(means, rows.dim) if means else x
    size[at] = None
    shape = [s or h for s, h in zip(size, x.shape[2:])]
    out = func(x, tuple(size)) if means else nothing(x, (*x.shape[:2], *shape[:at], 0, *shape[at + 1 :]))
    return region.cut(out, Rows(rows.dim, length))


def wanted_lowest(x: Tensor, rows: Rows) -> Tensor:
    """A row of -inf in place of none."""
    shape = list(x.shape)
    shape[rows.dim] = 1
    return nothing(x, shape) - inf


def _pad(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    x, pad, mode, value = bound(args, kwargs, ("input", "pad", "mode", "value"), {"mode": "constant"})
    rows, pad = region.rows(x), list(pad)
    j = -2 * (rows.dim + 1)
    before, after = pad[j : j + 2] or (0, 0)
    pad[j : j + 2] = [0, 0] if j < len(pad) else []
    length = rows.length + before + after
    if mode == "constant":
        reads = windows(Window(1, 1, before), length, region.axis.size)
        out = wanted(region, x, rows, reads, value or 0.0)
        return region.cut(F.pad(out, pad, mode, value), Rows(rows.dim, length))
    if before or after:
        sources = bordered(mode, rows.length, before, after)
        x = _picked(region, x, rows, tuple(sources))
    if x.shape[rows.dim] == 0:  # which torch does not pad, though there is nothing to do
        shape = [h + sum(pad[2 * i : 2 * i + 2]) for i, h in enumerate(reversed(x.shape))]
        return region.cut(nothing(x, shape[::-1]), Rows(rows.dim, length))
    return region.cut(F.pad(x, pad, mode, value) if any(pad) else x, Rows(rows.dim, length))


def _picked(region: Region, x: Tensor, rows: Rows, sources: tuple[int, ...]) -> Tensor:
    """The rows `sources` of the whole, by number, those of them that belong here as `balanced` says."""
    mine = [sources[a:b] for a, b in balanced(len(sources), region.axis.size)]
    reads = tuple(runs(one) for one in mine)
    x = wanted(region, x, rows, reads)
    here = places(mine[region.axis.index], reads[region.axis.index])
    return x if here == [*range(x.shape[rows.dim])] else x.index_select(rows.dim, torch.tensor(here, device=x.device, dtype=torch.long))


def _interpolate(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    x, size, scale, mode, corners, again, smooth = bound(args, kwargs, names, {"mode": "nearest"})
    n, rows = x.dim() - 2, region.rows(x)
    at = place(region, x, rows, n)
    if smooth or mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear"):
        region.refuse(f"interpolate with mode={mode!r}, antialias={bool(smooth)}")
    sizes, scales = _each(size, n), _each(scale, n)
    flat = "linear" if mode.endswith("linear") else mode
    options = {"align_corners": corners, "recompute_scale_factor": again}
    ramp = torch.arange(rows.length, dtype=torch.float64)[None, None]
    # Where each output comes from, by torch's own arithmetic: interpolation gives the place itself of a ramp.
    source = F.interpolate(ramp, sizes[at], scales[at], flat, **options)[0, 0]
    length, low = len(source), source.floor().long().clamp(0, rows.length - 1)
    mine = balanced(length, region.axis.size)
    if flat != "linear":
        x = _picked(region, x, rows, tuple(low.tolist()))
    else:
        high = (low + 1).clamp(max=rows.length - 1)
        reads = tuple((((int(low[a]), int(high[b - 1]) + 1) if a < b else (0, 0)),) for a, b in mine)
        x = wanted(region, x, rows, reads)
        a, b = mine[region.axis.index]
        begin, shape = reads[region.axis.index][0][0], (-1, *(1,) * (-rows.dim - 1))
        weight = (source - low)[a:b].to(x).view(shape)
        lower, higher = ((one[a:b] - begin).to(x.device) for one in (low, high))
        x = x.index_select(rows.dim, lower) * (1 - weight) + x.index_select(rows.dim, higher) * weight
    if n > 1:
        x = _others(x, at, sizes, scales, mode, options)
    return region.cut(x, Rows(rows.dim, length))


def _others(x: Tensor, at: int, sizes: tuple, scales: tuple, mode: str, options: dict[str, Any]) -> Tensor:
    """Interpolation of the dims that are not cut, on as many rows as there are."""
    full = x.shape[2 + at]
    told = tuple(1.0 if d == at else s for d, s in enumerate(scales)) if scales[0] is not None else None
    sized = tuple(max(full, 1) if d == at else s for d, s in enumerate(sizes)) if sizes[0] is not None else None
    if full:
        return F.interpolate(x, sized, told, mode, **options)
    shape = [*x.shape[:2 + at], 1, *x.shape[3 + at :]]
    shape = [*F.interpolate(x.new_zeros(shape), sized, told, mode, **options).shape]
    return nothing(x, (*shape[: 2 + at], 0, *shape[3 + at :]))


def _shuffle(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """pixel_shuffle: r rows out of each."""
    x, factor = bound(args, kwargs, ("input", "upscale_factor"), {})
    rows, length = region.rows(x), region.rows(x).length * factor
    if rows.dim != -2:
        region.refuse(f"pixel_shuffle of a tensor cut along dim {x.dim() + rows.dim}")
    mine = balanced(length, region.axis.size)
    reads = tuple(((a // factor, -(-b // factor)) if a < b else (0, 0),) for a, b in mine)
    x = func(wanted(region, x, rows, reads), factor)
    a, b = mine[region.axis.index]
    return region.cut(x.narrow(-2, a - reads[region.axis.index][0][0] * factor, b - a), Rows(-2, length))


def _each(value: Any, n: int) -> tuple:
    """One value for each of n dims."""
    if value is None or isinstance(value, int | float):
        return (value,) * n
    return tuple(value) * (n if len(value) == 1 else 1)


def _without(values: tuple, at: int) -> tuple:
    return (*values[:at], 0, *values[at + 1 :])


def _padding(padding: Any, kernel: Sequence[int], dilation: tuple) -> tuple[tuple, tuple]:
    """Rows of padding before and after, in each dim."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return tuple(w // 2 for w in whole), tuple(w - w // 2 for w in whole)
    return _each(padding, len(kernel)), _each(padding, len(kernel))


def _none(region: Region, length: int) -> bool:
    first, stop = balanced(length, region.axis.size)[region.axis.index]
    return first == stop


def _some(region: Region, length: int, rows: Rows, window: Window | Spread) -> None:
    if length < 1:
        region.refuse(f"a window of {window.span} rows (padding {window.padding}) on {rows.length} rows")


SPATIAL: dict[str, Rule] = {
    name: alone(rule)
    for rule, names in (
        (_conv, ("conv1d", "conv2d", "conv3d")),
        (_conv_transpose, ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")),
        (_max_pool, ("max_pool1d", "max_pool2d", "max_pool3d")),
        (_avg_pool, ("avg_pool1d", "avg_pool2d", "avg_pool3d")),
        (_adaptive, tuple(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))),
        (_pad, ("pad",)),
        (_interpolate, ("interpolate", "upsample")),
        (_shuffle, ("pixel_shuffle",)),
    )
    for name in names
}
