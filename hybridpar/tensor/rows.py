"""Rows of a tensor that is cut by rows, fetched from the other indices and, as gradients, given back.

    function   forward                                      backward
    fetch      own and others' rows -> the rows wanted      give: each row back to who holds it, and added there
    total      allreduce                                    allreduce
    speak      identity                                     the gradient at index 0, zeros at the others

Inside of a region (see `space`) whatever is not cut is whole on each index and has a share of its gradient there.
`total` keeps that so, `collectives.copy` makes shares a gradient where something whole comes in, `speak` makes a
gradient shares where it goes out. All messages are posted before any is waited for, so no order can block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hybridpar.tensor import collectives
from hybridpar.tensor.halo import Ranges, Trade
from hybridpar.wires.axis import Axis

_TAG = 71  # one is enough: messages between two ranks are met in the order of posting, and none is left at the end


def fetch(x: Tensor, dim: int, trade: Trade, axis: Axis, fill: float = 0.0) -> Tensor:
    """The rows `trade.wanted` along `dim`, one after another; `fill` where there are none.

    Example:
        >>> fetch(torch.ones(1, 2), 1, Trade((0, 2), ((-1, 2),), (), (), True), Alone("tensor"))
        tensor([[0., 1., 1.]])
    """
    if trade.still and trade.wanted == (trade.held,):
        return x
    return _Fetch.apply(x, dim, trade, axis, fill)


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all `x` over `axis`, for a use that differs between ranks, or whose gradient is a share."""
    return collectives.copy(collectives.sum_(x, axis), axis)


def speak(x: Tensor, axis: Axis) -> Tensor:
    """`x`, the same on all, for a use that is the same on all: index 0 speaks for them in the backward pass."""
    return _Speak.apply(x, axis)


class _Fetch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, trade: Trade, axis: Axis, fill: float) -> Tensor:
        ctx.dim, ctx.trade, ctx.axis = dim, trade, axis
        held, wanted = (trade.held,), trade.wanted
        coming = [(rows, axis.recv(_empty(x, dim, rows), i, _TAG)) for i, rows in trade.receives]
        going = [axis.send(_rows(x, dim, held, rows).contiguous(), j, _TAG) for j, rows in trade.sends]
        out = _empty(x, dim, wanted)
        if sum(b - a for _, rows in trade.receives for a, b in rows) + sum(b - a for a, b in trade.own) < trade.rows:
            out.fill_(fill)
        _put(out, dim, wanted, trade.own, _rows(x, dim, held, trade.own))
        for rows, handle in coming:
            _put(out, dim, wanted, rows, handle.wait())
        for handle in going:
            handle.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Give.apply(grad, ctx.dim, ctx.trade, ctx.axis), None, None, None, None


class _Give(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, dim: int, trade: Trade, axis: Axis) -> Tensor:
        ctx.dim, ctx.trade, ctx.axis = dim, trade, axis
        held, wanted = (trade.held,), trade.wanted
        coming = [(rows, axis.recv(_empty(grad, dim, rows), i, _TAG)) for i, rows in trade.sends]
        going = [axis.send(_rows(grad, dim, wanted, rows).contiguous(), j, _TAG) for j, rows in trade.receives]
        out = _empty(grad, dim, held)
        if trade.own != held:
            out.zero_()
        _put(out, dim, held, trade.own, _rows(grad, dim, wanted, trade.own))
        for rows, handle in coming:
            _put(out, dim, held, rows, handle.wait(), add=True)
        for handle in going:
            handle.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Fetch.apply(grad, ctx.dim, ctx.trade, ctx.axis, 0.0), None, None, None


class _Speak(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.axis.index == 0 else torch.zeros_like(grad)), None


def _empty(x: Tensor, dim: int, rows: Ranges) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(stop - start for start, stop in rows)
    return x.new_empty(shape)


def _spans(layout: Ranges, rows: Ranges) -> list[tuple[int, int]]:
    """(first place, how many) of each of `rows`, which is within one range of `layout`."""
    found = []
    for start, stop in rows:
        before = 0
        for a, b in layout:
            if a <= start and stop <= b:
                found.append((before + start - a, stop - start))
                break
            before += b - a
    return found


def _rows(x: Tensor, dim: int, layout: Ranges, rows: Ranges) -> Tensor:
    """`rows` of `x`, whose rows are those of `layout`."""
    pieces = [x.narrow(dim, first, count) for first, count in _spans(layout, rows)]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)


def _put(out: Tensor, dim: int, layout: Ranges, rows: Ranges, x: Tensor, add: bool = False) -> None:
    first = 0
    for place, count in _spans(layout, rows):
        there, piece = out.narrow(dim, place, count), x.narrow(dim, first, count)
        there.add_(piece) if add else there.copy_(piece)
        first += count
