"""`hp.run`: a Python function on many ranks, from a notebook or another program.

here                                    each rank (call.py)
opens a desk (a TCP port, with a key) <-- asks: function, arguments, where modules are found
waits for the job                     <-- tells its result, or why there is none
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from multiprocessing.connection import Connection, Listener
from typing import IO, Any

from hybridpar.install.probe import prefix, scripts
from hybridpar.launch import call
from hybridpar.launch.hosts import allocated
from hybridpar.launch.job import plan
from hybridpar.launch.reach import checked
from hybridpar.launch.start import start
from hybridpar.launch.wishes import Wishes
from hybridpar.wires.address import Place

_INTERRUPTED = 130


def run(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    np: int | None = None,
    hosts: str | None = None,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    carrier: str | None = None,
    **options: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on `np` ranks and return what each returned, in order of the ranks.

    The function calls `hp.init()` itself; the degrees and carrier given here overrule those that it gives there.
    `hosts` is as in `hybridpar run -H`; `options` are the fields of `launch.wishes.Wishes`, such as `threads=1` or
    `env`-like `sets=(("NAME", "value"),)`. What ranks print appears as the caller's own output. Function, arguments and
    results are pickled (cloudpickle), so functions of a notebook and lambdas are welcome.

    Raises ValueError for arguments that do not fit, before anything is started, and RuntimeError with the rank's
    traceback where it fails, which is told nowhere else.

    Example:
        >>> def rank() -> int:
        ...     return hp.init(tensor=2).rank
        >>> hp.run(rank, np=4)                          # doctest: +SKIP
        [0, 1, 2, 3]
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise RuntimeError("hp.run needs cloudpickle, which pickles functions: `pip install cloudpickle`") from error
    _check(function, args, kwargs, np)
    key = secrets.token_bytes(32)
    try:
        order = cloudpickle.dumps((function, tuple(args), dict(kwargs or {})))
    except Exception as error:
        raise ValueError(
            f"the function or its arguments cannot be pickled ({type(error).__name__}: {error}): make in the function "
            "what cannot travel"
        ) from error
    wishes = _wishes(hosts, options)
    _check_count(np, wishes, (tensor, pipeline, data))
    with _Desk(key, order, everywhere=hosts is not None or wishes.hostfile is not None) as desk:
        told = {"HYBRIDPAR_CALL": desk.address, "HYBRIDPAR_CALL_KEY": key.hex()}
        environment = {**os.environ, **told}
        job = plan(
            np, [call.__file__], environment, scripts(), prefix(), len(os.sched_getaffinity(0)),
            tensor=tensor, pipeline=pipeline, data=data, carrier=carrier, wishes=wishes,
        )  # fmt: skip
        with _led_to(sys.stdout) as out, _led_to(sys.stderr) as errors:
            code = start(checked(job), output=out, errors=errors, elsewhere=lambda: bool(desk.failures))
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if desk.failures:
        raise RuntimeError(min(desk.failures.items())[1])
    missing = sorted(set(range(job.mesh.size)) - set(desk.results))
    if code or missing:
        raise RuntimeError(
            f"the job ended with code {code}" + (f" before ranks {missing} had a result" if missing else "")
        )
    return [pickle.loads(desk.results[rank]) for rank in range(job.mesh.size)]


def _check(function: object, args: object, kwargs: object, np: object) -> None:
    if not callable(function):
        raise ValueError(f"hp.run calls a function on each rank, and {function!r} is none: give the function itself")
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise ValueError(f"args={args!r}: give the function's arguments in a tuple, as in hp.run(function, (1,), np=2)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"kwargs={kwargs!r}: give the function's named arguments in a dict, as in {{'width': 16}}")
    if np is not None and (not isinstance(np, int) or isinstance(np, bool) or np < 1):
        raise ValueError(f"np={np!r}: the number of ranks is a whole number of at least 1")


def _wishes(hosts: str | None, options: Mapping[str, Any]) -> Wishes:
    known = {field.name for field in fields(Wishes)}
    for name in options:
        if name not in known:
            raise ValueError(f"hp.run has no argument {name}: besides np, hosts and the degrees it has {sorted(known)}")
    return Wishes(hosts=hosts, **options)


def _check_count(np: int | None, wishes: Wishes, degrees: Sequence[int | None]) -> None:
    named = [one for one in (np, wishes.hosts, wishes.hostfile, *degrees) if one is not None]
    if not named and allocated(os.environ) is None:
        raise ValueError("how many ranks? give np=2, degrees as in tensor=2, or hosts as in hosts='a:4,b:4'")


class _Desk:
    """Answers ranks while it is open: each gets `order`, and leaves its result (pickled) or what is to be told."""

    def __init__(self, key: bytes, order: bytes, everywhere: bool) -> None:
        self._order, self._open = order, True
        self._listener = Listener(("0.0.0.0" if everywhere else "127.0.0.1", 0), backlog=512, authkey=key)
        self._port = self._listener.address[1]
        self.address = json.dumps(asdict(Place.here(self._port)))
        self.results: dict[int, bytes] = {}
        self.failures: dict[int, str] = {}
        self._serving: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> _Desk:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        with suppress(OSError):  # wakes the thread that waits for ranks
            socket.create_connection(("127.0.0.1", self._port), 1).close()
        self._accepting.join(5)
        self._listener.close()
        for thread in self._serving:
            thread.join(5)

    def _accept(self) -> None:
        while self._open:
            with suppress(Exception):  # somebody without the key
                served = threading.Thread(target=self._serve, args=(self._listener.accept(),), daemon=True)
                self._serving.append(served)
                served.start()

    def _serve(self, rank: Connection) -> None:
        with suppress(EOFError, OSError), rank:  # it may be killed before it has told
            number = int(rank.recv_bytes())
            rank.send_bytes(pickle.dumps(sys.path))
            rank.send_bytes(self._order)
            good, told = rank.recv_bytes() == b"result", rank.recv_bytes()
            if good:
                self.results[number] = told
            else:
                self.failures[number] = told.decode()


@contextmanager
def _led_to(stream: IO[str]) -> Any:
    """A file number, whose text goes to `stream`: that of a notebook is no file."""
    read, write = os.pipe()

    def lead() -> None:
        with os.fdopen(read, encoding="utf-8", errors="replace", newline="") as lines:
            for line in lines:
                stream.write(line)
                stream.flush()

    leading = threading.Thread(target=lead, daemon=True)
    leading.start()
    try:
        yield write
    finally:
        os.close(write)
        leading.join(2)  # what the job has left behind may hold it open
