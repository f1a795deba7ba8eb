"""A switch that holds every frame back for a while, for links as long as between two cities.

    python switch.py SECONDS PID...          started by `unshare --net`; PID is the first process of a host

Each host gets an eth0 that ends here, as a TAP device. (The kernel's own `netem` is a module that many lack.) It ends
with its standard input.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import select
import struct
import subprocess
import sys
import time
from contextlib import suppress

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME = 65536  # bytes, at most


def main(seconds: float, pids: list[int]) -> None:
    """Returns when nobody holds the other end of its standard input any more."""
    with suppress(PermissionError):  # ranks that yield to each other would keep it from the cores, which is no network
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ports = [_port(number, pid) for number, pid in enumerate(pids)]
    print("ready", flush=True)
    seen: dict[bytes, int] = {}  # address of a host -> its port
    held: list[tuple[float, int, int, bytes]] = []  # (when it is due, a number, to which port, the frame)
    count = itertools.count()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        readable, _, _ = select.select([*ports, sys.stdin], [], [], wait)
        if sys.stdin in readable:
            return
        for port in readable:
            frame = os.read(port, FRAME)
            to, source = frame[:6], frame[6:12]
            seen[source] = port
            for other in [seen[to]] if to in seen else [p for p in ports if p != port]:
                heapq.heappush(held, (time.monotonic() + seconds, next(count), other, frame))
        while held and held[0][0] <= time.monotonic():
            _, _, port, frame = heapq.heappop(held)
            with suppress(OSError):  # the host has not switched it on yet, or is gone
                os.write(port, frame)


def _port(number: int, pid: int) -> int:
    port = os.open("/dev/net/tun", os.O_RDWR)
    name = f"port{number}"
    fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "netns", str(pid), "name", "eth0"], check=True)
    return port


if __name__ == "__main__":
    main(float(sys.argv[1]), [int(pid) for pid in sys.argv[2:]])
