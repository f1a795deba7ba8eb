"""Rules of a region for convolutions, plain and transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hybridpar.shard import balanced
from hybridpar.tensor.halo import Spread, Window, windows
from hybridpar.tensor.pointwise import bound
from hybridpar.tensor.reading import alone, check_some, each, none_here, nothing, place, wanted, without
from hybridpar.tensor.region import Region, Rows, Rule


def _conv(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    x, weight, bias, stride, padding, dilation, groups = bound(args, kwargs, names, defaults)
    rows, n = region.rows(x), weight.dim() - 2
    at = place(region, x, rows, n)
    stride, dilation = each(stride, n), each(dilation, n)
    kernel = weight.shape[2:]
    before, after = _padding(padding, kernel, dilation)
    window = Window(kernel[at], stride[at], before[at], dilation[at])
    length = window.outputs(rows.length, after[at])
    check_some(region, length, rows, window)
    x = wanted(region, x, rows, windows(window, length, region.axis.size))
    before, after = without(before, at), without(after, at)
    if before != after:  # of "same", where a kernel is even: torch pads the end more
        x = F.pad(x, [p for b, a in reversed([*zip(before, after)]) for p in (0, a - b)])
    if none_here(region, length):
        shape = [
            Window(k, s, b, d).outputs(h, b) for k, s, b, d, h in zip(kernel, stride, before, dilation, x.shape[2:])
        ]
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
    stride, dilation, padding, more = (each(value, n) for value in (stride, dilation, padding, more))
    spreads = [Spread(*one) for one in zip(weight.shape[2:], stride, padding, dilation)]
    spread = spreads[at]
    length = spread.outputs(rows.length, more[at])
    check_some(region, length, rows, spread)
    reads = windows(spread, length, region.axis.size)
    x = wanted(region, x, rows, reads)
    first, stop = balanced(length, region.axis.size)[region.axis.index]
    if first == stop:
        shape = [one.outputs(h, m) for one, h, m in zip(spreads, x.shape[2:], more)]
        channels = weight.shape[1] * groups
        out = nothing(x, (len(x), channels, *shape[:at], 0, *shape[at + 1 :]), weight, bias)
    else:
        out = func(x, weight, bias, stride, without(padding, at), without(more, at), groups, dilation)
        out = out.narrow(rows.dim, first - spread.begins(reads[region.axis.index][0][0]), stop - first)
    return region.cut(out, Rows(rows.dim, length))


def _padding(padding: Any, kernel: Sequence[int], dilation: tuple) -> tuple[tuple, tuple]:
    """Rows of padding before and after, in each dim."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return tuple(w // 2 for w in whole), tuple(w - w // 2 for w in whole)
    return each(padding, len(kernel)), each(padding, len(kernel))


CONVOLUTIONS: dict[str, Rule] = {f"conv{n}d": alone(_conv) for n in (1, 2, 3)}
CONVOLUTIONS |= {f"conv_transpose{n}d": alone(_conv_transpose) for n in (1, 2, 3)}
