"""What an nn.LSTM, nn.GRU or nn.RNN is made of, and how its parameters are cut by hidden units.

    weight_hh_l0 of 4 gates and 4 units      i0 i1 i2 i3 | f0 f1 f2 f3 | g0 g1 g2 g3 | o0 o1 o2 o3
    index 0 of 2 holds                       i0 i1         f0 f1         g0 g1         o0 o1
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from hybridpar.shard import Spec, balanced, cut
from hybridpar.tensor.linear import check_plain

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
LEAVES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # torch's order
KINDS = (nn.LSTM, nn.GRU, nn.RNN)


@dataclass(frozen=True)
class Options:
    """What the module was made with, under torch's names.

    Example:
        >>> Options.of(nn.GRU(3, 4)).specs(0, degree=2)["weight_hh_l0"].held(1)
        ((2, 4), (6, 8), (10, 12))
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    @classmethod
    def of(cls, rnn: nn.Module) -> Options:
        """Those of a module that has them as attributes."""
        return cls(**{one.name: getattr(rnn, one.name) for one in fields(cls)})

    @property
    def directions(self) -> tuple[str, ...]:
        """What the names of each direction's parameters end with."""
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def passed(self) -> int:
        """How many features each direction passes on."""
        return self.proj_size or self.hidden_size

    def features(self, layer: int) -> int:
        """How many features go into a layer."""
        return len(self.directions) * self.passed if layer else self.input_size

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The whole shapes of a layer's parameters, by name."""
        rows = GATES[self.mode] * self.hidden_size
        one: dict[str, tuple[int, ...]] = {"weight_ih": (rows, self.features(layer)), "weight_hh": (rows, self.passed)}
        if self.bias:
            one |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            one["weight_hr"] = (self.proj_size, self.hidden_size)
        return {f"{name}_l{layer}{end}": shape for end in self.directions for name, shape in one.items()}

    def specs(self, layer: int, degree: int) -> dict[str, Spec]:
        """How a layer's parameters are cut over `degree` ranks: a projection by its columns, the rest by rows."""
        units, rows = balanced(self.hidden_size, degree), GATES[self.mode] * self.hidden_size
        gates = range(0, rows, self.hidden_size)
        held = [[(gate + a, gate + b) for gate in gates] for a, b in units] if degree > 1 else [[(0, rows)]]
        return {
            name: cut(name, shape, *((1, [[piece] for piece in units]) if "_hr_" in name else (0, held)))
            for name, shape in self.shapes(layer).items()
        }

    def __str__(self) -> str:
        """As torch shows it."""
        usual = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        told = [f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        told += [f"proj_size={self.proj_size}"] * bool(self.proj_size)
        return ", ".join([self.mode, str(self.input_size), str(self.hidden_size), *told])


def checked(rnn: nn.Module, degree: int, name: str) -> Options:
    """The options of `rnn`; ValueError where it cannot be cut over `degree` ranks."""
    kind = next((kind for kind in KINDS if isinstance(rnn, kind)), None)
    if kind is None:
        raise ValueError(
            f'{name} is a {type(rnn).__name__} and style "recurrent" cuts nn.LSTM, nn.GRU and nn.RNN; '
            f'take it out of the tensor plan or give it the style "whole"'
        )
    check_plain(rnn, kind, "recurrent", name)
    options = Options.of(rnn)
    wanted = {leaf for layer in range(options.num_layers) for leaf in options.shapes(layer)}
    odd = wanted ^ {leaf for leaf, _ in rnn.named_parameters(remove_duplicate=False)}
    if odd:
        raise ValueError(
            f"{name}: a {kind.__name__} with or without {min(odd)} is not as torch makes it (weight_norm?), and style "
            f'"recurrent" cuts plain ones only; give it the style "whole"'
        )
    if options.hidden_size < degree:
        raise ValueError(
            f"{options.hidden_size} hidden units cannot be cut over tensor={degree} at {name}; "
            f"use tensor={options.hidden_size} or less"
        )
    return options
