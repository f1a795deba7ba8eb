"""What gradients look like on the wire: as they are, as half the bytes, or as products of thin matrices.

    Compression.none    as they are
    Compression.fp16    5 bits exponent, 10 bits mantissa: error 2^-11 of each value, and of their mean; divided by the
                        number of replicas before they travel, overflow beyond 65504, lose bits below 6e-5
    Compression.bf16    8 bits exponent, 7 bits mantissa: error 2^-8 of each value, of their mean; the range of float32
    Compression.power_sgd(rank)     low_rank.py: r (n + m) numbers for a matrix [n, m]

bfloat16 is added in float32, whatever the carrier: Horovod cannot add it, and its axis therefore exchanges pieces, adds
them in float32 and gathers the sums. So values are rounded twice on their way: when they leave, and when the mean does.
Gradients that are 16 bits wide already travel as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybridpar.optim.low_rank import LowRank
from hybridpar.wires.axis import Axis, Handle

Members = Sequence[tuple[str, int, tuple[int, ...]]]  # of a bucket: name, place in it, shape


class Sender(Protocol):
    """Who averages one bucket; `errors` are what it has kept back, by the number of the member."""

    @property
    def errors(self) -> dict[int, Tensor]: ...

    def start(self, axis: Axis, flat: Tensor, name: str) -> Handle:
        """Begin to average `flat` [n] over the axis, in place."""


@dataclass(frozen=True)
class Wire:
    """The dtype that floats wider than 16 bits travel as, None: their own; or the `rank` of matrices, 0: all of it."""

    dtype: torch.dtype | None = None
    rank: int = 0

    def __str__(self) -> str:
        return f"power_sgd({self.rank})" if self.rank else str(self.dtype)

    @property
    def errors(self) -> dict[int, Tensor]:
        """Nothing is kept back."""
        return {}

    def of(self, members: Members, flat: Tensor) -> Sender:
        """Who averages the bucket `flat` that holds `members`."""
        return LowRank(self.rank, members, flat) if self.rank and flat.is_floating_point() else self

    @property
    def name(self) -> str | None:
        """Its name in `Compression`, or None where nothing changes."""
        if self.rank:
            return Compression.power_sgd.__name__
        return next((name for name, wire in vars(Compression).items() if wire == self and self.dtype), None)

    def start(self, axis: Axis, flat: Tensor, name: str) -> Handle:
        """Begin to average `flat` [n] over the axis, in place."""
        if self.dtype is None or flat.element_size() <= 2:
            return axis.start_allreduce(flat, "average", name)
        if self.dtype is torch.float16:
            sent = flat.div_(axis.size).to(self.dtype)  # before the sum, not after it: a sum may overflow
            return _Widening(axis.start_allreduce(sent, "sum", name), flat)
        return _Widening(axis.start_allreduce(flat.to(self.dtype), "average", name), flat)


class Compression:
    """The choices, named as Horovod names them.

    Example:
        >>> hp.DistributedOptimizer(optimizer, model, compression=hp.Compression.bf16)  # doctest: +SKIP
    """

    none = Wire()
    fp16 = Wire(torch.float16)
    bf16 = Wire(torch.bfloat16)

    @staticmethod
    def power_sgd(rank: int) -> Wire:
        """Matrices as products of rank `rank`, what they miss is sent later; for slow links (docs/sync.md).

        Example:
            >>> hp.DistributedOptimizer(optimizer, model, compression=hp.Compression.power_sgd(4))  # doctest: +SKIP
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"power_sgd({rank!r}): the rank is a whole number of at least 1")
        return Wire(rank=rank)


class _Widening:
    """A narrow reduction under way, and where its result goes."""

    def __init__(self, narrow: Handle, flat: Tensor) -> None:
        self._narrow, self._flat = narrow, flat

    def wait(self) -> Tensor:
        return self._flat.copy_(self._narrow.wait())

    def done(self) -> bool:
        return self._narrow.done()
