"""The first process of a host: gives it its name, its own files where hosts differ, and an ssh daemon; ends with it.

    python host.py NAME FOLDER KEPT...       started by `unshare` in namespaces of its own, as process 1 of them

It lives as long as its standard input is open. When process 1 of a namespace ends the kernel kills all others there, so
a host is gone when the test that holds the other end of that pipe is, however that ended.

What a host has of its own: /tmp, /dev/shm and /run (empty), /etc/hosts, /etc/ssh, /etc/shadow, no name server, and no
files of a user's shell. KEPT are folders that all hosts see, as on a shared file system, also where they lie in one of
the above.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

OWN_FOLDERS = ("/tmp", "/dev/shm", "/run")
SHELL_FILES = (".bashrc", ".profile", ".bash_profile")  # of a user: killed amid them, they may leave locks in the home
OWN_FILES = ("hosts", "shadow", "resolv.conf", "ssh")  # in /etc; FOLDER/etc-NAME or FOLDER/etc has them


def main(name: str, folder: str, *kept: str) -> None:
    """Never returns."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    socket.sethostname(name)
    _give_own_files(Path(folder, "etc-" + name), kept)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.mkdir("/run/sshd")
    with open(f"{folder}/sshd-{name}.said", "w") as log:
        subprocess.Popen(["/usr/sbin/sshd", "-D", "-e"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    print("ready", flush=True)
    while True:
        os.wait()  # orphans come to process 1; the daemon stays, so there is always somebody to wait for


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _give_own_files(etc: Path, kept: tuple[str, ...]) -> None:
    home = Path("~/.ssh").expanduser()
    inside = {path: os.open(path, os.O_PATH) for path in kept if path.startswith(OWN_FOLDERS)}
    for name in OWN_FILES:
        if Path("/etc", name).exists():
            _mount("--bind", str(etc / name), f"/etc/{name}")
    for path in (*OWN_FOLDERS, *([str(home)] if home.is_dir() else [])):  # a user's own keys and settings stay out
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", path)
    for name in SHELL_FILES:
        if (file := Path("~", name).expanduser()).is_file():
            _mount("--bind", "/dev/null", str(file))
    for path, number in inside.items():
        with suppress(FileExistsError):
            os.makedirs(path)
        _mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{number}", path)
        os.close(number)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
