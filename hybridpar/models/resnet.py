"""Residual networks for images in plain PyTorch: nothing here knows about ranks.

    images -> Stem -> Block x depth per width -> Head -> logits          He et al. 2016, arXiv:1512.03385

            +-------- shortcut: 1 x 1, where the shape changes -------+
        x --+-- 3 x 3, stride --- norm --- relu --- 3 x 3 --- norm ---+-- relu

`tensor_plan` says which parts can be cut over the tensor axis (here: the channels between the two convolutions of a
block), and `chain` in which order the parts call each other. Both are data, read by `hybridpar.parallelize`.

The first block of each width but the first halves height and width. `norm` is "batch" or "group": see `models.norms`.

b batch, c channels, h height, w width, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.models.norms import norm as norm_of


class Stem(nn.Module):
    """From colours to channels."""

    def __init__(self, colours: int, channels: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(colours, channels, 3, padding=1, bias=False)
        self.norm = norm_of(norm, channels, sides=2)

    def forward(self, x: Tensor) -> Tensor:  # [b, colours, h, w] -> [b, c, h, w]
        return F.relu(self.norm(self.conv(x)))


class Block(nn.Module):
    """Two convolutions, added to what came in."""

    def __init__(self, before: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm_of(norm, channels, sides=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm_of(norm, channels, sides=2)
        same = before == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:  # [b, before, h, w] -> [b, c, h / stride, w / stride]
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Head(nn.Module):
    """The mean over the image, and a logit for each class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, w] -> [b, k]
        return self.project(x.mean((2, 3)))


class ResNet(nn.Module):
    """A classifier of images: `depth` blocks of each of the `widths`.

    Example:
        >>> import torch
        >>> model = ResNet(colours=1, classes=10, widths=(16, 32), depth=2)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    tensor_plan = {
        "blocks.*.conv1": "conv column",
        "blocks.*.norm1": "conv norm",
        "blocks.*.conv2": "conv row",
        "blocks.*.norm2": "whole",
        "blocks.*.shortcut": "whole",
    }
    chain = ("stem", "blocks.*", "head")

    def __init__(
        self, colours: int, classes: int, widths: Sequence[int] = (16, 32, 64), depth: int = 2, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.stem = Stem(colours, widths[0], norm)
        shapes = [(w, w, 1) for w in widths for _ in range(depth)]  # channels before, channels after, stride
        for i in range(1, len(widths)):
            shapes[i * depth] = (widths[i - 1], widths[i], 2)
        self.blocks = nn.ModuleList(Block(before, channels, stride, norm) for before, channels, stride in shapes)
        self.head = Head(widths[-1], classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions' weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in self.blocks:  # each block begins as its shortcut (Goyal et al. 2017, section 5.1)
            nn.init.zeros_(block.norm2.weight)

    def forward(self, images: Tensor) -> Tensor:  # [b, colours, h, w] -> [b, k]
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
