"""A U-Net for volumes, in plain PyTorch: nothing here knows about ranks.

    level 0    Down ----------------- skip ------------------> Up --- Head          Cicek et al. 2016, arXiv:1606.06650
    level 1      Down ------------- skip ---------------> Up
                      Down -------- skip -----------> Up
    bottom                   Convs

`tensor_plan` cuts the channels between two convolutions over the tensor axis, `space_plan` the volumes: slices of x. It
leaves the skips outside of what is cut, so that they can travel. All are data, read by `hybridpar.parallelize`.

A `Down` keeps what it has for the `Up` of its level and halves every side; the `Up` doubles them. The parts call one
another in a chain, so that the pipeline can cut it anywhere: skips travel over the stages between.

b batch, c channels, x y z the sides of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.models.norms import norm as norm_of
from hybridpar.pipeline.skip import Skip


def beside(x: Tensor, skipped: Tensor) -> Tensor:
    """The channels of both."""
    return torch.cat([skipped, x], 1)


class Convs(nn.Module):
    """Two convolutions, each with a norm."""

    def __init__(self, before: int, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, channels, 3, padding=1, bias=False)
        self.norm1 = norm_of(norm, channels, sides=3)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm_of(norm, channels, sides=3)

    def forward(self, x: Tensor) -> Tensor:  # [b, before, x, y, z] -> [b, c, x, y, z]
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class Down(nn.Module):
    """Convolutions, kept for the way up, then half of every side."""

    def __init__(self, before: int, channels: int, norm: str, skip: Skip) -> None:
        super().__init__()
        self.convs = Convs(before, channels, norm)
        self.stash = skip.stash
        self.shrink = nn.Conv3d(channels, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [b, before, x, y, z] -> [b, c, x / 2, y / 2, z / 2]
        return self.shrink(self.stash(self.convs(x)))


class Up(nn.Module):
    """Twice every side, what was kept on the way down beside it, and convolutions."""

    def __init__(self, before: int, channels: int, norm: str, skip: Skip) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose3d(before, channels, 2, stride=2)
        self.pop = skip.pop
        self.convs = Convs(2 * channels, channels, norm)

    def forward(self, x: Tensor) -> Tensor:  # [b, before, x / 2, y / 2, z / 2] -> [b, c, x, y, z]
        return self.convs(self.pop(self.grow(x)))


class UNet(nn.Module):
    """For each voxel and class a logit; every side must be a multiple of 2 to the number of levels, `len(widths) - 1`.

    Example:
        >>> model = UNet(colours=1, classes=1, widths=(8, 16))
        >>> model(torch.zeros(2, 1, 8, 8, 8)).shape
        torch.Size([2, 1, 8, 8, 8])
    """

    tensor_plan = {
        "down.*.convs.conv1": "conv column",
        "down.*.convs.norm1": "conv norm",
        "down.*.convs.conv2": "conv row",
        "down.*.convs.norm2": "whole",
        "bottom.conv1": "conv column",
        "bottom.norm1": "conv norm",
        "bottom.conv2": "conv row",
        "bottom.norm2": "whole",
        "up.*.convs.conv1": "conv column",
        "up.*.convs.norm1": "conv norm",
        "up.*.convs.conv2": "conv row",
        "up.*.convs.norm2": "whole",
    }
    space_plan = {  # {"": "space"} sends less, where there is one stage
        "down.*.convs": "space",
        "down.*.shrink": "space",
        "bottom": "space",
        "up.*.grow": "space",
        "up.*.convs": "space",
    }
    chain = ("down.*", "bottom", "up.*", "head")

    def __init__(self, colours: int, classes: int, widths: Sequence[int] = (8, 16, 32), norm: str = "group") -> None:
        super().__init__()
        *widths, widest = widths
        before, after = [colours, *widths[:-1]], [*widths[1:], widest]
        skips = [Skip(f"level {i}", beside) for i in range(len(widths))]
        self.down = nn.ModuleList(Down(b, c, norm, skip) for b, c, skip in zip(before, widths, skips))
        self.bottom = Convs(widths[-1], widest, norm)
        self.up = nn.ModuleList([*reversed([Up(a, c, norm, skip) for a, c, skip in zip(after, widths, skips)])])
        self.head = nn.Conv3d(widths[0], classes, 1)

    def forward(self, volumes: Tensor) -> Tensor:  # [b, colours, x, y, z] -> [b, classes, x, y, z]
        x = volumes
        for level in self.down:
            x = level(x)
        x = self.bottom(x)
        for level in self.up:
            x = level(x)
        return self.head(x)
