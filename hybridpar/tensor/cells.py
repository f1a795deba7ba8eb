"""One step of each kind of recurrence, forward and backward, on the hidden units held here.

    LSTM    i, f, g, o = W h + x                  c' = f c + i g         h' = o tanh c'
    GRU     r, z of W h + b + x                   n = tanh(x + r (W h + b))       h' = n + z (h - n)
    RNN     W h + x                               h' = tanh or relu of it

(Hochreiter and Schmidhuber 1997; Cho et al. 2014, in torch's variant, which multiplies by r after the product.)
x is the projected input of all steps. A backward step is only products of the incoming gradient with factors that do
not depend on it, so `factors` works them out for all steps at once, and the loop stays short.

D directions, n sequences at a step, t all rows of all steps, h hidden units here, H of all, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Steps = tuple[Tensor, ...]  # a tensor [D, t, ..] as views of its steps


class Cell(Protocol):
    """What a recurrence asks of its kind."""

    gates: int
    state: Tensor | None  # [D, b, h]: what the cell remembers besides h; each sequence's own last one

    def forward(self, step: int, before: Tensor, own: Tensor, weight: Tensor, out: Tensor) -> None:
        """From the whole h [D, n, H] before this step, of which `own` are the units held here, to those in `out`."""

    def saved(self) -> list[Tensor | None]:
        """What the backward pass needs."""

    def factors(self, saved: Sequence[Tensor | None], owns: Tensor, remembered: Tensor | None) -> None:
        """Make ready for `backward`, with h [D, t, h] before every step, and the gradient of `state`."""

    def backward(self, step: int, grad: Tensor) -> Tensor:
        """The gradient [D, n, G h] of W h from that of h'."""

    def direct(self, step: int, grad: Tensor, into: Tensor) -> None:
        """Add what reaches h from h' other than through W."""

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Of all steps, the gradients [D, t, G h] of x and of W h."""


class LSTM:
    """i, f, g, o in this order; remembers c."""

    gates = 4

    def __init__(self, sizes: Sequence[int], x: Tensor | None = None, state: Tensor | None = None) -> None:
        self.sizes, self.state = sizes, state
        if x is None:
            return
        self._first = state
        units = x.shape[-1] // 4
        self._gates, self._cells = torch.empty_like(x), x.new_empty(*x.shape[:-1], units)
        self._x, self._sums = x.split(sizes, 1), self._gates.split(sizes, 1)
        self._each = [gate.split(sizes, 1) for gate in self._gates.split(units, -1)]
        self._after = self._cells.split(sizes, 1)
        self.state = state.clone()

    def forward(self, step: int, before: Tensor, own: Tensor, weight: Tensor, out: Tensor) -> None:
        i, f, g, o = (gate[step] for gate in self._each)
        sums, cell, n = self._sums[step], self._after[step], self.sizes[step]
        torch.baddbmm(self._x[step], before, weight, out=sums)
        sums[..., : 2 * i.shape[-1]].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        state = self.state[:, :n]
        torch.mul(f, state, out=cell).addcmul_(i, g)
        state.copy_(cell)
        torch.mul(o, cell.tanh(), out=out)

    def saved(self) -> list[Tensor | None]:
        return [self._gates, self._cells, self._first]

    def factors(self, saved: Sequence[Tensor | None], owns: Tensor, remembered: Tensor | None) -> None:
        gates, cells, first = saved
        i, f, g, o = gates.chunk(4, -1)
        tanh = cells.tanh()
        before = shifted(first, cells.split(self.sizes, 1), self.sizes)  # [D, t, h]
        self._grads = torch.empty_like(gates)
        factors = torch.stack([i * (1 - i) * g, f * (1 - f) * before, i * (1 - g * g), o * (1 - o) * tanh], -2)
        self._forget, self._cell = f.split(self.sizes, 1), (o * (1 - tanh * tanh)).split(self.sizes, 1)
        self._ifg, self._out = factors[..., :3, :].split(self.sizes, 1), factors[..., 3, :].split(self.sizes, 1)
        each = self._grads.unflatten(-1, (4, -1))
        self._dsums = self._grads.split(self.sizes, 1)
        self._difg, self._do = each[..., :3, :].split(self.sizes, 1), each[..., 3, :].split(self.sizes, 1)
        self.state = torch.zeros_like(first) if remembered is None else remembered.clone()

    def backward(self, step: int, grad: Tensor) -> Tensor:
        state = self.state[:, : self.sizes[step]]
        torch.mul(grad, self._out[step], out=self._do[step])
        state.addcmul_(grad, self._cell[step])
        torch.mul(state.unsqueeze(-2), self._ifg[step], out=self._difg[step])
        state.mul_(self._forget[step])
        return self._dsums[step]

    def direct(self, step: int, grad: Tensor, into: Tensor) -> None:
        return None

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self._grads, self._grads


class GRU:
    """r, z, n in this order; `bias` [D, 1, 3h] belongs to W h."""

    gates = 3
    state = None

    def __init__(self, sizes: Sequence[int], x: Tensor | None = None, bias: Tensor | None = None) -> None:
        self.sizes, self._bias = sizes, bias
        if x is None:
            return
        units = x.shape[-1] // 3
        self._hidden = torch.empty_like(x)  # W h + b, of which r and z become the gates
        self._new = x.new_empty(*x.shape[:-1], units)
        self._x, self._sums, self._n = (t.split(sizes, 1) for t in (x, self._hidden, self._new))

    def forward(self, step: int, before: Tensor, own: Tensor, weight: Tensor, out: Tensor) -> None:
        x, sums, new = self._x[step], self._sums[step], self._n[step]
        units = new.shape[-1]
        if self._bias is None:
            torch.bmm(before, weight, out=sums)
        else:
            torch.baddbmm(self._bias, before, weight, out=sums)
        sums[..., : 2 * units].add_(x[..., : 2 * units]).sigmoid_()
        r, z, product = sums.split(units, -1)
        torch.addcmul(x[..., 2 * units :], r, product, out=new).tanh_()
        torch.lerp(new, own, z, out=out)

    def saved(self) -> list[Tensor | None]:
        return [self._hidden, self._new]

    def factors(self, saved: Sequence[Tensor | None], owns: Tensor, remembered: Tensor | None) -> None:
        hidden, new = saved
        r, z, product = hidden.chunk(3, -1)
        self._dn = (1 - z) * (1 - new * new)
        factors = torch.stack([self._dn * product * r * (1 - r), (owns - new) * z * (1 - z), self._dn * r], -2)
        self._factors, self._z = factors.split(self.sizes, 1), z.split(self.sizes, 1)
        self._incoming, self._grads = torch.empty_like(new), torch.empty_like(hidden)
        self._come = self._incoming.split(self.sizes, 1)
        self._dsums = self._grads.split(self.sizes, 1)
        self._each = self._grads.unflatten(-1, (3, -1)).split(self.sizes, 1)

    def backward(self, step: int, grad: Tensor) -> Tensor:
        self._come[step].copy_(grad)
        torch.mul(grad.unsqueeze(-2), self._factors[step], out=self._each[step])
        return self._dsums[step]

    def direct(self, step: int, grad: Tensor, into: Tensor) -> None:
        into.addcmul_(grad, self._z[step])

    def inputs(self) -> tuple[Tensor, Tensor]:
        units = self._incoming.shape[-1]
        return torch.cat([self._grads[..., : 2 * units], self._incoming * self._dn], -1), self._grads


class RNN:
    """One tanh, or relu."""

    gates = 1
    state = None

    def __init__(self, sizes: Sequence[int], x: Tensor | None = None, relu: bool = False) -> None:
        self.sizes, self._relu = sizes, relu
        if x is not None:
            self._new = torch.empty_like(x)
            self._x, self._n = x.split(sizes, 1), self._new.split(sizes, 1)

    def forward(self, step: int, before: Tensor, own: Tensor, weight: Tensor, out: Tensor) -> None:
        new = torch.baddbmm(self._x[step], before, weight, out=self._n[step])
        out.copy_(new.relu_() if self._relu else new.tanh_())

    def saved(self) -> list[Tensor | None]:
        return [self._new]

    def factors(self, saved: Sequence[Tensor | None], owns: Tensor, remembered: Tensor | None) -> None:
        (new,) = saved
        self._factors = ((new > 0).to(new.dtype) if self._relu else 1 - new * new).split(self.sizes, 1)
        self._grads = torch.empty_like(new)
        self._dsums = self._grads.split(self.sizes, 1)

    def backward(self, step: int, grad: Tensor) -> Tensor:
        return torch.mul(grad, self._factors[step], out=self._dsums[step])

    def direct(self, step: int, grad: Tensor, into: Tensor) -> None:
        return None

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self._grads, self._grads


def shifted(first: Tensor, steps: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """What there was before each step: `first`, then each step's own; sequences that have ended fall away."""
    before = [first, *steps[:-1]]
    return torch.cat([x[:, :n] for x, n in zip(before, sizes)], 1)
