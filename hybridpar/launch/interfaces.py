"""What a host says of itself: its network addresses, its cores, whether the files of a job are there.

Run by its path on a host before a job starts there (`python interfaces.py FOLDER FILE...`), it prints one line of JSON.
Only the standard library is used, since that may be all that works there.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_ADDRESS, _MASK = 0x8915, 0x891B  # SIOCGIFADDR, SIOCGIFNETMASK of Linux
_GLOBAL = "00"  # scope, in /proc/net/if_inet6


def interfaces() -> dict[str, str]:
    """The addresses of this host by which others may reach it, each with the name of its interface.

    Example:
        >>> interfaces()                                # doctest: +SKIP
        {'10.0.0.11/24': 'eth0', 'fd00::11/64': 'eth0'}
    """
    return {address: name for address, name in _all().items() if not ipaddress.ip_interface(address).is_loopback}


def names() -> list[str]:
    """The interfaces of this host that have an address, the one to itself too."""
    return sorted(set(_all().values()))


def _all() -> dict[str, str]:
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has none
                address, mask = (
                    socket.inet_ntoa(fcntl.ioctl(asked, number, request)[20:24]) for number in (_ADDRESS, _MASK)
                )
                found[ipaddress.ip_interface(f"{address}/{mask}").with_prefixlen] = name
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, length, scope, _, name = line.split()
            if scope == _GLOBAL:
                found[f"{ipaddress.IPv6Address(bytes.fromhex(digits))}/{int(length, 16)}"] = name
    return found


def this_host() -> str:
    """What tells this host from others, also where containers share a name: processes with the same one share it."""
    told = [socket.gethostname()]
    with suppress(OSError):
        told += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")]
    return " ".join(told)


def shared_networks(addresses: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The networks to keep to; () where nothing needs to be said.

    `addresses` are those of each host. A network that not all hosts have, or in which two have the same address (as
    those of containers are), makes MPI wait for connections that never come.

    Example:
        >>> shared_networks({"a": ["10.0.0.1/24", "172.17.0.1/16"], "b": ["10.0.0.2/24", "172.17.0.1/16"]})
        ('10.0.0.0/24',)
    """
    where: dict[str, list[str]] = {}
    for own in addresses.values():
        for address in own:
            if "." in address:  # Open MPI's list of networks takes IPv4 only
                where.setdefault(str(ipaddress.ip_interface(address).network), []).append(address)
    good = {
        network for network, found in where.items() if len(found) >= len(addresses) and len(set(found)) == len(found)
    }
    return tuple(sorted(good)) if good and good != set(where) else ()


def main(folder: str, *files: str) -> None:
    """Print what a job needs to know of this host."""
    lacking = [path for path in files if not os.access(os.path.join(folder, path), os.R_OK)]
    told = {
        "folder": os.path.isdir(folder),
        "lacking": lacking,
        "cores": len(os.sched_getaffinity(0)),
        "addresses": list(interfaces()),
        "interfaces": names(),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
