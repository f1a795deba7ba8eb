"""Messages between pipeline stages: several tensors with their shapes, matched by name, never blocking.

A message is a fixed-size note (shapes, dtypes, what is absent, and a small Python value) followed by the tensors. The
note travels over MPI whatever carries the tensors; it costs about a microsecond, and so shapes may change at any time.
"""

from __future__ import annotations

import pickle
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridpar.wires.axis import Axis, Handle

_NOTE_BYTES = 1024  # longer notes go on in a second message
_ANY_TAG = 0  # of all notes on a carrier that knows no tags

Message = tuple[list[Tensor | None], Any]


class Mailbox:
    """Sends and receives messages along one axis.

    A carrier without tags (NCCL) delivers in the order of sending. There the notes come in that order too, and what
    arrives before it is wanted is kept.
    """

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self._axis, self._notes, self._device = axis, axis.notes, device
        self._leaving: list[Handle] = []
        self._early: dict[tuple[int, int], deque[Message]] = defaultdict(deque)

    def post(self, to: int, tag: int, tensors: Sequence[Tensor | None], value: Any = None) -> None:
        """Begin to send to index `to`. The tensors must not be changed until `flush` has returned."""
        self._leaving = [handle for handle in self._leaving if not handle.done()]
        shapes = [None if t is None else (t.dtype, tuple(t.shape)) for t in tensors]
        self._send_note(to, tag, (tag, shapes, value))
        for t in tensors:
            if t is not None and t.numel():
                self._leaving.append(self._axis.send(t.detach().contiguous(), to, tag))

    def take(self, source: int, tag: int) -> Message:
        """Wait for the message `tag` of index `source`: its tensors and value."""
        if not self._axis.ordered:
            return self._receive(source, tag)[1]
        while not self._early[source, tag]:
            came, message = self._receive(source, tag)
            self._early[source, came].append(message)
        return self._early[source, tag].popleft()

    def flush(self) -> None:
        """Wait until everything posted has left."""
        for handle in self._leaving:
            handle.wait()
        self._leaving.clear()

    def _send_note(self, to: int, tag: int, note: Any) -> None:
        letter = pickle.dumps(note)
        text = torch.frombuffer(bytearray(len(letter).to_bytes(8, "little") + letter), dtype=torch.uint8)
        head = torch.zeros(_NOTE_BYTES, dtype=torch.uint8)
        head[: min(len(text), _NOTE_BYTES)] = text[:_NOTE_BYTES]
        name = _ANY_TAG if self._axis.ordered else tag
        self._leaving.append(self._notes.send(head, to, name))
        if len(text) > _NOTE_BYTES:
            self._leaving.append(self._notes.send(text[_NOTE_BYTES:].clone(), to, name))

    def _receive(self, source: int, tag: int) -> tuple[int, Message]:
        name = _ANY_TAG if self._axis.ordered else tag
        head = torch.empty(_NOTE_BYTES, dtype=torch.uint8)
        self._notes.recv(head, source, name).wait()
        length = int.from_bytes(head[:8].numpy().tobytes(), "little")
        if length > _NOTE_BYTES - 8:
            rest = torch.empty(length + 8 - _NOTE_BYTES, dtype=torch.uint8)
            self._notes.recv(rest, source, name).wait()
            head = torch.cat([head, rest])
        came, shapes, value = pickle.loads(head[8 : 8 + length].numpy().tobytes())
        tensors = [None if s is None else torch.empty(s[1], dtype=s[0], device=self._device) for s in shapes]
        for handle in [self._axis.recv(t, source, came) for t in tensors if t is not None and t.numel()]:
            handle.wait()
        return came, (tensors, value)
