"""A bucket: gradients of one dtype that travel together, in one flat tensor.

    [ gradient of p0 | gradient of p1 | ... | was there a gradient: p0 p1 ... ]

The flags at the end are averaged with the rest. So all replicas learn which parameters had a gradient on any of them,
and a bucket has the same length everywhere even where a replica has no gradient for some of its parameters.

Buckets are filled in reverse order of registration, about the order in which a backward pass makes gradients; that the
passes overlap with the reduction of full buckets is from Li et al. 2020 (PyTorch Distributed, VLDB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.compression import Sender, Wire
from hybridpar.wires.axis import Axis, Handle

_ALIGNMENT = 16  # elements: each gradient begins at a multiple of it, as vector instructions like it
_LEAST_BYTES = 4 << 20
_MOST_BUCKETS = 64  # of one chunk: each is one operation to negotiate

Named = Sequence[tuple[str, Parameter]]


def grouped(parameters: Named, bucket_bytes: int | None = None) -> list[list[tuple[str, Parameter]]]:
    """The parameters of each bucket, buckets in the order in which they are full.

    `bucket_bytes` None: 4 MiB, or more where that would make more than 64 buckets.
    """
    if bucket_bytes is None:
        bucket_bytes = max(_LEAST_BYTES, sum(_bytes(p) for _, p in parameters) // _MOST_BUCKETS)
    full: list[list[tuple[str, Parameter]]] = []
    filling: dict[tuple[torch.dtype, torch.device], list[tuple[str, Parameter]]] = {}
    for name, p in reversed(parameters):
        bucket = filling.setdefault((p.dtype, p.device), [])
        bucket.append((name, p))
        if sum(_bytes(member) for _, member in bucket) >= bucket_bytes:
            full.append(filling.pop((p.dtype, p.device)))
    return full + list(filling.values())


class Bucket:
    """One flat tensor and the views of it that are the gradients."""

    def __init__(self, name: str, parameters: Named) -> None:
        self._name, self._parameters = name, list(parameters)
        starts, length = [], 0
        for _, p in parameters:
            starts.append(length)
            length += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        first = parameters[0][1]
        self._flat = torch.zeros(length + len(parameters), dtype=first.dtype, device=first.device)
        self._flags = self._flat[length:]
        self._views = [_view(self._flat, start, p) for start, (_, p) in zip(starts, parameters)]
        # As matrices lie in memory: channels_last ones have another order of dims, and the same number of numbers.
        self._members = [(name, start, tuple(p.shape)) for start, (name, p) in zip(starts, parameters)]
        self._wire: Wire | None = None
        self._sender: Sender | None = None
        self._ready: set[int] = set()
        self._handle: Handle | None = None

    @property
    def full(self) -> bool:
        return len(self._ready) == len(self._parameters)

    def take(self, place: int) -> None:
        """Let the gradient of the parameter at `place` be the view of this bucket, with its value."""
        name, p = self._parameters[place]
        if self._handle is not None:
            raise ValueError(
                f"{name}: a gradient came after its reduction over the data axis had begun; one backward pass must "
                "reach each parameter once (checkpoint with use_reentrant=False, or do not share the parameter there)"
            )
        view = self._views[place]
        if p.grad is not view:
            view.copy_(p.grad.to_dense() if p.grad.is_sparse else p.grad)
            p.grad = view
        self._ready.add(place)

    def launch(self, axis: Axis, wire: Wire) -> None:
        """Begin the reduction, with zeros for parameters that have no gradient here."""
        for place, (_, p) in enumerate(self._parameters):
            if place not in self._ready and p.grad is not None:
                self.take(place)
        for place in set(range(len(self._views))) - self._ready:
            self._views[place].zero_()
        self._flags.copy_(torch.tensor([place in self._ready for place in range(len(self._views))]))
        # Complex numbers travel as pairs of real ones.
        flat = torch.view_as_real(self._flat).view(-1) if self._flat.is_complex() else self._flat
        self._handle = self._by(wire).start(axis, flat, self._name)

    def missed(self, axis: Axis, wire: Wire) -> dict[Parameter, Tensor]:
        """What has not been sent yet of each gradient, the mean over the replicas; all call it together."""
        found = {}
        for place, error in self._by(wire).errors.items():
            name, p = self._parameters[place]
            mean = axis.start_allreduce(error.reshape(-1).clone(), "average", f"{self._name}.{place}.missed").wait()
            found[p] = _view(mean, 0, p)
        return found

    def owe(self, missed: Mapping[Parameter, Tensor], wire: Wire) -> None:
        """Send `missed` with the next gradients; where it has nothing, nothing is owed."""
        for place, error in self._by(wire).errors.items():
            _, p = self._parameters[place]
            owed = _view(error.zero_().view(-1), 0, p)
            if p in missed:
                owed.copy_(missed[p])

    def _by(self, wire: Wire) -> Sender:
        if self._sender is None or self._wire is not wire:
            self._wire, self._sender = wire, wire.of(self._members, self._flat)
        return self._sender

    def progress(self) -> None:
        """Let the carrier go on with what is under way."""
        if self._handle is not None:
            self._handle.done()

    def finish(self) -> None:
        """Wait, and give each parameter that had a gradient on any replica the average."""
        assert self._handle is not None, f"{self._name} was never launched"
        self._handle.wait()
        self._handle = None
        for place, flag in enumerate(self._flags.ne(0).tolist()):
            name, p = self._parameters[place]
            if place in self._ready and p.grad is not self._views[place]:
                raise ValueError(
                    f"{name}: its gradient was removed or replaced while it was being averaged over the data axis; "
                    "call optimizer.step(), optimizer.zero_grad() or optimizer.synchronize() first"
                )
            p.grad = self._views[place] if flag else None
        self._ready.clear()


def _view(flat: Tensor, start: int, p: Parameter) -> Tensor:
    """Where the gradient of `p` lies in `flat`, with the strides of `p` (channels_last, for one)."""
    return flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), start)


def _bytes(p: Parameter) -> int:
    return p.numel() * p.element_size()
