"""How many bytes a rank hands to the axes: a count that stands before their methods.

    allreduce, allgather, reduce_scatter, send    the bytes of the tensor, whether begun or done at once
    alltoall                                      those of all pieces
    broadcast                                     those of the tensor, at its source

What a carrier makes of it (a ring moves 2 (n-1)/n of an allreduce) is its own affair, and what goes around the axes,
such as Horovod's own optimizer, is not seen. A thread may use an axis too (the servers of optim/sync).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridpar.wires.axis import Axis

_METHODS = ("allreduce", "allgather", "reduce_scatter", "alltoall", "broadcast", "send")
_METHODS += tuple(name for name in dir(Axis) if name.startswith("start_"))


class Traffic:
    """Counts what this rank hands to the axes of each name, from now until `close`.

    Example:
        >>> traffic = Traffic({"data": [world.data, world.peers]})      # doctest: +SKIP
        >>> traffic.bytes["data"]                                       # doctest: +SKIP
        4096
    """

    def __init__(self, axes: Mapping[str, Sequence[Axis]]) -> None:
        self.bytes = dict.fromkeys(axes, 0)
        self._inside = threading.local()  # an axis may use another, or itself, to do what it is asked
        self._lock = threading.Lock()
        self._replaced: list[tuple[Axis, str, Any]] = []
        self.follow(axes)

    def follow(self, axes: Mapping[str, Sequence[Axis]]) -> None:
        """Count what is handed to these axes too."""
        followed = {id(axis) for axis, _, _ in self._replaced}
        for name, several in axes.items():
            for axis in {id(axis): axis for axis in several if id(axis) not in followed}.values():
                for method in _METHODS:
                    self._stand_before(name, axis, method)

    def reset(self) -> None:
        """Count from zero again."""
        self.bytes = dict.fromkeys(self.bytes, 0)

    def close(self) -> None:
        """Count no more."""
        while self._replaced:
            axis, method, counted = self._replaced.pop()
            if vars(axis).get(method) is counted:
                delattr(axis, method)

    def _stand_before(self, name: str, axis: Axis, method: str) -> None:
        own: Callable[..., Any] = getattr(axis, method)

        @functools.wraps(own)
        def counted(x: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "here", False):
                return own(x, *args, **kwargs)
            if method != "broadcast" or axis.index == (args[0] if args else kwargs["source"]):
                count = sum(t.numel() * t.element_size() for t in (x if method == "alltoall" else [x]))
                with self._lock:
                    self.bytes[name] += count
            self._inside.here = True
            try:
                return own(x, *args, **kwargs)
            finally:
                self._inside.here = False

        setattr(axis, method, counted)
        self._replaced.append((axis, method, counted))
