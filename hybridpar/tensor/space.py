"""Style "space": a module, and all below it, on inputs that are cut by rows over the tensor axis.

    x [b, c, h, ..]  ->  rows of x here  ->  the module's forward, halos exchanged  ->  all rows of its output

Parameters are whole on each index; their gradients are summed over the axis. `region` runs the forward; `pointwise`,
`convolution`, `pooling`, `resampling` and `statistics` know torch's functions.
"""

from __future__ import annotations

from torch import nn

from hybridpar.tensor.convolution import CONVOLUTIONS
from hybridpar.tensor.pointwise import POINTWISE
from hybridpar.tensor.pooling import POOLS
from hybridpar.tensor.region import Region, Rule
from hybridpar.tensor.resampling import RESAMPLING
from hybridpar.tensor.statistics import STATISTICS
from hybridpar.wires.axis import Axis

RULES: dict[str, Rule] = POINTWISE | CONVOLUTIONS | POOLS | RESAMPLING | STATISTICS

_UNKNOWN = (
    nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention | nn.Transformer | nn.Fold | nn.Unfold | nn.MaxUnpool1d
    | nn.MaxUnpool2d | nn.MaxUnpool3d | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d | nn.Embedding
    | nn.EmbeddingBag | nn.SyncBatchNorm | nn.LPPool1d | nn.LPPool2d | nn.Bilinear | nn.RReLU | nn.PixelUnshuffle
)  # fmt: skip


def unknown(module: nn.Module, name: str = "") -> str | None:
    """Why `module` cannot be a region, if that can be seen before it runs; functions it calls are seen when it runs.

    Example:
        >>> unknown(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Unfold(2)), "stem")
        'stem.1 is a Unfold, which is not known to style "space"'
    """
    for local, child in module.named_modules():
        if isinstance(child, _UNKNOWN):
            full = ".".join(filter(None, (name, local)))
            return f'{full} is a {type(child).__name__}, which is not known to style "space"'
    return None


def shard(module: nn.Module, axis: Axis, name: str = "region") -> None:
    """Have `module` run on rows from now on; it keeps its parameters.

    ValueError where it holds something that has no rule, or a region already.

    Example:
        >>> conv = nn.Conv2d(1, 2, 3, padding=1)
        >>> shard(conv, Alone("tensor"))
        >>> conv(torch.ones(1, 1, 5, 5)).shape
        torch.Size([1, 2, 5, 5])
    """
    reason = unknown(module, name)
    if reason is not None:
        raise ValueError(f"{reason}; give the style to a module without it")
    for local, child in module.named_modules():
        if "forward" in vars(child):
            full = ".".join(filter(None, (name, local)))
            raise ValueError(f'{full} has the style "space" already, and so {name} cannot have it around it')
    module.forward = Region(module, axis, RULES, name).run
