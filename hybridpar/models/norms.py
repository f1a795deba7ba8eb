"""The norms that the convolutional models choose from, by name."""

from __future__ import annotations

from torch import nn

GROUPS = 8
_BATCH = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def norm(kind: str, channels: int, sides: int) -> nn.Module:
    """A norm over the channels of images (2 sides) or volumes (3).

    "batch" (Ioffe and Szegedy 2015) takes its statistics from the samples that are together in one microbatch; "group"
    (Wu and He 2018) from each sample, so that it computes the same for every number of replicas and microbatches.

    Example:
        >>> type(norm("batch", 16, sides=3)).__name__
        'BatchNorm3d'
    """
    if kind == "batch":
        return _BATCH[sides](channels)
    if kind == "group":
        return nn.GroupNorm(GROUPS, channels)
    raise ValueError(f'norm="{kind}": the norms are "batch" and "group"')
