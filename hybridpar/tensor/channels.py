"""Norms and other layers on channels that are cut: what stands between "conv column" and "conv row".

    BatchNorm, InstanceNorm    each channel by itself: weights and running statistics are cut like the channels
    GroupNorm                  whole groups on each index, else refused
    PReLU                      one weight for each channel: cut; one for all: the style "partial" is right

The buffers have specs too, so that a state dict has the whole of them.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hybridpar.global_view import take
from hybridpar.shard import Spec, balanced, cut
from hybridpar.tensor.conv import channel_parts
from hybridpar.tensor.linear import hold
from hybridpar.wires.axis import Axis


class ChannelNorm(nn.Module):
    """This index's channels, by `balanced`, of a norm or a PReLU.

    ValueError for other modules, and where a group would be cut.

    Example:
        >>> norm = ChannelNorm(nn.BatchNorm2d(6), Alone("tensor"))
        >>> norm(torch.zeros(2, 6, 5, 5)).shape, norm.specs()["running_mean"].dim
        (torch.Size([2, 6, 5, 5]), 0)
    """

    def __init__(self, norm: nn.Module, axis: Axis, name: str = "norm") -> None:
        super().__init__()
        self.kind, self.name, self.training = type(norm).__name__, name, norm.training
        self.channels = _channels(norm, axis, name)
        self.parts = channel_parts(self.channels, axis, "channels", name)
        first, stop = self.parts[axis.index][0]
        self.here = stop - first
        self.groups = norm.num_groups * self.here // self.channels if isinstance(norm, nn.GroupNorm) else 0
        self.each = isinstance(norm, _InstanceNorm)
        self.eps, self.momentum = getattr(norm, "eps", None), getattr(norm, "momentum", None)
        self.rectifies = isinstance(norm, nn.PReLU)
        self._cut = [n for n, x in (norm._parameters | norm._buffers).items() if x is not None and x.dim()]
        for parameter, p in norm._parameters.items():
            held = None if p is None else hold(p, self._spec(parameter), axis.index)
            self.register_parameter(parameter, held)
        for buffer, x in norm._buffers.items():
            held = x if x is None or not x.dim() else take(x, self._spec(buffer), axis.index)
            self.register_buffer(buffer, held, persistent=buffer not in norm._non_persistent_buffers_set)

    def specs(self) -> dict[str, Spec]:
        """What is held of each parameter and each buffer."""
        return {name: self._spec(name) for name in self._cut}

    def _spec(self, name: str) -> Spec:
        return cut(name, (self.channels,), 0, self.parts)

    def forward(self, x: Tensor) -> Tensor:  # [b, c_tp, ..] -> [b, c_tp, ..]
        if x.shape[1] != self.here:
            raise ValueError(
                f"{self.name}: {x.shape[1]} channels come in and {self.here} of {self.channels} are held here; "
                f'"conv norm" takes what a column layer with the same cut gives'
            )
        if self.rectifies:
            return F.prelu(x, self.weight)
        if self.groups:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        mean, variance = self._buffers.get("running_mean"), self._buffers.get("running_var")
        own = self.training or mean is None
        if self.each:
            momentum = 0.0 if self.momentum is None else self.momentum
            return F.instance_norm(x, mean, variance, self.weight, self.bias, own, momentum, self.eps)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, own, self._factor(), self.eps)

    def _factor(self) -> float:
        """How far running statistics move now; counts the batch, as torch does."""
        batches = self._buffers.get("num_batches_tracked")
        if self.training and batches is not None:
            batches.add_(1)
            if self.momentum is None:
                return 1.0 / float(batches)
        return 0.0 if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.here} of {self.channels}"


def guard(module: nn.Module, name: str) -> None:
    """Refuse a call of `module` with other channels than it has, if it is a norm or a PReLU with a number of them.

    For what stands beside a column and a row convolution without an entry: where it is called is seen then only.

    Example:
        >>> guard(nn.BatchNorm2d(6), "norm")
    """
    if isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.PReLU):
        module.register_forward_pre_hook(functools.partial(_check_channels, name))


def _check_channels(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    kinds = (("num_features", _BatchNorm | _InstanceNorm), ("num_channels", nn.GroupNorm), ("num_parameters", nn.PReLU))
    has = next(getattr(module, what) for what, kind in kinds if isinstance(module, kind))
    free = isinstance(module, nn.PReLU) and has == 1 or isinstance(module, _InstanceNorm) and not module.state_dict()
    if not free and args and args[0].dim() > 2 and args[0].shape[1] != has:
        raise ValueError(
            f"{name} has no entry in the tensor plan, stands beside a column and a row convolution, and "
            f'{args[0].shape[1]} of its {has} channels come in: it is "conv norm" if it works between them'
        )


def _channels(norm: nn.Module, axis: Axis, name: str) -> int:
    """How many channels `norm` has; ValueError if they cannot be cut over `axis`."""
    if isinstance(norm, _BatchNorm | _InstanceNorm) and not isinstance(norm, nn.SyncBatchNorm) and _plain(norm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm) and _plain(norm):
        size = norm.num_channels // norm.num_groups
        torn = [stop for _, stop in balanced(norm.num_channels, axis.size) if stop % size]
        if torn:
            raise ValueError(
                f"{name}: {norm.num_channels} channels in {norm.num_groups} groups of {size} are cut at channel "
                f"{torn[0]} by tensor={axis.size}, within a group; choose groups that the cut leaves whole"
            )
        return norm.num_channels
    if isinstance(norm, nn.PReLU) and norm.num_parameters > 1:
        return norm.num_parameters
    hint = 'one weight for all channels is "partial"' if isinstance(norm, nn.PReLU) else "its statistics may need all"
    raise ValueError(
        f'{name} is a {type(norm).__name__} and style "conv norm" cuts BatchNorm, InstanceNorm, GroupNorm and PReLU '
        f"with a weight for each channel; {hint}"
    )


def _plain(norm: nn.Module) -> bool:
    return type(norm).__module__.startswith("torch.nn.modules")
