"""What gradients look like on the wire: as they are, or as half the bytes.

    Compression.none    as they are
    Compression.fp16    5 bits exponent, 10 bits mantissa: error 2^-11 of each value, and of their mean; divided by the
                        number of replicas before they travel, overflow beyond 65504, lose bits below 6e-5
    Compression.bf16    8 bits exponent, 7 bits mantissa: error 2^-8 of each value, of their mean; the range of float32

bfloat16 is added in float32, whatever the carrier: Horovod cannot add it, and its axis therefore exchanges pieces, adds
them in float32 and gathers the sums. So values are rounded twice on their way: when they leave, and when the mean does.
Gradients that are 16 bits wide already travel as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridpar.wires.axis import Axis, Handle


@dataclass(frozen=True)
class Wire:
    """The dtype that floats wider than 16 bits travel as; None: their own."""

    dtype: torch.dtype | None = None

    @property
    def name(self) -> str | None:
        """Its name in `Compression`, or None where nothing changes."""
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


class _Widening:
    """A narrow reduction under way, and where its result goes."""

    def __init__(self, narrow: Handle, flat: Tensor) -> None:
        self._narrow, self._flat = narrow, flat

    def wait(self) -> Tensor:
        return self._flat.copy_(self._narrow.wait())

    def done(self) -> bool:
        return self._narrow.done()
