"""Gradients averaged over the data axis, while the backward pass goes on.

    the last backward of a chunk   b3 ....... b2 ....... b1 ....... b0 |          (b: the gradient of a parameter)
    buckets on their way                [b3 b2] -------------          |
                                                         [b1 b0]       | flush ----------- wait

Gradients of a step's earlier microbatches add up in `p.grad` as always; only the last pass is watched (`arm`). Each
full bucket leaves at once, as one operation with a name, in the same order on every replica: the makeup of the buckets
is settled at construction, and a bucket waits for the ones before it. `flush` sends the rest.
"""

from __future__ import annotations

import enum
import weakref
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from hybridpar.optim.bucket import Bucket, Named, grouped
from hybridpar.optim.compression import Compression, Wire
from hybridpar.wires.axis import Axis

TWICE = (
    "train_step was called twice without optimizer.step(): to accumulate gradients use "
    "train_step(..., microbatches=...), to drop them call optimizer.zero_grad()"
)


class Phase(enum.Enum):
    """Where a chunk is in its step."""

    IDLE = "idle"
    ARMED = "armed"
    FLUSHED = "flushed"


class Reducer:
    """Averages the gradients of `chunks` over `axis`.

    After `wait` each `p.grad` is the average over the replicas; one that has no gradient counts as zeros, and a
    parameter without a gradient on all of them keeps None. Gradients are then views of the buckets: keep a clone, not
    the tensor, beyond the next step. bfloat16 is added in float32. Sparse gradients become dense.

    Example:
        >>> reducer = Reducer(world.data, [list(model.named_parameters())])     # doctest: +SKIP
        >>> reducer.arm(0); loss.backward(); reducer.flush(0); reducer.wait()   # doctest: +SKIP
    """

    def __init__(
        self,
        axis: Axis,
        chunks: Sequence[Named],
        bucket_bytes: int | None = None,
        compression: Wire | None = None,
        name: str = "gradients",
    ) -> None:
        self.company = axis
        if axis.size == 1:  # each gradient is the average already: nothing to watch
            chunks = [[] for _ in chunks]
        wire = compression or Compression.none
        agree(axis, chunks)
        self._chunks = [_Chunk(f"{name}.{i}", axis, list(c), bucket_bytes, wire) for i, c in enumerate(chunks)]

    @property
    def pending(self) -> bool:
        """Whether gradients are on their way, `wait` being due."""
        return any(chunk.phase is not Phase.IDLE for chunk in self._chunks)

    def arm(self, chunk: int) -> None:
        """The next backward pass of `chunk` is the last of this step: send its gradients off as they come.

        Raises ValueError if the gradients of an earlier step have not been waited for.
        """
        self._chunks[chunk].arm()

    def flush(self, chunk: int) -> None:
        """The pass is over: send what has not left yet, gradients that the pass did not touch included."""
        self._chunks[chunk].flush()

    def wait(self) -> None:
        """Return when `p.grad` is the average everywhere; at once if nothing is on its way."""
        for chunk in self._chunks:
            chunk.wait()

    def missed(self) -> dict[Parameter, Tensor]:
        """What the compression has not sent yet of each gradient, the mean over the replicas; all call it together."""
        return {p: x for chunk in self._chunks for p, x in chunk.missed().items()}

    def owe(self, missed: Mapping[Parameter, Tensor]) -> None:
        """Send `missed` with the next gradients."""
        for chunk in self._chunks:
            chunk.owe(missed)


class _Chunk:
    """The parameters of one chunk, their buckets, and the hooks that fill them."""

    def __init__(self, name: str, axis: Axis, parameters: Named, bucket_bytes: int | None, wire: Wire) -> None:
        self._name, self._axis, self._parameters = name, axis, parameters
        self._bucket_bytes, self._wire = bucket_bytes, wire
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove, self._hooks)
        self.phase = Phase.IDLE
        self._build()

    def arm(self) -> None:
        if self.phase is not Phase.IDLE:
            raise ValueError(TWICE)
        if self._kinds() != self._built:  # frozen, unfrozen or converted since; the same on every replica
            self._build()
        self.phase = Phase.ARMED

    def take(self, p: Parameter) -> None:
        """A gradient is complete, if this is the last pass."""
        if self.phase is Phase.IDLE:
            return
        if self.phase is Phase.FLUSHED:  # autograd has just added to what is being averaged
            raise ValueError(TWICE)
        bucket, place = self._places[p]
        bucket.take(place)
        while self._launched < len(self._buckets) and self._buckets[self._launched].full:
            self._launch()

    def flush(self) -> None:
        assert self.phase is Phase.ARMED, f"{self._name} is {self.phase.value}, not armed"
        while self._launched < len(self._buckets):
            self._launch()
        self.phase = Phase.FLUSHED

    def wait(self) -> None:
        if self.phase is Phase.ARMED:
            raise ValueError("optimizer.step() was called before the last backward pass of train_step was over")
        if self.phase is Phase.FLUSHED:
            self.phase, self._launched = Phase.IDLE, 0
            for bucket in self._buckets:
                bucket.finish()

    def missed(self) -> dict[Parameter, Tensor]:
        return {p: x for bucket in self._buckets for p, x in bucket.missed(self._axis, self._wire).items()}

    def owe(self, missed: Mapping[Parameter, Tensor]) -> None:
        for bucket in self._buckets:
            bucket.owe(missed, self._wire)

    def _launch(self) -> None:
        self._buckets[self._launched].launch(self._axis, self._wire)
        for earlier in self._buckets[: self._launched]:
            earlier.progress()
        self._launched += 1

    def _build(self) -> None:
        remove(self._hooks)
        self._built = self._kinds()
        trained = [(name, p) for name, p in self._parameters if p.requires_grad]
        groups = grouped(trained, self._bucket_bytes)
        self._buckets = [Bucket(f"{self._name}.{i}", group) for i, group in enumerate(groups)]
        self._places = {
            p: (bucket, place)
            for bucket, group in zip(self._buckets, groups)
            for place, (_, p) in enumerate(group)
        }
        self._launched = 0
        this = weakref.ref(self)  # a parameter outlives its optimizer, and must not keep the buckets
        self._hooks += [p.register_post_accumulate_grad_hook(lambda p: _deliver(this, p)) for _, p in trained]

    def _kinds(self) -> list[tuple[bool, torch.dtype, torch.device, torch.Size, tuple[int, ...]]]:
        return [(p.requires_grad, p.dtype, p.device, p.shape, p.stride()) for _, p in self._parameters]


def _deliver(chunk: weakref.ref[_Chunk], p: Parameter) -> None:
    alive = chunk()
    if alive is not None:
        alive.take(p)


def remove(hooks: list[RemovableHandle]) -> None:
    """Take away all `hooks`, and forget them."""
    while hooks:
        hooks.pop().remove()


def agree(axis: Axis, chunks: Sequence[Named]) -> None:
    """Raise ValueError on all replicas unless their parameters are the same: else they would wait for ever."""
    mine = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for chunk in chunks for name, p in chunk]
    if len(set(axis.objects(zlib.crc32(repr(mine).encode())))) == 1:
        return
    for index, theirs in enumerate(axis.objects(mine)):  # all ranks come here together
        if theirs != mine:
            here = next((a for a, b in zip(mine, theirs) if a != b), f"{len(mine)} parameters")
            there = next((b for a, b in zip(mine, theirs) if a != b), f"{len(theirs)} parameters")
            raise ValueError(
                f"replicas differ: data index {axis.index} has {here} where data index {index} has {there}; "
                "build the same model, with the same parameters frozen, on every rank"
            )
