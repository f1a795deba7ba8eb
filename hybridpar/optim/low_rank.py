"""PowerSGD: the gradient of each matrix travels as two thin ones, and what they miss is added to the next gradient.

    M = gradient + error             [n, m]      on each replica
    P = mean of M Q                  [n, r]      travels, with all that is no matrix
    P = an orthonormal basis of P
    Q = mean of M^T P                [m, r]      travels
    gradient = P Q^T, error = M - P Q^T

Vogels, Karimireddy, Jaggi 2019, PowerSGD, https://arxiv.org/abs/1905.13727, algorithms 1 and 2: one power iteration in
each step, from the Q of the step before. Shards are compressed as they lie on their rank. A matrix for which
r (n + m) is not less than n m travels as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridpar.wires.axis import Axis, Handle


class LowRank:
    """Rank `rank`, for one bucket: `members` are name, place and shape of its parameters.

    Example:
        >>> LowRank(4, [("head.weight", 0, (512, 48))]).start(axis, flat, "gradients.0").wait()     # doctest: +SKIP
    """

    def __init__(self, rank: int, members: Sequence[tuple[str, int, tuple[int, ...]]], like: Tensor) -> None:
        self._matrices = []
        self._rest: list[tuple[int, int]] = []
        self.errors: dict[int, Tensor] = {}  # by the number of the member: [n, m], in the order of memory
        self._bases: list[Tensor] = []
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        end = 0
        for place, (name, start, shape) in enumerate(members):
            n, m = (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (0, 0)
            if rank * (n + m) >= n * m:
                continue
            self._rest.append((end, start))
            end = start + n * m
            self._matrices.append((place, start, n, m))
            # Alike on all replicas, and on all tensor ranks that hold the whole matrix.
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            self._bases.append(torch.randn(m, rank, generator=draw, dtype=wide).to(like.device))
            self.errors[place] = torch.zeros(n, m, dtype=wide, device=like.device)
        self._rest.append((end, len(like)))
        self._flags = len(like) - len(members)

    def start(self, axis: Axis, flat: Tensor, name: str) -> Handle:
        """Begin to average `flat` [n] over the axis, in place."""
        wholes = []
        for place, start, n, m in self._matrices:
            error = self.errors[place]
            wholes.append(flat[start : start + n * m].view(n, m).to(error.dtype) + error)
        thin = [(whole @ basis).view(-1).to(flat.dtype) for whole, basis in zip(wholes, self._bases)]
        sent = torch.cat([*thin, *(flat[a:b] for a, b in self._rest)])
        return _Under(self, axis, flat, name, wholes, axis.start_allreduce(sent, "average", name))

    def finish(self, axis: Axis, flat: Tensor, name: str, wholes: list[Tensor], got: Tensor) -> Tensor:
        """What is left to do when the first of the two has come."""
        thin = []
        for (_, _, n, _), basis in zip(self._matrices, self._bases):
            mine, got = got.split([n * basis.shape[1], len(got) - n * basis.shape[1]])
            thin.append(_orthonormal(mine.view(n, -1).to(basis.dtype)))
        for a, b in self._rest:
            mine, got = got.split([b - a, len(got) - b + a])
            flat[a:b] = mine
        if not thin:
            return flat
        sent = torch.cat([(whole.T @ p).view(-1).to(flat.dtype) for whole, p in zip(wholes, thin)])
        # In its turn and not before: carriers without names must meet their operations in one order.
        got = axis.start_allreduce(sent, "average", f"{name}.second").wait()
        for i, ((place, start, n, m), whole, p) in enumerate(zip(self._matrices, wholes, thin)):
            mine, got = got.split([m * p.shape[1], len(got) - m * p.shape[1]])
            basis = mine.view(m, -1).to(p.dtype)
            made = p @ basis.T
            flat[start : start + n * m] = made.view(-1)
            if not made.isfinite().all():  # an overflow, which whoever scales the loss skips
                self.errors[place] = torch.zeros_like(whole)
                continue
            self._bases[i] = basis
            # Where no replica had a gradient nobody takes what was made.
            self.errors[place] = whole - made if flat[self._flags + place] else whole
        return flat


def _orthonormal(p: Tensor) -> Tensor:
    return torch.linalg.qr(p).Q if p.isfinite().all() else p


class _Under:
    """The first of the two under way."""

    def __init__(
        self, codec: LowRank, axis: Axis, flat: Tensor, name: str, wholes: list[Tensor], first: Handle
    ) -> None:
        self._codec, self._axis, self._flat, self._name = codec, axis, flat, name
        self._wholes, self._first = wholes, first

    def wait(self) -> Tensor:
        return self._codec.finish(self._axis, self._flat, self._name, self._wholes, self._first.wait())

    def done(self) -> bool:
        """Never before `wait`; lets the carrier go on."""
        self._first.done()
        return False
