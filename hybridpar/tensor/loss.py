"""Cross entropy, also of logits that are cut over the vocabulary and never gathered.

    loss_i = log sum_v exp(z_iv - m_i) + m_i - z_it       m_i = max_v z_iv, t the target of token i

    forward    allreduce of m [n], then of the sums and the target's logits [2, n]
    backward   softmax - one at the target, each index its own columns; nothing is sent

(Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.) The softmax is not kept: backward computes it again,
a block of rows at a time, into the gradient. Statistics are in fp32 for half floats.

n counted and ignored tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from hybridpar.shard import Range
from hybridpar.wires.axis import Alone, Axis

_BLOCK = 1 << 18  # logits worked on at once


class CrossEntropy(nn.Module):
    """The sum of the cross entropies of the counted tokens: those whose target is not `ignore_index`.

    A sum, so that microbatches add up; divide by the sum of their `weight`. `label_smoothing` is that of
    nn.CrossEntropyLoss (Szegedy et al. 2016).

    Example:
        >>> loss = CrossEntropy()
        >>> logits, targets = torch.zeros(2, 3, 10), torch.tensor([[1, 2, -100], [3, -100, 0]])
        >>> round(float(loss(logits, targets)) / loss.weight(targets), 4)
        2.3026
    """

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} is not between 0 and 1")
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self._axis: Axis = Alone("tensor")
        self._vocabulary: tuple[tuple[Range, ...], ...] | None = None

    def cut(self, axis: Axis, vocabulary: Sequence[Sequence[Range]]) -> CrossEntropy:
        """The same loss for logits [.., v_tp]: `vocabulary[index]` are the ranges that an index holds, as `Spec.parts`.

        It returns the same sum on every index.
        """
        loss = CrossEntropy(self.ignore_index, self.label_smoothing)
        loss._axis, loss._vocabulary = axis, tuple(tuple(ranges) for ranges in vocabulary)
        return loss

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:  # [.., v_tp], [..] -> []
        held = ((0, logits.shape[-1]),) if self._vocabulary is None else self._vocabulary[self._axis.index]
        length = sum(stop - start for start, stop in held)
        if targets.shape != logits.shape[:-1] or targets.is_floating_point() or logits.shape[-1] != length:
            raise ValueError(
                f"targets must be whole numbers of shape {list(logits.shape[:-1])} and logits have {length} columns; "
                f"they are {targets.dtype} of shape {list(targets.shape)}, and logits {list(logits.shape)}"
            )
        total = max(stop for part in self._vocabulary or (held,) for _, stop in part)
        targets = targets.reshape(-1)
        counted = targets != self.ignore_index
        wrong = targets[counted & ((targets < 0) | (targets >= total))]
        if len(wrong):
            raise ValueError(
                f"target {int(wrong[0])} is outside the vocabulary of {total} and not ignore_index={self.ignore_index}"
            )
        places = _places(targets, held)
        return _Loss.apply(logits.reshape(-1, length), places, counted, self._axis, total, self.label_smoothing)

    def weight(self, targets: Tensor) -> float:
        """How many tokens count."""
        return float((targets != self.ignore_index).sum())

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"


def _places(targets: Tensor, held: tuple[Range, ...]) -> Tensor:
    """Where each target stands among the columns held here; -1 if it is elsewhere."""
    places, first = torch.full_like(targets, -1), 0
    for start, stop in held:
        places = torch.where((targets >= start) & (targets < stop), targets - start + first, places)
        first += stop - start
    return places


def _softmax(kind: Callable[..., Tensor], logits: Tensor, out: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The softmax, or log softmax, of some rows at a time, in `out` if it has the wide dtype, else in a buffer.

    torch's fused kernel, which on CPUs is three times as fast as subtracting and `exp`.
    """
    wide, step = _wide(logits), max(1, _BLOCK // max(1, logits.shape[1]))
    inside = out is not None and out.dtype == wide
    buffer = None if inside else logits.new_empty(min(step, len(logits)), logits.shape[1], dtype=wide)
    for first in range(0, len(logits), step):
        rows = slice(first, min(first + step, len(logits)))
        yield rows, kind(logits[rows], -1, dtype=wide, out=out[rows] if inside else buffer[: rows.stop - first])


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Loss(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, counted: Tensor, axis: Axis, total: int, smoothing: float
    ) -> Tensor:
        wide = _wide(logits)
        highest = logits.amax(-1)  # [n], of the columns held here
        top = axis.allreduce(highest.to(wide, copy=True), "max")
        here = places >= 0
        target = logits.gather(-1, places.clamp(min=0)[:, None])[:, 0].to(wide) - top
        share = torch.empty_like(top)  # the log softmax of the highest logit: - log sum exp(z - highest)
        for rows, block in _softmax(torch.log_softmax, logits):
            torch.amax(block, -1, out=share[rows])
        own = (highest - top - share).exp().masked_fill(highest == -inf, 0)  # sum exp(z - top) over these columns
        sums = [own.clone(), target.masked_fill(~here, 0)]
        if smoothing:
            sums.append(logits.sum(-1, dtype=wide) - top * logits.shape[1])
        sums = axis.allreduce(torch.stack(sums))
        losses = sums[0].log() - (1 - smoothing) * sums[1]
        if smoothing:
            losses -= smoothing / total * sums[2]
        ctx.save_for_backward(logits, places, counted, own, sums[0])
        ctx.total, ctx.smoothing = total, smoothing
        return losses.masked_fill_(~counted, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, places, counted, own, sums = ctx.saved_tensors
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        weight = (grad * counted).to(sums.dtype)  # [n]
        scale = weight * (own / sums)
        held = (places >= 0) * weight * (1 - ctx.smoothing)
        nothing = own == 0  # all of its columns are -inf here, and torch's softmax of them is not a number
        some = bool(nothing.any())
        for rows, block in _softmax(torch.softmax, logits, out):
            block.mul_(scale[rows, None])
            if some:
                block.masked_fill_(nothing[rows, None], 0)
            if ctx.smoothing:
                block.sub_(weight[rows, None], alpha=ctx.smoothing / ctx.total)
            block.scatter_add_(-1, places[rows, None].clamp(min=0), -held[rows, None])
            if block.dtype != out.dtype:
                out[rows] = block
        return out, None, None, None, None, None
