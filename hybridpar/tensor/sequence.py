"""Sequence parallelism: between a row layer and the next column layer each index holds a piece of the tokens.

    row layer -> scatter -> norm, dropout, residual on [b, l_tp, d] -> gather -> column layer
                 reduce_scatter                                        allgather

(Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198.) A piece does not tell how long the whole sequence is when
the tensor degree does not divide it, and a mask needs to know; so the length is noted where the tokens pass as a whole.
"""

from __future__ import annotations

from torch import Tensor

from hybridpar.seeds import Draw
from hybridpar.shard import Range
from hybridpar.tensor import collectives
from hybridpar.wires.axis import Axis

DIM = -2  # of tokens in [.., l, d]


class Sequence:
    """The tokens of the microbatch at hand, cut along `axis`; shared by the layers of one module."""

    dim = DIM

    def __init__(self, axis: Axis, draw: Draw) -> None:
        self.axis = axis
        self._draw = draw
        self._noted: tuple[object, int] | None = None

    def gather(self, x: Tensor) -> Tensor:  # [.., l_tp, d] -> [.., l, d]
        """All tokens, for a column layer."""
        x = collectives.gather_sum(x, self.axis, DIM)
        self.piece(x.shape[DIM])
        return x

    def scatter(self, x: Tensor) -> Tensor:  # [.., l, d] -> [.., l_tp, d]
        """This index's tokens of the sum of a row layer's terms."""
        self.piece(x.shape[DIM])
        return collectives.scatter_sum(x, self.axis, DIM)

    def piece(self, length: int) -> Range:
        """This index's [start, stop) of a sequence of `length` tokens, which is noted."""
        self._noted = (self._draw.turn, length)
        return self.axis.piece(length)

    def ranges(self, held: int) -> tuple[Range, ...]:
        """The global places of the `held` tokens here.

        A stage that begins with a mask has not seen the whole sequence yet: then the axis is asked, by all its ranks,
        since they run the same modules.
        """
        if self._noted is None or self._noted[0] != self._draw.turn:
            self._noted = (self._draw.turn, sum(self.axis.objects(held)))
        return (self.axis.piece(self._noted[1]),)
