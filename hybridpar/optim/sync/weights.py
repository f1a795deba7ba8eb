"""A rank's weights as one flat vector, for what replicas send each other.

In float64 if some weight is wider than 32 bits, else in float32: small steps are not lost in weights of 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.model import Parallel


class Weights:
    """The parameters of `model` that this rank owns, in order of registration; `count` numbers in all.

    Example:
        >>> weights = Weights(model)                            # doctest: +SKIP
        >>> weights.write(axis.allreduce(weights.read()))       # doctest: +SKIP
    """

    def __init__(self, model: Parallel) -> None:
        self.parameters = [p for chunk in model.chunks() for _, p in chunk]
        self._device = model.world.device
        wide = any(p.dtype in (torch.float64, torch.complex64, torch.complex128) for p in self.parameters)
        self.dtype = torch.float64 if wide else torch.float32
        sizes = [_real(p).numel() for p in self.parameters]
        self.count = sum(sizes)
        self._sizes = sizes

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of them: [count]."""
        flat = torch.empty(self.count, dtype=self.dtype, device=self._device)
        for p, piece in self._pairs(flat):
            piece.copy_(_real(p))
        return flat

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Give them the values of `flat` [count]."""
        for p, piece in self._pairs(flat):
            _real(p).copy_(piece)

    def of(self, flat: Tensor) -> dict[Parameter, Tensor]:
        """The part of `flat` [count] that belongs to each, a view in its shape; complex ones as pairs."""
        return dict(self._pairs(flat))

    def _pairs(self, flat: Tensor) -> list[tuple[Parameter, Tensor]]:
        pieces = flat.split(self._sizes)
        return [(p, piece.view(_real(p).shape)) for p, piece in zip(self.parameters, pieces)]


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
