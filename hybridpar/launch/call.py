"""What a rank of `hp.run` does: fetches its function from where it was started, calls it, and tells the result.

HYBRIDPAR_CALL          where the desk (function.py) is: the fields of a Place, in JSON
HYBRIDPAR_CALL_KEY      that both prove to have, in hexadecimal digits
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client, Connection

from hybridpar.wires.address import Place, connected
from hybridpar.wires.ending import FAILED, INTERRUPTED, Ending

_SECONDS = 10.0  # for each address of the desk


def main() -> None:
    """Call the function. An exception of it ends the job as that of any script does."""
    import cloudpickle

    told = json.loads(os.environ.pop("HYBRIDPAR_CALL"))
    desk = _connected(Place(**told), bytes.fromhex(os.environ.pop("HYBRIDPAR_CALL_KEY")))
    ending = Ending.installed()
    desk.send_bytes(str(ending.rank).encode())
    sys.path[:] = pickle.loads(desk.recv_bytes())  # the function's modules are found there
    try:
        function, args, kwargs = pickle.loads(desk.recv_bytes())
        returned = function(*args, **kwargs)
    except BaseException as error:
        text, code = _told(error)
        return _fail(desk, ending, f"rank {ending.rank} {text}", code)
    try:
        result = cloudpickle.dumps(returned)
    except Exception as error:
        kind, why = type(returned).__name__, f"{type(error).__name__}: {error}"
        text = (
            f"rank {ending.rank}: the return value, a {kind}, cannot be pickled ({why}): return plain values or tensors"
        )
        return _fail(desk, ending, text, FAILED)
    desk.send_bytes(b"result")
    desk.send_bytes(result)


def _told(error: BaseException) -> tuple[str, int]:
    """What the function did, and the code with which the job ends."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}), and so has no result: return, or raise an exception", FAILED
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None  # without this module
    lines = traceback.format_exception(type(error), error, trace)
    return f"failed:\n{''.join(lines)}", INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def _fail(desk: Connection, ending: Ending, text: str, code: int) -> None:
    desk.send_bytes(b"failure")
    desk.send_bytes(text.encode())
    ending.end_untold(code)


def _connected(place: Place, key: bytes) -> Connection:
    try:
        with connected(place, b"", _SECONDS) as tried:
            address = tried.getpeername()[:2]
        return Client(address, authkey=key)
    except OSError as error:
        raise RuntimeError(
            f"this host cannot reach hp.run at port {place.port} of {', '.join(place.addresses)} ({error}): call "
            "hp.run on a host that all hosts can reach"
        ) from None


if __name__ == "__main__":
    main()
