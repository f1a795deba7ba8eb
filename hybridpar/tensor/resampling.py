"""Rules of a region for padding and resampling: each output row is made of one or two rows at known places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridpar.shard import balanced
from hybridpar.tensor.halo import Window, bordered, places, runs, windows
from hybridpar.tensor.pointwise import bound
from hybridpar.tensor.reading import alone, each, nothing, place, wanted
from hybridpar.tensor.region import Region, Rows, Rule


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
    return (
        x
        if here == [*range(x.shape[rows.dim])]
        else x.index_select(rows.dim, torch.tensor(here, device=x.device, dtype=torch.long))
    )


def _interpolate(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    x, size, scale, mode, corners, again, smooth = bound(args, kwargs, names, {"mode": "nearest"})
    n, rows = x.dim() - 2, region.rows(x)
    at = place(region, x, rows, n)
    if smooth or mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear"):
        region.refuse(f"interpolate with mode={mode!r}, antialias={bool(smooth)}")
    sizes, scales = each(size, n), each(scale, n)
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
    shape = [*x.shape[: 2 + at], 1, *x.shape[3 + at :]]
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


RESAMPLING: dict[str, Rule] = {
    name: alone(rule)
    for name, rule in (
        ("pad", _pad),
        ("interpolate", _interpolate),
        ("upsample", _interpolate),
        ("pixel_shuffle", _shuffle),
    )
}
