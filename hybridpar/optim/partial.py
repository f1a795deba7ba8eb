"""Gradients of which each tensor rank has a share, summed over the tensor axis before the data axis averages them.

    whole, partial         index 0: [a0 a1]   index 1: [b0 b1]                 both: [a0+b0 a1+b1]
    cut with overlaps      index 0 holds 0:4  index 1 holds 2:6                2:4 is summed, the rest is its holder's

A sum happens in the hook of its parameter, during the last backward pass of a step: so it comes before the hooks of
`optim.reduce` and of Horovod's own optimizer, whichever the user chose, take the gradient.

The ranks must then meet for the same parameter in the same order. They run the same backward pass, but one may lack a
gradient that its peers have. So before each sum they vote: each names the place of the parameter it has come to, the
latest one in order of registration wins (a backward pass goes backwards), and who has not come to it joins with what it
has, or zeros. At the end those who are done vote -1 until all are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.shard import Spec
from hybridpar.wires.axis import Axis

_DONE = -1

Member = tuple[str, Parameter, Spec]


class PartialSums:
    """Sums the gradients of the parameters in `chunks` whose spec is partial over the tensor axis.

    Make it before any optimizer: hooks run in the order in which they were registered.

    Example:
        >>> sums = PartialSums(world.tensor, [[("norm.weight", p, Spec("norm.weight", (8,), partial=True))]])
        ...                                                                     # doctest: +SKIP
        >>> sums.arm(0); loss.backward(); sums.flush(0)                         # doctest: +SKIP
    """

    def __init__(self, axis: Axis, chunks: Sequence[Sequence[Member]]) -> None:
        self._chunks = [_Chunk(axis, [member for member in chunk if member[2].partial]) for chunk in chunks]

    def begin(self, chunk: int) -> None:
        """A step begins: gradients left by earlier steps, if any, are sums already, so only their owners keep them."""
        self._chunks[chunk].begin()

    def arm(self, chunk: int) -> None:
        """The next backward pass of `chunk` is the last of this step."""
        self._chunks[chunk].arm()

    def flush(self, chunk: int) -> None:
        """The pass is over: sum what it did not touch."""
        self._chunks[chunk].flush()


class _Chunk:
    """The partial parameters of one chunk; a parameter's place is its number in order of registration."""

    def __init__(self, axis: Axis, members: Sequence[Member]) -> None:
        self._axis, self._members = axis, members
        self._armed = False
        self._summed: set[int] = set()
        self._hooked: set[int] = set()
        self._hook()

    def begin(self) -> None:
        for _, p, spec in self._members:
            if p.grad is not None:
                kept = p.grad.clone()
                p.grad.zero_()
                for (start, stop), _ in spec.owned(self._axis.index):
                    _along(p.grad, spec, start, stop).copy_(_along(kept, spec, start, stop))

    def arm(self) -> None:
        self._hook()  # what was frozen before
        self._armed = True

    def flush(self) -> None:
        if not self._members:
            return
        for place in reversed(range(len(self._members))):
            if place not in self._summed and self._members[place][1].grad is not None:
                self._meet(place)
        self._meet(_DONE)
        self._armed = False
        self._summed.clear()

    def _hook(self) -> None:
        for place, (_, p, _) in enumerate(self._members):
            if p.requires_grad and place not in self._hooked:
                p.register_post_accumulate_grad_hook(functools.partial(self._come, place))
                self._hooked.add(place)

    def _come(self, place: int, p: Parameter) -> None:
        """A gradient is complete, if this is the last pass."""
        if not self._armed:
            return
        if place in self._summed:
            raise ValueError(
                f"{self._members[place][0]}: its gradient came after its sum over the tensor axis; all tensor ranks "
                "must run the same backward pass, and it must reach each parameter once"
            )
        self._meet(place)

    def _meet(self, place: int) -> None:
        """Take part in sums until the one of `place` is done, or all ranks are."""
        while True:
            vote = torch.tensor([place])
            chosen = int(self._axis.notes.allreduce(vote, "max"))
            if chosen != _DONE:
                self._sum(chosen)
            if chosen == place:
                return

    def _sum(self, place: int) -> None:
        _, p, spec = self._members[place]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if spec.dim is None:
            p.grad.copy_(self._axis.allreduce(p.grad.clone(memory_format=torch.contiguous_format)))
        else:
            self._sum_parts(p.grad, spec)
        self._summed.add(place)

    def _sum_parts(self, grad: Tensor, spec: Spec) -> None:
        """Put this rank's parts where they are in the whole, sum the wholes, take the parts back."""
        whole = grad.new_zeros(spec.shape)
        held = spec.held(self._axis.index)
        pieces = grad.split([stop - start for start, stop in held], spec.dim)
        for (start, stop), piece in zip(held, pieces):
            whole.narrow(spec.dim, start, stop - start).add_(piece)
        self._axis.allreduce(whole)
        for (start, stop), piece in zip(held, pieces):
            piece.copy_(whole.narrow(spec.dim, start, stop - start))


def _along(x: Tensor, spec: Spec, start: int, stop: int) -> Tensor:
    """A local range of `spec.owned`: along the cut dim, or all of a whole parameter."""
    return x if spec.dim is None else x.narrow(spec.dim, start, stop - start)
