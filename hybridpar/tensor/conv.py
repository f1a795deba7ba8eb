"""Convolutions cut over the tensor axis by channels, as linear layers are by features.

    ConvColumn   [b, in, ..]    -> [b, out_tp, ..]   each index has some of the output channels
    ConvRow      [b, in_tp, ..] -> [b, out, ..]      each index has some of the input channels; the outputs are summed
    ConvGroups   [b, in_tp, ..] -> [b, out_tp, ..]   each index has some of the groups (depthwise: channels)

A weight is [out, in / groups, ..], a transposed one [in, out / groups, ..]. Column and row layers of convolutions:
Dryden et al. 2019 (https://arxiv.org/abs/1903.06681), "channel and filter parallelism".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hybridpar.shard import Range, Spec, balanced, cut
from hybridpar.tensor import collectives
from hybridpar.tensor.linear import hold
from hybridpar.wires.axis import Axis

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_DIMS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _Cut(nn.Module):
    """What the three have in common: the settings of the plain layer, and which channels are here."""

    def __init__(self, conv: Conv, axis: Axis, weight: Spec, bias: Spec, name: str) -> None:
        super().__init__()
        self.axis, self.parts, self.name = axis, weight.parts, name
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode, self.output_padding = conv.padding, conv.padding_mode, conv.output_padding
        self.transposed, self.training = conv.transposed, conv.training
        self._border = () if conv.transposed else conv._reversed_padding_repeated_twice
        self.weight, self.bias = conv.weight, conv.bias
        self._specs = {"weight": weight} | ({} if conv.bias is None else {"bias": bias})
        for parameter, spec in self._specs.items():
            setattr(self, parameter, hold(getattr(conv, parameter), spec, axis.index))

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter."""
        return dict(self._specs)

    def _convolved(self, x: Tensor, bias: Tensor | None, groups: int, output_size: Sequence[int] | None) -> Tensor:
        n = len(self.kernel_size)
        if self.transposed:
            more = self._output_padding(x, output_size)
            how = (self.stride, self.padding, more, groups, self.dilation)
            return _TRANSPOSED[n - 1](x, self.weight, bias, *how)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._border, mode=self.padding_mode), 0
        return _PLAIN[n - 1](x, self.weight, bias, self.stride, padding, self.dilation, groups)

    def _output_padding(self, x: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        if output_size is None:
            return self.output_padding
        n = len(self.kernel_size)
        sides = zip(list(output_size)[-n:], x.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size)
        more = tuple(wanted - ((h - 1) * s - 2 * p + d * (k - 1) + 1) for wanted, h, s, p, d, k in sides)
        if not all(0 <= m < max(s, d) for m, s, d in zip(more, self.stride, self.dilation)):
            raise ValueError(
                f"{self.name}: output_size={list(output_size)} cannot come from {list(x.shape[2:])} with stride "
                f"{self.stride}; it would need output_padding={more}"
            )
        return more

    def _check(self, x: Tensor, channels: int, of: int) -> None:
        n = len(self.kernel_size)
        if x.dim() != n + 2 or x.shape[1] != channels:
            raise ValueError(
                f"{self.name}: a tensor of shape {list(x.shape)} comes in, and {channels} of {of} channels with {n} "
                f"spatial dims belong here; what comes before must be cut over tensor={self.axis.size} alike"
            )

    def extra_repr(self) -> str:
        held = list(self.weight.shape)
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, here {held}"


class ConvColumn(_Cut):
    """Some of the output channels of a convolution, by `balanced`; the input is whole on each index.

    ValueError where an index would get none, and for groups.

    Example:
        >>> layer = ConvColumn(nn.Conv2d(3, 6, 3, padding=1), Alone("tensor"))
        >>> layer(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 6, 5, 5])
    """

    def __init__(self, conv: Conv, axis: Axis, name: str = "conv") -> None:
        check_conv(conv, "conv column", name)
        _ungrouped(conv, "conv column", name)
        parts = channel_parts(conv.out_channels, axis, "output channels", name)
        weight = cut("weight", conv.weight.shape, int(conv.transposed), parts)
        super().__init__(conv, axis, weight, cut("bias", (conv.out_channels,), 0, parts), name)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # [b, in, ..] -> [b, out_tp, ..]
        return self._convolved(collectives.copy(x, self.axis, fresh=True), self.bias, 1, output_size)


class ConvRow(_Cut):
    """Some of the input channels of a convolution, by `balanced`; outputs are summed, then the bias is added.

    Example:
        >>> layer = ConvRow(nn.ConvTranspose1d(6, 4, 2, stride=2), Alone("tensor"))
        >>> layer(torch.zeros(2, 6, 5)).shape
        torch.Size([2, 4, 10])
    """

    def __init__(self, conv: Conv, axis: Axis, name: str = "conv") -> None:
        check_conv(conv, "conv row", name)
        _ungrouped(conv, "conv row", name)
        parts = channel_parts(conv.in_channels, axis, "input channels", name)
        weight = cut("weight", conv.weight.shape, int(not conv.transposed), parts)
        super().__init__(conv, axis, weight, Spec("bias", (conv.out_channels,)), name)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # [b, in_tp, ..] -> [b, out, ..]
        self._check(x, self.weight.shape[int(not self.transposed)], self.in_channels)
        y = collectives.sum_(self._convolved(x, None, 1, output_size), self.axis, fresh=True)
        return y if self.bias is None else y.add_(self.bias.view(-1, *(1,) * (x.dim() - 2)))


class ConvGroups(_Cut):
    """Some of the groups of a convolution, by `balanced`: input and output are cut alike, and nothing is sent.

    Example:
        >>> layer = ConvGroups(nn.Conv2d(6, 6, 3, groups=6), Alone("tensor"))
        >>> layer(torch.zeros(2, 6, 5, 5)).shape
        torch.Size([2, 6, 3, 3])
    """

    def __init__(self, conv: Conv, axis: Axis, name: str = "conv") -> None:
        check_conv(conv, "conv groups", name)
        groups = channel_parts(conv.groups, axis, "groups", name)
        weight = cut("weight", conv.weight.shape, 0, _scaled(groups, len(conv.weight) // conv.groups))
        bias = cut("bias", (conv.out_channels,), 0, _scaled(groups, conv.out_channels // conv.groups))
        super().__init__(conv, axis, weight, bias, name)
        first, stop = groups[axis.index][0]
        self._groups = stop - first

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # [b, in_tp, ..]
        self._check(x, self._groups * self.in_channels // self.groups, self.in_channels)
        return self._convolved(x, self.bias, self._groups, output_size)


def channel_parts(count: int, axis: Axis, what: str, name: str) -> tuple[tuple[Range, ...], ...]:
    """Each index's part of `count` channels or groups. ValueError where one would get none."""
    if count < axis.size:
        raise ValueError(f"{count} {what} cannot be cut over tensor={axis.size} at {name}; use tensor={count} or less")
    return tuple((piece,) for piece in balanced(count, axis.size))


def check_conv(conv: nn.Module, style: str, name: str) -> None:
    """ValueError unless `conv` is one of torch's own convolutions."""
    kinds = [kind for kind in _DIMS if type(conv).forward is kind.forward and isinstance(conv, kind)]
    if not kinds or parametrize.is_parametrized(conv):
        known = "a parametrized" if kinds else "a"
        raise ValueError(
            f'{name} is {known} {type(conv).__name__} and style "{style}" cuts nn.Conv1d, 2d, 3d and '
            f'nn.ConvTranspose1d, 2d, 3d only; take it out of the tensor plan or give it the style "whole"'
        )


def _ungrouped(conv: Conv, style: str, name: str) -> None:
    if conv.groups > 1:
        raise ValueError(
            f'{name} has groups={conv.groups} and style "{style}" cuts convolutions without groups; between a column '
            f'and a row layer it is "conv groups", elsewhere "whole"'
        )


def _scaled(parts: tuple[tuple[Range, ...], ...], by: int) -> tuple[tuple[Range, ...], ...]:
    return tuple(tuple((a * by, b * by) for a, b in part) for part in parts)
