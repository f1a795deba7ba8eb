"""Weights that several tensor ranks hold, made alike again: each element as its owner has it (`Spec.owned`)."""

from __future__ import annotations

import torch

from hybridpar.optim.model import Parallel


class Shared:
    """Those of `model`'s parameters that are whole on every tensor rank, or whose parts overlap.

    Example:
        >>> Shared(model).agree()       # doctest: +SKIP
    """

    def __init__(self, model: Parallel) -> None:
        specs = model.specs()
        named = [(p, specs[name]) for chunk in model.chunks() for name, p in chunk if name in specs]
        self._axis = model.world.tensor
        self._whole = [p for p, spec in named if spec.dim is None]
        self._overlapping = [(p, spec) for p, spec in named if spec.overlaps]

    @torch.no_grad()
    def agree(self) -> None:
        """Take each element from its owner; all tensor ranks call it together."""
        for dtype in dict.fromkeys(p.dtype for p in self._whole):
            several = [p for p in self._whole if p.dtype == dtype]
            flat = self._axis.broadcast(torch.cat([p.detach().reshape(-1) for p in several]), 0)
            for p, piece in zip(several, flat.split([p.numel() for p in several])):
                p.copy_(piece.view(p.shape))
        for p, spec in self._overlapping:
            whole = p.new_zeros(spec.shape)
            for (start, stop), (first, last) in spec.owned(self._axis.index):
                whole.narrow(spec.dim, first, last - first).copy_(p.narrow(spec.dim, start, stop - start))
            self._axis.allreduce(whole)
            held = spec.held(self._axis.index)
            p.copy_(torch.cat([whole.narrow(spec.dim, a, b - a) for a, b in held], spec.dim))
