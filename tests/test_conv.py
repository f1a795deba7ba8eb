"""Convolutions and their norms cut by channels equal plain ones, and so does a network of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.seeds import Draw
from hybridpar.tensor.channels import ChannelNorm
from hybridpar.tensor.conv import ConvColumn, ConvGroups, ConvRow
from hybridpar.tensor.plan import Applied, apply
from hybridpar.wires.axis import Alone, Axis
from tests.against_one import CLOSE, compare, made, numbers, tensor_axis, whole
from tests.ranks import ranks

ALONE = Alone("tensor")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (11,), 2: (7, 6), 3: (5, 4, 6)}


def scored(model: nn.Module, x: Tensor) -> Tensor:
    """A number that depends on the output and on the gradient of the input."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    score = (y * numbers(*y.shape, seed=3)).sum()
    (grad,) = torch.autograd.grad(score, leaf, retain_graph=True)
    return score + (grad * numbers(*x.shape, seed=4)).sum()


def compare_channels(model: nn.Module, plan: Mapping[str, str], x: Tensor, axis: Axis) -> None:
    """Outputs, gradients of input and parameters, and buffers, in training and in evaluation."""
    compare(model, plan, axis, lambda one, *_: scored(one, x))
    compare(model.eval(), plan, axis, lambda one, *_: scored(one, x))
    plain, cut = deepcopy(model).train(), deepcopy(model).train()
    applied = apply(cut, plan, axis, Draw(0, samples=torch.tensor([11, 4, 7])))
    apply(plain, plan, ALONE, Draw(0, samples=torch.tensor([11, 4, 7])))
    torch.testing.assert_close(cut(x), plain(x), **CLOSE)
    buffers_equal(plain, cut, applied, axis)


def buffers_equal(plain: nn.Module, cut: nn.Module, applied: Applied, axis: Axis) -> None:
    here = dict(cut.named_buffers())
    for name, buffer in plain.named_buffers():
        found = whole(here[name], applied.buffers[name], axis) if name in applied.buffers else here[name]
        torch.testing.assert_close(found, buffer, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@ranks(2, 3, 4)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)
def test_column_and_row_convolutions_equal_plain_ones(dims: int, options: dict) -> None:
    conv = CONVS[dims]
    model = made(lambda: nn.Sequential(conv(3, 7, 3, **options), nn.GELU(), conv(7, 4, 1, bias=dims != 2)))
    compare_channels(model, {"0": "conv column", "2": "conv row"}, numbers(3, 3, *SIZES[dims]), tensor_axis())


@ranks(2, 3)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 2, "padding": 1, "output_padding": 1}], ids=str)
def test_transposed_convolutions_equal_plain_ones(dims: int, options: dict) -> None:
    conv = TRANSPOSED[dims]
    model = made(lambda: nn.Sequential(conv(3, 7, 3, **options), nn.Tanh(), conv(7, 2, 2)))
    compare_channels(model, {"0": "conv column", "2": "conv row"}, numbers(3, 3, *SIZES[dims]), tensor_axis())


class Depthwise(nn.Module):
    """The inverted residual of Sandler et al. 2018, with a dropout and a PReLU between."""

    def __init__(self, hidden: int, groups: int, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(4, hidden, 1), norm
        self.act, self.dropout = nn.PReLU(hidden), nn.Dropout2d(0.3)
        self.deep = nn.Conv2d(hidden, 2 * hidden, 3, padding=1, groups=groups)
        self.down, self.after = nn.Conv2d(2 * hidden, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.down(self.deep(self.dropout(self.act(self.norm(self.up(x)))))))


DEPTHWISE = {"up": "conv column", "norm": "conv norm", "act": "conv norm", "dropout": "hidden dropout"}
DEPTHWISE |= {"deep": "conv groups", "down": "conv row"}


@ranks(2, 3, 4)
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(12),
        lambda: nn.BatchNorm2d(12, momentum=None, affine=False),
        lambda: nn.BatchNorm2d(12, track_running_stats=False),
        lambda: nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(12),
        lambda: nn.GroupNorm(12, 12),
    ],
)
def test_norms_and_groups_between_column_and_row_equal_plain_ones(norm: object) -> None:
    model = made(lambda: Depthwise(12, 12, norm()))
    compare_channels(model, DEPTHWISE, numbers(3, 4, 5, 6), tensor_axis())


class Block(nn.Module):
    """A residual block of He et al. 2015, with a stride."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.short = nn.Conv2d(inside, outside, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


def resnet() -> nn.Sequential:
    blocks = nn.Sequential(Block(5, 5, 1), Block(5, 7, 2))
    return nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))


RESNET = {"1.*.conv1": "conv column", "1.*.bn1": "conv norm", "1.*.conv2": "conv row"}


@ranks(2, 4)
def test_a_resnet_cut_by_channels_equals_one_process() -> None:
    compare_channels(made(resnet), RESNET, numbers(3, 3, 13, 10), tensor_axis())


def test_alone_a_layer_is_the_plain_one() -> None:
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    x = torch.randn(2, 4, 5, 5)
    for layer in (ConvColumn(conv, ALONE), ConvRow(conv, ALONE), ConvGroups(conv, ALONE)):
        assert layer.weight is conv.weight and layer.bias is conv.bias
        torch.testing.assert_close(layer(x), conv(x))
    assert ChannelNorm(norm, ALONE).weight is norm.weight
    up = nn.ConvTranspose2d(4, 6, 3, stride=2)
    assert torch.equal(ConvColumn(up, ALONE)(x, output_size=(12, 12)), up(x, output_size=(12, 12)))
    with pytest.raises(ValueError, match=r"conv: output_size=\[14, 14\] cannot come from \[5, 5\] with stride"):
        ConvColumn(up, ALONE)(x, output_size=(14, 14))


@ranks(2)
def test_what_cannot_be_cut_by_channels_is_refused() -> None:
    axis = tensor_axis()
    for module, style, words in (
        (nn.Conv2d(8, 1, 3), "conv column", "1 output channels cannot be cut over tensor=2 at m; use tensor=1"),
        (nn.Conv2d(1, 8, 3), "conv row", "1 input channels cannot be cut over tensor=2 at m"),
        (nn.Conv2d(8, 8, 3, groups=2), "conv column", 'm has groups=2 and style "conv column" cuts .* "conv groups"'),
        (nn.Conv2d(8, 8, 3), "conv groups", "1 groups cannot be cut over tensor=2 at m"),
        (nn.Linear(8, 8), "conv row", 'm is a Linear and style "conv row" cuts nn.Conv1d'),
        (nn.GroupNorm(3, 12), "conv norm", "m: 12 channels in 3 groups of 4 are cut at channel 6 by tensor=2"),
        (nn.LayerNorm(8), "conv norm", 'm is a LayerNorm and style "conv norm" cuts BatchNorm'),
        (nn.PReLU(), "conv norm", 'm is a PReLU .* one weight for all channels is "partial"'),
    ):
        with pytest.raises(ValueError, match=words):
            apply(nn.ModuleDict({"m": module}), {"m": style}, axis, Draw(0))


@ranks(2)
def test_a_layer_says_that_its_input_is_not_cut() -> None:
    axis, x = tensor_axis(), torch.zeros(2, 6, 5, 5)
    with pytest.raises(ValueError, match=r"b.down: a tensor of shape \[2, 6, 5, 5\] comes in, and 3 of 6 channels"):
        ConvRow(nn.Conv2d(6, 4, 3), axis, "b.down")(x)
    with pytest.raises(ValueError, match="b.norm: 6 channels come in and 3 of 6 are held here"):
        ChannelNorm(nn.BatchNorm2d(6), axis, "b.norm")(x)


def test_what_stands_between_convolutions_must_be_planned() -> None:
    for module, words in ((nn.PReLU(), '"partial" if'), (nn.Dropout2d(), '"hidden dropout" if')):
        model = nn.ModuleDict({"up": nn.Conv2d(2, 4, 1), "act": module, "down": nn.Conv2d(4, 2, 1)})
        with pytest.raises(ValueError, match=f"act has no entry .* it is {words}"):
            apply(model, {"up": "conv column", "down": "conv row"}, ALONE, Draw(0))
