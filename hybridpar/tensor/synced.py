"""`nn.SyncBatchNorm` over the replicas: means and variances of a microbatch are those of all replicas' together.

    x of replica 0 [b0, c, ..], of replica 1 [b1, c, ..], ..  ->  one mean and variance for each channel

torch's own works on GPUs only, and over all ranks; here it is the data axis. Running statistics are alike on all
replicas. (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.)
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.tensor.statistics import move, standardise
from hybridpar.wires.axis import Axis


def synchronise(module: nn.Module, axis: Axis) -> int:
    """Have each SyncBatchNorm in `module` take its statistics over `axis`; returns how many there are.

    All indices of `axis` must then run the same forwards in the same order, each on at least one value of each channel.

    Example:
        >>> net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)))
        >>> synchronise(net, Alone("data"))
        1
    """
    norms = [child for child in module.modules() if isinstance(child, nn.SyncBatchNorm)]
    for norm in norms:
        # The module stays, with its parameters, buffers and name; a method, so that a stage's copy has its own.
        norm.forward = MethodType(_Together(axis), norm)
    return len(norms)


class _Together:
    """The forward of a norm."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __call__(self, norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:  # [b, c, ..] -> [b, c, ..]
        mean, variance = norm.running_mean, norm.running_var
        if not norm.training or x.is_meta:
            return F.batch_norm(x, mean, variance, norm.weight, norm.bias, mean is None, 0.0, norm.eps)
        mine = torch.tensor([x.numel() // x.shape[1]])
        counts = self._axis.allgather(mine).tolist()
        if sum(counts) == 1:
            raise ValueError(f"a batch norm of one value per channel (shape {list(x.shape)}, over all replicas)")
        out, now, spread = standardise(x, norm.weight, norm.bias, counts, norm.eps, self._axis)
        if norm.track_running_stats and mean is not None:
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            move(mean, now, momentum)
            move(variance, spread * (sum(counts) / (sum(counts) - 1)), momentum)
        return out
