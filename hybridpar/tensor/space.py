"""Style "space": a module, and all below it, on inputs that are cut by rows over the tensor axis.

    x [b, c, h, ..]  ->  rows of x here  ->  the module's forward, halos exchanged  ->  all rows of its output

Parameters are whole on each index; their gradients are summed over the axis. `region` runs the forward; `pointwise`,
`convolution`, `pooling`, `resampling` and `statistics` know torch's functions.
"""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn

from hybridpar.seeds import Draw
from hybridpar.shard import Range
from hybridpar.tensor.convolution import CONVOLUTIONS
from hybridpar.tensor.dropout import Dropout
from hybridpar.tensor.pointwise import POINTWISE
from hybridpar.tensor.pooling import POOLS
from hybridpar.tensor.region import Region, Rows, Rule
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


def shard(module: nn.Module, axis: Axis, name: str = "region", draw: Draw | None = None) -> None:
    """Have `module` run on rows from now on; it keeps its parameters. With `draw` its dropouts draw their masks there.

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
    region = Region(module, axis, RULES, name)
    if draw is not None:
        _mask(module, region, name, draw)
    module.forward = MethodType(region.run, module)


class _Here:
    """Which part of a whole tensor a dropout sees; noted before it runs."""

    dim = -1

    def __init__(self, region: Region) -> None:
        self._region, self._ranges = region, ()

    def see(self, x: Tensor, rows: Rows | None) -> None:
        self.dim = -1 if rows is None else rows.dim
        self._ranges = ((0, x.shape[-1]),) if rows is None else (self._region.held(rows),)

    def ranges(self, held: int) -> tuple[Range, ...]:
        return self._ranges


def _mask(module: nn.Module, region: Region, name: str, draw: Draw) -> None:
    """Put dropouts whose masks do not depend on the layout in the places of torch's."""
    done: dict[int, Dropout] = {}
    for local, child in [*module.named_modules(remove_duplicate=False)]:
        whole_channels = isinstance(child, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)
        if not local or not isinstance(child, nn.Dropout) and not whole_channels:
            continue
        if id(child) not in done:
            here = _Here(region)
            site = ".".join(filter(None, (name, local)))
            done[id(child)] = Dropout(child.p, site, draw, None if whole_channels else here, whole_channels)
            done[id(child)].train(child.training)
            region.let(done[id(child)], here.see)
        above, _, leaf = local.rpartition(".")
        setattr(module.get_submodule(above), leaf, done[id(child)])
