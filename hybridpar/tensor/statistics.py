"""Rules of a region for norms: their means and variances are those of all rows.

    batch norm      over samples and places of each channel          x seen as [b, c, ..]
    instance norm   over the places of each sample and channel       x seen as [1, b * c, ..]
    group norm      over places and channels of a group              x seen as [1, b * groups, ..]
    layer norm      over the trailing dims, if the rows are there     x seen as [1, all leading, ..]

    forward    allgather of each index's mean and sum of squared deviations
    backward   allreduce of sum g and sum g xhat

(Batch norm: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167. Combining: Chan, Golub & LeVeque 1979.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hybridpar.shard import balanced
from hybridpar.tensor.pointwise import bound, whole_shape
from hybridpar.tensor.reading import alone
from hybridpar.tensor.region import Region, Rows, Rule
from hybridpar.wires.axis import Axis


def standardise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, counts: Sequence[int], eps: float, axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """x [b, c, ..] with mean 0 and variance 1 in each channel, over all indices; and the means and variances [c].

    `counts[index]` values of a channel lie at each index. `weight` and `bias` [c] are applied; their gradients are
    shares. Second derivatives are refused.

    Example:
        >>> y, mean, variance = standardise(torch.tensor([[[1.0, 3.0]]]), None, None, [2], 0.0, Alone("tensor"))
        >>> y, mean, variance
        (tensor([[[-1.,  1.]]]), tensor([2.]), tensor([1.]))
    """
    return _Standardise.apply(x, weight, bias, tuple(counts), eps, axis)


class _Standardise(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, counts: tuple[int, ...], eps: float, axis: Axis
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _moments(x, counts, axis)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.axis, ctx.eps, ctx.count = axis, eps, sum(counts)
        ctx.mark_non_differentiable(mean, variance)
        kind = x.dtype if weight is None else weight.dtype
        out = F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, eps=eps) if x.numel() else x.clone()
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        rest = (-1, *(1,) * (x.dim() - 2))
        inverse = (variance + ctx.eps).rsqrt()
        dims = [d for d in range(x.dim()) if d != 1]
        wide = grad.to(mean.dtype)
        by_bias = wide.sum(dims)
        by_weight = (wide * x).sum(dims).sub_(by_bias * mean).mul_(inverse)
        sums = ctx.axis.allreduce(torch.stack((by_bias, by_weight)))
        scale = inverse if weight is None else inverse * weight.to(mean.dtype)
        slope = scale * inverse * sums[1] / ctx.count
        shift = scale * sums[0] / ctx.count - slope * mean
        out = wide * scale.view(rest)
        out.addcmul_(x.to(mean.dtype), slope.view(rest), value=-1).sub_(shift.view(rest))
        affine = (None, None) if weight is None else (by_weight.to(weight.dtype), by_bias.to(weight.dtype))
        return out.to(x.dtype), *affine, None, None, None


def _moments(x: Tensor, counts: tuple[int, ...], axis: Axis) -> tuple[Tensor, Tensor]:
    """The mean and the (biased) variance of each channel over all indices."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dims = [d for d in range(x.dim()) if d != 1]
    if x.numel():
        mine = torch.stack(torch.var_mean(x.to(wide), dims, correction=0))
    else:
        mine = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
    variances, means = axis.allgather(mine[None]).unbind(1)  # [n, c] each
    weights = torch.tensor(counts, dtype=wide, device=x.device)[:, None] / sum(counts)
    mean = (means * weights).sum(0)
    return mean, ((variances + (means - mean).square()) * weights).sum(0)


def _batch(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    defaults = {"training": False, "momentum": 0.1, "eps": 1e-5}
    x, mean, variance, weight, bias, training, momentum, eps = bound(args, kwargs, names, defaults)
    rows = _rows(region, x)
    if not training:
        return region.cut(func(*args, **kwargs), rows)
    counts = _counts(region, x, rows, x.shape[1])
    if sum(counts) == 1:
        region.refuse(f"a batch norm of one value per channel (shape {list(whole_shape(region, x))})")
    out, now, spread = standardise(x, weight, bias, counts, eps, region.axis)
    move(mean, now, momentum)
    move(variance, spread * (sum(counts) / (sum(counts) - 1)), momentum)
    return region.cut(out, rows)


def _instance(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    defaults = {"use_input_stats": True, "momentum": 0.1, "eps": 1e-5}
    x, mean, variance, weight, bias, own, momentum, eps = bound(args, kwargs, names, defaults)
    rows = _rows(region, x)
    if not own:
        return region.cut(func(*args, **kwargs), rows)
    b, c = x.shape[:2]
    counts = _counts(region, x, rows, b * c)
    if sum(counts) == 1:
        region.refuse(f"an instance norm of one value per channel (shape {list(whole_shape(region, x))})")
    out, now, spread = standardise(x.reshape(1, b * c, *x.shape[2:]), None, None, counts, eps, region.axis)
    move(mean, now.view(b, c).mean(0), momentum)
    move(variance, (spread * (sum(counts) / (sum(counts) - 1))).view(b, c).mean(0), momentum)
    return region.cut(_affine(out.view(x.shape), weight, bias), rows)


def _group(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    x, groups, weight, bias, eps = bound(args, kwargs, ("input", "num_groups", "weight", "bias", "eps"), {"eps": 1e-5})
    rows = _rows(region, x)
    b, c = x.shape[:2]
    counts = _counts(region, x, rows, b * groups)
    out, *_ = standardise(x.reshape(1, b * groups, c // groups, *x.shape[2:]), None, None, counts, eps, region.axis)
    return region.cut(_affine(out.view(x.shape), weight, bias), rows)


def _layer(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, eps = bound(args, kwargs, names, {"eps": 1e-5})
    rows, shape = region.rows(x), tuple(shape)
    if -rows.dim > len(shape):
        return region.cut(func(*args, **kwargs), rows)
    lead = x.shape[: x.dim() - len(shape)]
    counts = _counts(region, x, rows, prod(lead))
    out, *_ = standardise(x.reshape(1, prod(lead), *x.shape[len(lead) :]), None, None, counts, eps, region.axis)
    weight, bias = (None if p is None else region.here(p, rows) for p in (weight, bias))
    out = out.view(x.shape) if weight is None else out.view(x.shape) * weight
    return region.cut(out if bias is None else out + bias, rows)


def _rows(region: Region, x: Tensor) -> Rows:
    rows = region.rows(x)
    if x.dim() + rows.dim < 2:
        region.refuse(f"a norm of a tensor cut along dim {x.dim() + rows.dim}")
    return rows


def _counts(region: Region, x: Tensor, rows: Rows, channels: int) -> list[int]:
    """How many values of each channel lie at each index."""
    others = prod(size for d, size in enumerate(x.shape) if d != x.dim() + rows.dim)
    return [(b - a) * others // channels for a, b in balanced(rows.length, region.axis.size)]


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    rest = (-1, *(1,) * (x.dim() - 2))
    x = x if weight is None else x * weight.view(rest)
    return x if bias is None else x + bias.view(rest)


def move(statistic: Tensor | None, now: Tensor, momentum: float) -> None:
    """Move a running statistic towards what it is now."""
    if statistic is not None:
        with torch.no_grad():
            statistic.mul_(1 - momentum).add_(now.to(statistic.dtype), alpha=momentum)


STATISTICS: dict[str, Rule] = {
    name: alone(rule)
    for name, rule in (
        ("batch_norm", _batch),
        ("instance_norm", _instance),
        ("group_norm", _group),
        ("layer_norm", _layer),
    )
}
