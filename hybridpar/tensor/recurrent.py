"""nn.LSTM, nn.GRU and nn.RNN: by hidden units over the tensor axis, by layers over the pipeline.

    tensor      Recurrent: each index computes its units of every layer, and each step makes h whole again
    pipeline    Layer, Layer, ...: unstack(rnn), each of which a stage can hold

What goes in and what comes out, states included, is whole on every rank: the module around notices nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hybridpar.seeds import Draw
from hybridpar.shard import Spec
from hybridpar.tensor.dropout import Dropout
from hybridpar.tensor.gates import KINDS, LEAVES, Options, checked
from hybridpar.tensor.linear import hold
from hybridpar.tensor.ragged import Batch, Rows
from hybridpar.tensor.recurrence import Weights, native, run
from hybridpar.wires.axis import Alone, Axis

States = Tensor | tuple[Tensor, Tensor]  # h, or h and c of an LSTM
Unit = tuple[str, nn.Module]


class Recurrent(nn.Module):
    """The hidden units of an nn.LSTM, nn.GRU or nn.RNN that belong to this index; inputs and outputs are whole.

    Called as the module it replaces, with a batch, one sequence or a PackedSequence, with or without initial states;
    returns what that returns. Parameters keep their names. Between layers dropout draws masks that are the same in
    every layout. ValueError for other modules, parametrized ones, and fewer units than ranks.

    Example:
        >>> from hybridpar.seeds import Draw
        >>> rnn = Recurrent(nn.LSTM(8, 6, num_layers=2), Alone("tensor"), Draw(seed=0))
        >>> y, (h, c) = rnn(torch.zeros(5, 3, 8))
        >>> y.shape, h.shape
        (torch.Size([5, 3, 6]), torch.Size([2, 3, 6]))
    """

    def __init__(self, rnn: nn.Module, axis: Axis, draw: Draw, name: str = "rnn") -> None:
        super().__init__()
        self.options, self.axis, self.name = checked(rnn, axis.size, name), axis, name
        for one in fields(Options):  # users size their initial states by them
            setattr(self, one.name, getattr(self.options, one.name))
        between = range(1, self.num_layers) if self.dropout else ()
        masks = {str(k): Dropout(self.dropout, f"{name}.{k}", draw) for k in between}
        self.masks = nn.ModuleDict(masks) if masks else {}  # by the layer that they come before
        self.train(rnn.training)
        for parameter, spec in self.specs().items():
            setattr(self, parameter, hold(getattr(rnn, parameter), spec, axis.index))

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter."""
        layers = (self.options.specs(k, self.axis.size) for k in range(self.num_layers))
        return {name: spec for layer in layers for name, spec in layer.items()}

    def forward(
        self, input: Tensor | PackedSequence, hx: States | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        batch = Batch.of(input, self.options, self.input_size, self.name)
        x, last = batch.data, []
        for k, (h, c) in enumerate(_enter(batch, *_pair(hx, self.options, self.name), self.options, self.name)):
            x, *states = _layer(self, k, x, batch.rows, h, c)
            last.append(states)
        h, c = (None if one[0] is None else batch.leave(torch.cat(one)) for one in zip(*last))
        return batch.output(x), h if c is None else (h, c)

    def flatten_parameters(self) -> None:
        """Nothing: torch's own kernels alone want their weights in one piece."""

    def restart(self, *_: Any) -> None:
        """Count calls, of which each has its own masks, from here; a forward pre-hook of the module around."""
        for mask in self.masks.values():
            mask.restart()

    def extra_repr(self) -> str:
        start, stop = self.axis.piece(self.hidden_size)
        return f"{self.options}, units {start} to {stop}"


class Layer(nn.Module):
    """One layer, both directions, of a recurrence that `unstack` has taken apart; parameters keep their names.

    The first takes what the whole takes, a batch [l, b, f] and maybe states, and the last returns what the whole
    returns. Between them travel the batch, the initial states, and the last states so far.
    """

    def __init__(self, rnn: Recurrent, layer: int) -> None:
        super().__init__()
        self.options, self.axis, self.name, self.layer = rnn.options, rnn.axis, rnn.name, layer
        self.masks = nn.ModuleDict({str(layer): rnn.masks[str(layer)]}) if str(layer) in rnn.masks else {}
        self.train(rnn.training)
        for name in self.options.shapes(layer):
            setattr(self, name, getattr(rnn, name))

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter."""
        return self.options.specs(self.layer, self.axis.size)

    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        cx: Tensor | None = None,
        h_n: Tensor | None = None,
        c_n: Tensor | None = None,
    ) -> tuple[Any, ...]:
        options, name, k = self.options, f"{self.name}, layer {self.layer}", self.layer
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise ValueError(f"{name}: a recurrence over several pipeline stages takes a padded batch of 3 dims")
        hx, cx = (hx, cx) if k else _pair(hx, options, name)
        batch = Batch.of(input, options, options.features(k), name)
        h, c = _enter(batch, hx, cx, options, name)[k]
        x, h, c = _layer(self, k, batch.data, batch.rows, h, c)
        h_n = h if h_n is None else torch.cat([h_n, h])
        c_n = c if c_n is None else torch.cat([c_n, c])
        if k < options.num_layers - 1:
            return batch.output(x), hx, cx, h_n, c_n
        return batch.output(x), h_n if c_n is None else (h_n, c_n)

    def extra_repr(self) -> str:
        start, stop = self.axis.piece(self.options.hidden_size)
        return f"{self.options}, layer {self.layer}, units {start} to {stop}"


def unstack(rnn: nn.Module, draw: Draw, name: str = "rnn") -> list[Layer]:
    """The layers of a recurrence, plain or cut, which together compute what it computes when each calls the next.

    Their parameters are the very same ones under the same names, so all of them are units of the name `name`.

    Example:
        >>> from hybridpar.seeds import Draw
        >>> first, second = unstack(nn.GRU(8, 6, num_layers=2), Draw(seed=0))
        >>> y, h = second(*first(torch.zeros(5, 3, 8)))
        >>> [name for name, _ in second.named_parameters()][:2], h.shape
        (['weight_ih_l1', 'weight_hh_l1'], torch.Size([2, 3, 6]))
    """
    rnn = rnn if isinstance(rnn, Recurrent) else Recurrent(rnn, Alone("tensor"), draw, name)
    return [Layer(rnn, k) for k in range(rnn.num_layers)]


def unstacked(units: Sequence[Unit], draw: Draw) -> list[Unit]:
    """The units of a chain, recurrences of several layers replaced by their layers."""
    found: list[Unit] = []
    for name, module in units:
        several = isinstance(module, (Recurrent, *KINDS)) and module.num_layers > 1
        found += [(name, layer) for layer in unstack(module, draw, name)] if several else [(name, module)]
    return found


def _pair(hx: States | None, options: Options, name: str) -> tuple[Tensor | None, Tensor | None]:
    """h and c as the user gives them."""
    if options.mode == "LSTM" and hx is not None:
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            raise ValueError(f"{name}: an LSTM's initial states are a pair (h, c), not a {type(hx).__name__}")
        return hx[0], hx[1]
    return hx, None


def _enter(
    batch: Batch, h: Tensor | None, c: Tensor | None, options: Options, name: str
) -> list[tuple[Tensor, Tensor | None]]:
    """The initial states of each layer, [D, b, R] and [D, b, H]."""
    pieces = batch.enter(h, options.passed, name).chunk(options.num_layers)
    if options.mode != "LSTM":
        return [(piece, None) for piece in pieces]
    return list(zip(pieces, batch.enter(c, options.hidden_size, name).chunk(options.num_layers)))


def _layer(
    owner: Recurrent | Layer, k: int, x: Tensor, rows: Rows, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Layer `k`, whose parameters and mask `owner` has: x [t, f] -> y [t, D R], last h, last c."""
    options, kind = owner.options, x.device.type
    if str(k) in owner.masks:
        x = rows.by_sample(owner.masks[str(k)], x)
    dtype, mixed = x.dtype, torch.is_autocast_enabled(kind)
    if mixed:  # as torch does: its GRU and RNN on CPUs keep the type of their weights
        lower = options.mode == "LSTM" or kind != "cpu"
        dtype = torch.get_autocast_dtype(kind) if lower else getattr(owner, f"weight_hh_l{k}").dtype

    def cast(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.to(dtype) if mixed else p

    directions = [
        Weights(*(cast(getattr(owner, f"{leaf}_l{k}{end}", None)) for leaf in LEAVES)) for end in options.directions
    ]
    with torch.autocast(kind, enabled=False):
        given = options.mode, directions, cast(x), rows, cast(h), cast(c)
        return native(*given, owner.training) if owner.axis.size == 1 else run(*given, owner.axis)
