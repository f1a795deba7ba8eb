"""Messages between pipeline stages: several tensors with their shapes, matched by name, never blocking.

A message is a fixed-size note (shapes, dtypes, what is absent, and a small Python value) followed by the tensors. The
note travels over MPI whatever carries the tensors; it costs about a microsecond, and so shapes may change at any time.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridpar.wires.axis import Axis, Handle

_NOTE_BYTES = 1024  # longer notes go on in a second message


class Mailbox:
    """Sends and receives messages along one axis."""

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self._axis, self._device = axis, device
        self._notes = axis.notes
        self._leaving: list[Handle] = []

    def post(self, to: int, tag: int, tensors: Sequence[Tensor | None], value: Any = None) -> None:
        """Begin to send to index `to`. The tensors must not be changed until `flush` has returned."""
        shapes = [None if t is None else (t.dtype, tuple(t.shape)) for t in tensors]
        letter = pickle.dumps((shapes, value))
        head = torch.zeros(_NOTE_BYTES, dtype=torch.uint8)
        text = torch.frombuffer(bytearray(len(letter).to_bytes(8, "little") + letter), dtype=torch.uint8)
        head[: min(len(text), _NOTE_BYTES)] = text[:_NOTE_BYTES]
        self._leaving = [handle for handle in self._leaving if not handle.done()]
        self._leaving.append(self._notes.send(head, to, tag))
        if len(text) > _NOTE_BYTES:
            self._leaving.append(self._notes.send(text[_NOTE_BYTES:].clone(), to, tag))
        for t in tensors:
            if t is not None and t.numel():
                self._leaving.append(self._axis.send(t.detach().contiguous(), to, tag))

    def take(self, source: int, tag: int) -> tuple[list[Tensor | None], Any]:
        """Wait for the message `tag` of index `source`: its tensors and value."""
        head = torch.empty(_NOTE_BYTES, dtype=torch.uint8)
        self._notes.recv(head, source, tag).wait()
        length = int.from_bytes(head[:8].numpy().tobytes(), "little")
        if length > _NOTE_BYTES - 8:
            rest = torch.empty(length + 8 - _NOTE_BYTES, dtype=torch.uint8)
            self._notes.recv(rest, source, tag).wait()
            head = torch.cat([head, rest])
        shapes, value = pickle.loads(head[8 : 8 + length].numpy().tobytes())
        tensors = [None if s is None else torch.empty(s[1], dtype=s[0], device=self._device) for s in shapes]
        for handle in [self._axis.recv(t, source, tag) for t in tensors if t is not None and t.numel()]:
            handle.wait()
        return tensors, value

    def flush(self) -> None:
        """Wait until everything posted has left."""
        for handle in self._leaving:
            handle.wait()
        self._leaving.clear()
