"""The norm of the whole model's gradient, and clipping by it.

A rank holds some pieces of some parameters; pieces that several ranks hold count once, at their owner (`Spec.owned`).
Norms of pieces are combined in float64:

    (sum over ranks of sum over owned pieces of |g|^n) ^ (1/n)        the largest |g| for n = inf

With ZeRO a piece is cut once more, over the replicas: then all ranks' pieces make the norm, and not one replica's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hybridpar.optim.model import Parallel
from hybridpar.optim.zero.piece import Piece, piece_of, stepped
from hybridpar.proof.point import listener
from hybridpar.shard import Spec


@torch.no_grad()
def grad_norm(model: Parallel, norm_type: float = 2.0) -> Tensor:
    """The norm of the gradient of the whole model: a float64 scalar, the same on all ranks of the replica.

    Waits for the averages first, if they are on their way.
    """
    if norm_type <= 0:
        raise ValueError(f"norm_type={norm_type}: a norm's exponent is positive, float('inf') included")
    model.wait()
    ranks = model.world.everyone if model.scattered else model.world.replica
    norms = [n.double().cpu() for n in (_norm(piece, norm_type) for piece in _owned_gradients(model))]
    mine = torch.stack([*norms, torch.zeros((), dtype=torch.float64)])
    if math.isinf(norm_type):
        return ranks.allgather(mine.max().view(1)).max()  # MPI's own maximum may drop a NaN
    return ranks.allreduce(mine.pow(norm_type).sum().view(1))[0].pow(1 / norm_type)


def clip_grad_norm_(model: Parallel, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients so that the norm of the whole model's gradient is at most `max_norm`; returns the norm.

    Call it between `train_step` and `optimizer.step()`, or let `DistributedOptimizer(..., clip=max_norm)` do so; with
    Horovod's own optimizer call its `synchronize()` first. As in `torch.nn.utils.clip_grad_norm_`, an infinite or
    undefined norm is returned and makes the gradients zero or undefined.

    Example:
        >>> loss = model.train_step(batch, microbatches=8)      # doctest: +SKIP
        >>> norm = hp.clip_grad_norm_(model, max_norm=1.0)      # doctest: +SKIP
        >>> optimizer.step()                                    # doctest: +SKIP
    """
    listener().clips(max_norm, norm_type)
    total = grad_norm(model, norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # torch's formula, its 1e-6 included
    for chunk in model.chunks():
        for held in (stepped(p) for _, p in chunk):
            if held.grad is not None:
                held.grad.mul_(scale.to(held.grad.device))
    return total


def _owned_gradients(model: Parallel) -> Iterator[Tensor]:
    """The pieces of this rank's gradients that this rank owns."""
    specs, index = model.specs(), model.world.tensor.index
    for chunk in model.chunks():
        for name, p in chunk:
            spec, piece = specs.get(name) or Spec(name, tuple(p.shape)), piece_of(p)
            if piece is not None and piece.held.grad is not None:
                yield _owned_piece(piece, spec, index)
            if p.grad is None:
                continue
            for (start, stop), _ in spec.owned(index):
                yield p.grad if spec.dim is None else p.grad.narrow(spec.dim, start, stop - start)


def _owned_piece(piece: Piece, spec: Spec, index: int) -> Tensor:
    """What of a gradient's piece is not another tensor rank's."""
    whole = spec.local_shape(index)
    owned = [local for local, _ in spec.owned(index)]
    if spec.dim is None:
        return piece.held.grad if owned else piece.held.grad[:0]
    if sum(stop - start for start, stop in owned) == whole[spec.dim]:
        return piece.held.grad
    mask = torch.zeros(whole, dtype=torch.bool, device=piece.held.device)
    for start, stop in owned:
        mask.narrow(spec.dim, start, stop - start).fill_(True)
    return piece.held.grad[piece.part(mask)]


def _norm(x: Tensor, norm_type: float) -> Tensor:
    if not x.numel():
        return x.new_zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(x, norm_type, dtype=torch.float32 if x.element_size() <= 2 else None)
