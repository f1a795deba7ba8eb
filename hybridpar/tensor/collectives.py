"""Collectives that autograd can pass through, each beside its conjugate.

    function      forward          backward         input -> output along the axis
    copy          identity         allreduce        same on all -> same on all, used differently by each
    sum_          allreduce        identity         one term each -> their sum, same on all
    split         own piece        allgather        same on all -> one piece each
    gather        allgather        own piece        one piece each -> same on all, used alike by each
    gather_sum    allgather        reduce_scatter   one piece each -> same on all, used differently by each
    scatter_sum   reduce_scatter   allgather        one term each -> a piece of their sum each

copy and sum_ are f and g of Shoeybi et al. 2019 (https://arxiv.org/abs/1909.08053, figure 3); gather_sum and
scatter_sum are g and g-bar of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198, figure 5). Pieces are those
of `shard.balanced`. Inputs need not be contiguous and are never changed, except where `sum_` is told so.
Each backward is the conjugate itself, so second derivatives are right too.

On an axis of size 1 every function returns its input, with no node in the graph, so that callers need not look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hybridpar.wires.axis import Axis


def copy(x: Tensor, axis: Axis, fresh: bool = False) -> Tensor:
    """`x` as it is; its gradient is summed over `axis`.

    `fresh` says that the result has one use, whose backward makes a new tensor: the gradient is then summed in place.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> copy(x, Alone("tensor")) is x
        True
    """
    return x if axis.size == 1 else _Copy.apply(x, axis, fresh)


def sum_(x: Tensor, axis: Axis, fresh: bool = False) -> Tensor:
    """The sum of all `x` over `axis`; its gradient is handed through.

    `fresh` says that nobody else holds `x` and no backward needs it: it is then summed in place.
    """
    return x if axis.size == 1 else _Sum.apply(x, axis, fresh)


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This index's piece of `x` along `dim`."""
    return x if axis.size == 1 else _Split.apply(x, axis, dim)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All pieces `x` along `dim`, for a use that is the same on every rank: the gradient is not summed."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def gather_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All pieces `x` along `dim`, for a use that differs between ranks: the gradients are summed."""
    return x if axis.size == 1 else _GatherSum.apply(x, axis, dim)


def scatter_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This index's piece along `dim` of the sum of all `x`."""
    return x if axis.size == 1 else _ScatterSum.apply(x, axis, dim)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, fresh: bool) -> Tensor:
        ctx.axis, ctx.fresh = axis, fresh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A graph of the backward pass itself would need the gradient as it came.
        return _Sum.apply(grad, ctx.axis, ctx.fresh and not torch.is_grad_enabled()), None, None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, fresh: bool) -> Tensor:
        ctx.axis = axis
        if fresh and x.is_contiguous():
            ctx.mark_dirty(x)
            return axis.allreduce(x)
        return axis.allreduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Copy.apply(grad, ctx.axis, False), None, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        start, stop = axis.piece(x.shape[dim])
        return x.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.axis, ctx.dim), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.allgather(x.contiguous(), dim % x.dim())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Split.apply(grad, ctx.axis, ctx.dim), None, None


class _GatherSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.allgather(x.contiguous(), dim % x.dim())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _ScatterSum.apply(grad, ctx.axis, ctx.dim), None, None


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.reduce_scatter(x.contiguous(), dim % x.dim())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _GatherSum.apply(grad, ctx.axis, ctx.dim), None, None
