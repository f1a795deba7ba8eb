"""Sequences of different lengths as one block of rows, time step after time step.

    lengths 3, 2, 2, sorted        time      0      1      2
                                   rows    a b c  a b c    a        sizes (3, 3, 1)

The layout of torch's PackedSequence. A padded batch is the case where all lengths are equal. Each sequence reversed in
its own length has the same sizes, so both directions of a recurrence take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hybridpar.tensor.gates import Options


@dataclass(frozen=True)
class Rows:
    """Where the rows of a block belong: n rows of b sequences, the longest of l steps.

    Example:
        >>> rows = Rows.of((3, 3, 1), torch.tensor([2, 0, 1]))
        >>> rows.backwards.tolist(), rows.last.tolist()
        ([6, 4, 5, 3, 1, 2, 0], [6, 4, 5])
    """

    sizes: tuple[int, ...]  # how many sequences are as long as each step
    backwards: Tensor  # [n]: row i of the reversed sequences is row backwards[i]; its own inverse
    last: Tensor  # [b]: the row of each sequence's last step
    places: Tensor  # [n]: where the row is in a batch [b, l], flattened, of the sequences as the user has them

    @classmethod
    def of(cls, sizes: tuple[int, ...], order: Tensor | None = None, device: torch.device | None = None) -> Rows:
        """`order` [b] says which of the user's sequences each sorted one is; by default they are as the user has them.

        ValueError where there is no step, or no sequence.
        """
        if not sizes or sizes[0] < 1:
            raise ValueError(f"a recurrence needs one step and one sequence at least, and this has steps of {sizes}")
        many = torch.tensor(sizes, device=device)  # [l]
        starts = many.cumsum(0) - many
        time = torch.repeat_interleave(torch.arange(len(sizes), device=device), many)  # [n]
        sequence = torch.arange(len(time), device=device) - starts[time]  # [n]
        lengths = torch.bincount(sequence)  # [b]
        users = sequence if order is None else order.to(sequence.device)[sequence]
        return cls(
            tuple(sizes),
            starts[lengths[sequence] - 1 - time] + sequence,
            starts[lengths - 1] + torch.arange(len(lengths), device=device),
            users * len(sizes) + time,
        )

    def by_sample(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of the batch [b, l, f] that the rows `x` [n, f] are, as rows again; padding is zeros."""
        padded = x.new_zeros(self.sizes[0] * len(self.sizes), x.shape[-1]).index_copy(0, self.places, x)
        changed = function(padded.view(self.sizes[0], len(self.sizes), -1))
        return changed.flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class Batch:
    """Sequences as rows, and how they came in, so that they can leave in the same form."""

    data: Tensor  # [t, f]
    rows: Rows
    options: Options
    packed: PackedSequence | None = None
    unbatched: bool = False

    @classmethod
    def of(cls, x: Tensor | PackedSequence, options: Options, features: int, name: str) -> Batch:
        """ValueError where `x` is no batch of sequences of so many features."""
        if isinstance(x, PackedSequence):
            rows = Rows.of(tuple(x.batch_sizes.tolist()), x.sorted_indices, x.data.device)
            return cls(_fits(x.data, features, name), rows, options, packed=x)
        if x.dim() not in (2, 3):
            raise ValueError(f"{name}: an input of shape {list(x.shape)} is neither [l, b, f] nor unbatched [l, f]")
        steps = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if options.batch_first else x  # [l, b, f]
        rows = Rows.of((steps.shape[1],) * len(steps), device=x.device)
        return cls(_fits(steps.flatten(0, 1), features, name), rows, options, unbatched=x.dim() == 2)

    def output(self, y: Tensor) -> Tensor | PackedSequence:
        """Rows [t, f] in the form of what came in."""
        if self.packed is not None:
            return PackedSequence(y, self.packed.batch_sizes, self.packed.sorted_indices, self.packed.unsorted_indices)
        steps = y.unflatten(0, (len(self.rows.sizes), -1))
        if self.unbatched:
            return steps.squeeze(1)
        return steps.transpose(0, 1) if self.options.batch_first else steps

    def enter(self, state: Tensor | None, features: int, name: str) -> Tensor:
        """The user's h or c of all layers, [L D, b, features], or zeros, in the order of the rows."""
        shape = (self.options.num_layers * len(self.options.directions), self.rows.sizes[0], features)
        if state is None:
            return self.data.new_zeros(shape)
        state = state.unsqueeze(1) if self.unbatched and state.dim() == 2 else state
        if tuple(state.shape) != shape:
            raise ValueError(f"{name}: an initial state has shape {list(state.shape)} and should have {list(shape)}")
        order = None if self.packed is None else self.packed.sorted_indices
        return state if order is None else state.index_select(1, order)

    def leave(self, state: Tensor) -> Tensor:
        """h or c in the user's order and form."""
        order = None if self.packed is None else self.packed.unsorted_indices
        state = state if order is None else state.index_select(1, order)
        return state.squeeze(1) if self.unbatched else state


def _fits(data: Tensor, features: int, name: str) -> Tensor:
    if data.shape[-1] != features:
        raise ValueError(f"{name}: sequences of {data.shape[-1]} features come in and {features} are expected")
    return data
