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
from hybridpar.wires.ending import Ending

_SECONDS = 10.0  # for each address of the desk


def main() -> None:
    """Call the function. An exception of it ends the job as that of any script does."""
    import cloudpickle

    told = json.loads(os.environ.pop("HYBRIDPAR_CALL"))
    desk = _connected(Place(**told), bytes.fromhex(os.environ.pop("HYBRIDPAR_CALL_KEY")))
    desk.send_bytes(str(Ending.installed().rank).encode())
    sys.path[:] = pickle.loads(desk.recv_bytes())  # the function's modules are found there
    function, args, kwargs = pickle.loads(desk.recv_bytes())
    try:
        result = cloudpickle.dumps(function(*args, **kwargs))
    except BaseException:
        desk.send_bytes(b"failure")
        desk.send_bytes(traceback.format_exc().encode())
        raise
    desk.send_bytes(b"result")
    desk.send_bytes(result)


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
