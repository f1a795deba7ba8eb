"""Linear layers cut over the tensor axis.

    ColumnLinear   y_i = x A_i          [.., in]    -> [.., out_tp]    copy or gather, then multiply
    RowLinear      y = sum x_i A_i      [.., in_tp] -> [.., out]       multiply, then sum or scatter
    WholeLinear    y = (x A_0, x A_1 ..) [.., in]   -> [.., out]       as a column layer, then gather

"Column" and "row" are those of A in y = x A (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3);
nn.Linear stores A transposed, so a column layer holds rows of `weight`. The Conv1D of Hugging Face's GPT-2 stores A
itself. A column layer and the row layer after it need one sum between them, and none where one feeds the other.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hybridpar.global_view import take
from hybridpar.shard import Range, Spec, balanced, cut
from hybridpar.tensor import collectives
from hybridpar.tensor.sequence import Sequence
from hybridpar.wires.axis import Axis

Parts = Listed[Listed[Range]]


class ColumnLinear(nn.Module):
    """The output features `parts[axis.index]` of an nn.Linear; each index computes others.

    `parts` holds each index's ranges of output features (default: balanced). With `sequence` the input is a piece of
    the tokens, which are gathered first. The bias is cut like the output.
    ValueError where an index would get nothing.

    Example:
        >>> layer = ColumnLinear(nn.Linear(8, 6), Alone("tensor"))
        >>> layer(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 6])
    """

    def __init__(
        self,
        linear: nn.Linear,
        axis: Axis,
        parts: Parts | None = None,
        sequence: Sequence | None = None,
        name: str = "linear",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = features(linear, "column", name)
        self.axis, self.sequence = axis, sequence
        self.parts = _parts(parts, self.out_features, axis, "output features", name)
        self.training = linear.training
        self.weight, self.bias = linear.weight, linear.bias
        for parameter, spec in self.specs().items():
            setattr(self, parameter, hold(getattr(linear, parameter), spec, axis.index))

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter."""
        weight = {"weight": _cut(self.out_features, self.in_features, 0, self.parts, self.transposed)}
        return weight if self.bias is None else {**weight, "bias": cut("bias", (self.out_features,), 0, self.parts)}

    def forward(self, x: Tensor) -> Tensor:  # [.., in] or with sequence [.., l_tp, in] -> [.., out_tp]
        x = collectives.copy(x, self.axis, fresh=True) if self.sequence is None else self.sequence.gather(x)
        return F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)

    def extra_repr(self) -> str:
        held = self.weight.shape[int(self.transposed)]
        return f"{self.in_features}, {held} of {self.out_features}, sequence={self.sequence is not None}"


class RowLinear(nn.Module):
    """The input features `parts[axis.index]` of an nn.Linear; the outputs are summed over the axis.

    Follows a column layer, whose output parts are its input parts (default: balanced). The bias is added once, after
    the sum. With `sequence` the output is a piece of the tokens; the bias then sees only these, so its gradient is
    partial.

    Example:
        >>> layer = RowLinear(nn.Linear(6, 8), Alone("tensor"))
        >>> layer(torch.zeros(2, 3, 6)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        linear: nn.Linear,
        axis: Axis,
        parts: Parts | None = None,
        sequence: Sequence | None = None,
        name: str = "linear",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = features(linear, "row", name)
        self.axis, self.sequence, self._name = axis, sequence, name
        self.parts = _parts(parts, self.in_features, axis, "input features", name)
        self.training = linear.training
        self.bias = linear.bias
        self.weight = hold(linear.weight, self.specs()["weight"], axis.index)

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter."""
        weight = {"weight": _cut(self.out_features, self.in_features, 1, self.parts, self.transposed)}
        bias = Spec("bias", (self.out_features,), partial=self.sequence is not None)
        return weight if self.bias is None else {**weight, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:  # [.., in_tp] -> [.., out] or with sequence [.., l_tp, out]
        weight = self.weight.T if self.transposed else self.weight
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{self._name}: {x.shape[-1]} features come in and {weight.shape[1]} of {self.in_features} are "
                f"held here; a row layer takes what a column layer with the same cut gives"
            )
        if self.axis.size == 1 and self.sequence is None:  # nothing to sum: the bias is added by the product
            return F.linear(x, weight, self.bias)
        y = F.linear(x, weight)
        y = collectives.sum_(y, self.axis, fresh=True) if self.sequence is None else self.sequence.scatter(y)
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        held = self.weight.shape[int(not self.transposed)]
        return f"{held} of {self.in_features}, {self.out_features}, sequence={self.sequence is not None}"


class WholeLinear(nn.Module):
    """An nn.Linear of which each index computes some output features, and all then hold all of them.

    For a head over the vocabulary whose logits the model itself goes on with. The bias is whole and added after the
    gather, so it may be tied to another whole parameter.

    Example:
        >>> layer = WholeLinear(nn.Linear(8, 6), Alone("tensor"))
        >>> layer(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 6])
    """

    def __init__(self, linear: nn.Linear, axis: Axis, name: str = "linear") -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = features(linear, "gathered", name)
        self.axis = axis
        self.parts = _parts(None, self.out_features, axis, "output features", name)
        self.training = linear.training
        self.bias = linear.bias
        self.weight = hold(linear.weight, self.specs()["weight"], axis.index)

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter."""
        weight = {"weight": _cut(self.out_features, self.in_features, 0, self.parts, self.transposed)}
        return weight if self.bias is None else {**weight, "bias": Spec("bias", (self.out_features,))}

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        weight = self.weight.T if self.transposed else self.weight
        y = F.linear(collectives.copy(x, self.axis, fresh=True), weight)
        y = collectives.gather(y, self.axis, -1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def hold(parameter: nn.Parameter, spec: Spec, index: int) -> nn.Parameter:
    """The shard that `index` holds. Where nothing is cut off it is `parameter` itself, so references to it hold."""
    if spec.dim is None or spec.held(index) == ((0, spec.shape[spec.dim]),):
        return parameter
    return nn.Parameter(take(parameter.detach(), spec, index), requires_grad=parameter.requires_grad)


def features(linear: nn.Module, style: str, name: str) -> tuple[int, int, bool]:
    """Input features, output features, and whether the weight is stored transposed, [in, out].

    ValueError for what is neither an nn.Linear nor the Conv1D of Hugging Face's transformers.
    """
    known = f"{type(linear).__module__}.{type(linear).__name__}"
    if known == "transformers.pytorch_utils.Conv1D":
        return *linear.weight.shape, True
    if known == "transformers.models.falcon.modeling_falcon.FalconLinear":  # an nn.Linear that multiplies, then adds
        return linear.in_features, linear.out_features, False
    check_plain(linear, nn.Linear, style, name)
    return linear.in_features, linear.out_features, False


def packed(linear: nn.Module, axis: Axis, name: str) -> Parts:
    """The parts of a layer whose output is two halves that the module takes apart, each balanced over the axis."""
    _, outputs, _ = features(linear, "packed column", name)
    half = outputs // 2
    if outputs % 2:
        raise ValueError(f'{name}: {outputs} output features are not two halves, which style "packed column" cuts')
    first = _parts(None, half, axis, "output features of each half", name)
    return [[(a, b), (half + a, half + b)] for ((a, b),) in first]


def _cut(outputs: int, inputs: int, dim: int, parts: Parts, transposed: bool) -> Spec:
    """The spec of a weight cut along its outputs (dim 0 of nn.Linear's) or its inputs (dim 1)."""
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    return cut("weight", shape, 1 - dim if transposed else dim, parts)


def check_plain(module: nn.Module, kind: type[nn.Module], style: str, name: str) -> None:
    """ValueError unless `module` computes what `kind` computes: a subclass with its own forward may not."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward or parametrize.is_parametrized(module):
        known = "a parametrized" if parametrize.is_parametrized(module) else "a"
        raise ValueError(
            f'{name} is {known} {type(module).__name__} and style "{style}" cuts nn.{kind.__name__} only; '
            f'take it out of the tensor plan or give it the style "whole"'
        )


def _parts(parts: Parts | None, length: int, axis: Axis, what: str, name: str) -> tuple[tuple[Range, ...], ...]:
    if parts is not None:
        return tuple(tuple(ranges) for ranges in parts)
    if length < axis.size:
        raise ValueError(
            f"{length} {what} cannot be cut over tensor={axis.size} at {name}; use tensor={length} or less"
        )
    return tuple((piece,) for piece in balanced(length, axis.size))
