"""Reach a rank on another host: by one of its addresses, since its name may mean nothing, or 127.0.1.1, elsewhere."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from hybridpar.launch.interfaces import interfaces, this_host


@dataclass(frozen=True)
class Place:
    """Where somebody listens: what tells its host apart, the host's addresses with their networks, the port."""

    host: str
    addresses: tuple[str, ...]
    port: int

    @classmethod
    def here(cls, port: int) -> Place:
        """A port of this host."""
        return cls(this_host(), tuple(interfaces()), port)


def connected(place: Place, hello: bytes, seconds: float) -> socket.socket:
    """A connection to `place` over which `hello` has been sent; each address is tried for at most so many seconds.

    Raises OSError where none answers.
    """
    last = OSError(f"no address of {place} is known")
    for address in _promising(place):
        try:
            made = socket.create_connection((address, place.port), seconds)
            made.sendall(hello)
            return made
        except OSError as error:
            last = error
    raise last


def _promising(place: Place) -> Iterator[str]:
    """Its addresses without their networks, those in a network of ours first; on one host the shortest way."""
    if place.host == this_host():
        yield "127.0.0.1"
        return
    ours = {ipaddress.ip_interface(address).network for address in interfaces()}
    known = [ipaddress.ip_interface(address) for address in place.addresses]
    mine = {ipaddress.ip_interface(address).ip for address in interfaces()}
    for one in sorted(known, key=lambda one: one.network not in ours):
        if one.ip not in mine:  # as those of containers' bridges are, the same on each host
            yield str(one.ip)
