"""A recurrence over all time steps whose hidden units are cut over the tensor axis.

    forward, a step      units here, of the whole h -> placed among zeros   -> sum over the axis -> the whole next h
    backward, a step     gradients of the sums here -> shares of that of h  -> sum over the axis -> the units here

One collective per step, each way. A sum with zeros takes the place of a gather: the pieces land where they belong, with
nothing to exchange before and nothing to copy after, and at these sizes the number of messages is what costs.

D directions, n sequences at a step, t all rows, h hidden units here, R features of what is passed on, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hybridpar.tensor import cells, collectives
from hybridpar.tensor.ragged import Rows
from hybridpar.wires.axis import Axis


class Weights(NamedTuple):
    """The parameters of one direction of one layer, as far as they are held here."""

    ih: Tensor  # [G h, f]
    hh: Tensor  # [G h, R]
    bias_ih: Tensor | None  # [G h]
    bias_hh: Tensor | None
    hr: Tensor | None  # [R, h]: the projection of an LSTM's output


def run(
    mode: str, directions: Sequence[Weights], x: Tensor, rows: Rows, first: Tensor, state: Tensor | None, axis: Axis
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer: x [t, f], h [D, b, R] and c [D, b, H] before the first step -> y [t, D R], last h, last c.

    All of them are whole and the same on every rank of `axis`.
    """
    x = collectives.copy(x, axis, fresh=len(directions) == 1)
    project = None if directions[0].hr is None else torch.stack([one.hr for one in directions])
    fused, bias = mode != "GRU", None  # a GRU's r multiplies its second bias: it cannot go with the first
    projected = []
    for one, rows_in in zip(directions, (x, x[rows.backwards] if len(directions) > 1 else None)):
        added = one.bias_ih + one.bias_hh if fused and one.bias_ih is not None else one.bias_ih
        projected.append(F.linear(rows_in, one.ih, added))
    if not fused and directions[0].bias_hh is not None:
        bias = _stack([one.bias_hh for one in directions]).unsqueeze(1)  # [D, 1, 3h]
    state = None if state is None else collectives.split(state, axis, -1)
    y, state = _Recurrence.apply(
        _stack(projected),
        collectives.copy(first, axis),
        state,
        _stack([one.hh for one in directions]),
        bias,
        project,
        mode,
        rows.sizes,
        axis,
    )
    last = y[:, rows.last]
    y = torch.cat([y[0], y[1][rows.backwards]], -1) if len(directions) > 1 else y[0]
    return y, last, None if state is None else collectives.gather(state, axis, -1)


def native(
    mode: str, directions: Sequence[Weights], x: Tensor, rows: Rows, first: Tensor, state: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`run` where nothing is cut, by torch's own kernels."""
    function = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[mode]
    flat, hx = [p for one in directions for p in one if p is not None], first if state is None else (first, state)
    options = (directions[0].bias_ih is not None, 1, 0.0, training, len(directions) > 1)
    if rows.sizes[0] == rows.sizes[-1]:
        y, *last = function(x.unflatten(0, (len(rows.sizes), -1)), hx, flat, *options, False)
        y = y.flatten(0, 1)
    else:
        y, *last = function(x, torch.tensor(rows.sizes), hx, flat, *options)
    return y, last[0], last[1] if len(last) > 1 else None


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)  # a view


def _cell(mode: str, sizes: Sequence[int], *given: Tensor | None) -> cells.Cell:
    """`given` are, in the forward pass, x, state and bias."""
    x, state, bias = given or (None, None, None)
    if mode == "LSTM":
        return cells.LSTM(sizes, x, state)
    return cells.GRU(sizes, x, bias) if mode == "GRU" else cells.RNN(sizes, x, relu=mode == "RNN_RELU")


class _Recurrence(Function):
    """x [D, t, G h], h [D, b, R], c [D, b, h] -> all h [D, t, R], last c.

    Gradients of h arrive whole and the same on every rank, and leave as shares.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        state: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        project: Tensor | None,
        mode: str,
        sizes: Sequence[int],
        axis: Axis,
    ) -> tuple[Tensor, Tensor | None]:
        D, t, R = *x.shape[:2], first.shape[-1]
        cell = _cell(mode, sizes, x, state, bias)
        transposed, before = weight.transpose(1, 2).contiguous(), first
        flat = x.new_zeros(D * t * R)
        steps = [y.view(D, n, R) for y, n in zip(flat.split([D * n * R for n in sizes]), sizes)]
        start, stop = axis.piece(R) if project is None else (0, R)
        inner = None
        if project is not None:
            inner = x.new_empty(D, t, project.shape[-1])
            own, down = inner.split(sizes, 1), project.transpose(1, 2).contiguous()
        for step, (n, y) in enumerate(zip(sizes, steps)):
            before = before[:, :n]
            if project is None:
                cell.forward(step, before, before[..., start:stop], transposed, y[..., start:stop])
            else:
                cell.forward(step, before, before, transposed, own[step])
                torch.bmm(own[step], down, out=y)
            before = axis.allreduce(y)
        whole = flat.view(1, t, R) if D == 1 else torch.cat(steps, 1)
        ctx.mode, ctx.sizes, ctx.axis = mode, sizes, axis
        ctx.save_for_backward(whole, first, weight, bias, project, inner, *cell.saved())
        return whole, cell.state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, first, weight, bias, project, inner, *saved = ctx.saved_tensors
        sizes, axis = ctx.sizes, ctx.axis
        before = cells.shifted(first, whole.split(sizes, 1), sizes)  # [D, t, R]
        start, stop = axis.piece(whole.shape[-1]) if project is None else (0, whole.shape[-1])
        cell = _cell(ctx.mode, sizes)
        cell.factors(saved, before[..., start:stop], grad_state)
        grads = grad[..., start:stop] if project is None else grad.clone()  # a projection wants them with later steps'
        each, carry = grads.split(sizes, 1), torch.zeros_like(first[..., start:stop])
        shares = None
        for step in reversed(range(len(sizes))):
            n = sizes[step]
            if project is None:
                own = each[step] + carry[:, :n]
            else:
                own = torch.bmm(each[step].add_(carry[:, :n]), project)
            sums = cell.backward(step, own)
            if not step and not ctx.needs_input_grad[1]:
                break
            shares = torch.bmm(sums, weight)  # [D, n, R]
            if step:
                axis.allreduce(shares)
            cell.direct(step, own, shares[..., start:stop])
            carry[:, :n] = shares[..., start:stop]
        dx, dsums = cell.inputs()
        needs = ctx.needs_input_grad
        return (
            dx,
            shares if needs[1] else None,
            cell.state,
            torch.bmm(dsums.transpose(1, 2), before) if needs[3] else None,
            dsums.sum(1, keepdim=True) if bias is not None else None,
            torch.bmm(grads.transpose(1, 2), inner) if project is not None else None,
            None,
            None,
            None,
        )
