"""Hosts made of namespaces: each with its name, address, processes, /tmp and ssh daemon, on one machine.

                         switch (a network namespace: a bridge, or switch.py where frames are held back)
         10.77.0.11  eth0 |         | eth0  10.77.0.12
                     host a         host b        (network, name, mount and process namespaces; host.py is process 1)

What root sees of the machine's own network is not touched. Nothing is left behind: every namespace lives as long as its
first process, and that as long as a pipe which only we hold, so they end with us even if we are killed. (Sessions are
scheduled as one group meanwhile, which a kill would leave so.)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.hosts.settings import write_settings
from tests.ranks.launch import CHECKOUT

_HERE = Path(__file__).parent
_NEEDED = ("unshare", "nsenter", "ip", "tc", "mount", "ssh", "ssh-keygen", "sshd")
_START_SECONDS = 30.0
_VANISH_SECONDS = 15.0
_NAMESPACES = ("net", "uts", "mnt", "pid")
_DAEMONS = "sshd: "  # how they call themselves
_AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


@dataclass(frozen=True)
class Seen:
    """What was seen of a command: exit code (128 + n after signal n), both outputs, how long it took."""

    code: int
    out: str
    said: str
    seconds: float

    def lines(self, text: str) -> list[str]:
        """The lines of stderr that hold `text`."""
        return [line for line in self.said.splitlines() if text in line]


class Running:
    """A command on a host, that has been started."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self._folder, self._began = process, folder, time.monotonic()

    def end(self, seconds: float) -> Seen:
        """What was seen of it once it has ended; a command that has not after `seconds` fails the test."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {seconds:.0f} s\n{self.out}{self.said}") from None
        took = time.monotonic() - self._began
        return Seen(code if code >= 0 else 128 - code, self.out, self.said, took)

    def await_line(self, text: str, times: int = 1, seconds: float = 60.0) -> None:
        """Returns when it has printed `text` so many times."""
        limit = time.monotonic() + seconds
        while self.out.count(text) < times:
            assert self.process.poll() is None, f"it ended\n{self.out}{self.said}"
            assert time.monotonic() < limit, f"no {text!r} in {seconds:.0f} s\n{self.out}{self.said}"
            time.sleep(0.05)

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text(errors="replace")

    @property
    def said(self) -> str:
        return (self._folder / "err").read_text(errors="replace")


class Cluster:
    """Hosts that are up."""

    def __init__(self, folder: Path, hosts: Mapping[str, int], switch: int, held_back: bool) -> None:
        self.folder, self.hosts = folder, tuple(hosts)
        self._first, self._switch, self._held_back = dict(hosts), switch, held_back
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, host: str, command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Running:
        """`command` on `host`, in the shell of somebody who has activated our environment there and done no more."""
        folder = self.folder / f"command-{len(self._started)}"
        folder.mkdir()
        chdir = ["env", f"--chdir={cwd or self.folder}"]
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            process = subprocess.Popen(
                [*self._inside(self._first[host]), *chdir, *command],
                env={**plain_environment(), **(env or {})},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return Running(process, folder)

    def run(
        self, host: str, command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None,
        seconds: float = 180.0,
    ) -> Seen:  # fmt: skip
        """The same, seen to its end."""
        return self.start(host, command, cwd, env).end(seconds)

    def cut(self, host: str) -> None:
        """Take the plug out of the host's end of its link: what is sent over it is lost, and nobody is told."""
        self._on_switch("ip", "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Put it in again."""
        self._on_switch("ip", "link", "set", f"to-{host}", "up")

    def switch_off(self, host: str) -> None:
        """End the host as a power cut does, for good: all that runs there is gone at once, and nobody is told."""
        self.cut(host)
        os.kill(self._first.pop(host), signal.SIGKILL)
        self.hosts = tuple(self._first)

    def limit(self, rate: str | None) -> None:
        """Let every host send at most so much, as `tc` writes it ("200mbit"); None takes the limit away."""
        for first in self._first.values():
            # A big burst, since a small one gives much less than the rate on a busy machine. What waits longer than a
            # real link's buffers hold is dropped, or big messages would delay all others by seconds.
            shape = ["replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "512kb", "latency", "200ms"]
            words = shape if rate else ["del", "dev", "eth0", "root"]
            _called([*_entered(first, "net"), "tc", "qdisc", *words])

    def processes(self, host: str) -> list[psutil.Process]:
        """Those that live on `host`, but for its first one and its ssh daemon's."""
        space = os.readlink(f"/proc/{self._first[host]}/ns/pid")
        found = []
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):
                one = psutil.Process(pid)
                told = " ".join(one.cmdline())
                if os.readlink(f"/proc/{pid}/ns/pid") == space and told and one.status() != psutil.STATUS_ZOMBIE:
                    found += [one] if pid != self._first[host] and not told.startswith(_DAEMONS) else []
        return found

    def find(self, host: str, *words: str) -> list[psutil.Process]:
        """The processes of `host` that have all `words` in their command line."""
        return [one for one in self.processes(host) if all(word in " ".join(_line(one)) for word in words)]

    def left(self, seconds: float = _VANISH_SECONDS) -> list[str]:
        """What still runs on any host after so many seconds, if anything does."""
        limit = time.monotonic() + seconds
        while True:
            found = [f"{host}: {' '.join(_line(one))[:200]}" for host in self.hosts for one in self.processes(host)]
            if not found or time.monotonic() > limit:
                return found
            time.sleep(0.1)

    def clear(self) -> None:
        """Links mended, limits taken away, and whatever still runs killed: ready for the next test."""
        if not self._held_back:
            for host in self.hosts:
                self.mend(host)
                with suppress(subprocess.CalledProcessError):
                    _called([*_entered(self._first[host], "net"), "tc", "qdisc", "del", "dev", "eth0", "root"])
        for host in self.hosts:
            for one in self.processes(host):
                with suppress(psutil.Error):
                    one.kill()
        for process in self._started:
            process.wait()

    def _inside(self, first: int) -> list[str]:
        return _entered(first, *_NAMESPACES)

    def _on_switch(self, *command: str) -> None:
        if self._held_back:
            raise AssertionError("a link with a delay cannot be cut")
        _called([*_entered(self._switch, "net"), *command])


def missing() -> str:
    """What this machine lacks for hosts made of namespaces, as a sentence; "" if nothing."""
    if os.geteuid() != 0:
        return "only root can make hosts of namespaces"
    lacking = [name for name in _NEEDED if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"{', '.join(lacking)} not found (on Debian: apt-get install iproute2 openssh-server)"
    try:
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork"]
        _called(["unshare", *spaces, "ip", "link", "add", "tried", "type", "bridge"])
    except subprocess.CalledProcessError as error:
        return f"the kernel gives no namespaces or no bridge: {error.stderr.strip()}"
    return ""


@contextmanager
def cluster(
    folder: Path, names: Sequence[str], shared: Sequence[Path] = (), delay_seconds: float = 0.0
) -> Iterator[Cluster]:
    """Hosts of these names, that can reach each other over ssh as root, with `folder` and `shared` on all of them."""
    addresses = {name: f"10.77.0.{11 + i}" for i, name in enumerate(names)}
    write_settings(folder, addresses)
    kept = {str(Path(path).absolute()) for path in (folder, *shared, CHECKOUT, sys.prefix, sys.base_prefix)}
    with ExitStack() as stack:
        stack.enter_context(_one_group())
        first: dict[str, int] = {}
        for name in names:
            spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
            line = ["unshare", *spaces, sys.executable, str(_HERE / "host.py"), name, str(folder), *sorted(kept)]
            outer = stack.enter_context(_living(line))
            first[name] = psutil.Process(outer).children()[0].pid
        if delay_seconds:
            pids = [str(pid) for pid in first.values()]
            line = ["unshare", "--net", sys.executable, str(_HERE / "switch.py"), str(delay_seconds), *pids]
            switch = stack.enter_context(_living(line))
        else:
            switch = stack.enter_context(_living(["unshare", "--net", "sh", "-c", "echo ready; read -r _"]))
            _bridge(switch, first)
        for name, pid in first.items():
            _called([*_entered(pid, "net"), "ip", "address", "add", f"{addresses[name]}/24", "dev", "eth0"])
            _called([*_entered(pid, "net"), "ip", "link", "set", "eth0", "up"])
        made = Cluster(folder, first, switch, bool(delay_seconds))
        _await_ssh(made)
        yield made


def plain_environment() -> dict[str, str]:
    """That of a shell in which somebody has activated our environment; nothing is prepared for MPI."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TERM", "USER") if name in os.environ}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{_path()}", "PYTHONPATH": str(CHECKOUT)}


def _path() -> str:
    return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@contextmanager
def _one_group() -> Iterator[None]:
    """Let the kernel share out the cores among threads, not among sessions.

    Our hosts share cores, which real ones do not. Linux 6.18 lets ranks of one session that yield to each other keep
    those of another, another host's ranks among them, from the cores for as long as half a minute.
    """
    before = None
    with suppress(OSError):
        before = _AUTOGROUP.read_text()
        _AUTOGROUP.write_text("0")
    try:
        yield
    finally:
        with suppress(OSError):
            if before is not None:
                _AUTOGROUP.write_text(before)


@contextmanager
def _living(command: list[str]) -> Iterator[int]:
    """The pid of a process that says "ready" and then lives until we are done with it."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise AssertionError(f"{command} did not come up")
        yield process.pid
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def _bridge(switch: int, first: Mapping[str, int]) -> None:
    entered = _entered(switch, "net")
    _called([*entered, "ip", "link", "add", "switch", "type", "bridge"])
    _called([*entered, "ip", "link", "set", "switch", "up"])
    for name, pid in first.items():
        veth = ["type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        _called([*entered, "ip", "link", "add", f"to-{name}", *veth])
        _called([*entered, "ip", "link", "set", f"to-{name}", "master", "switch", "up"])


def _await_ssh(made: Cluster) -> None:
    limit = time.monotonic() + _START_SECONDS
    for host in made.hosts:
        while True:
            asked = made.run(made.hosts[0], ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, "hostname"])
            if asked.code == 0:
                assert asked.out.strip() == host, asked
                break
            if time.monotonic() > limit:
                log = (made.folder / f"sshd-{host}.said").read_text()
                raise AssertionError(f"no ssh to {host}: {asked.said}{log}")
            time.sleep(0.1)


def _entered(pid: int, *spaces: str) -> list[str]:
    names = {"mnt": "mount"}
    return ["nsenter", f"--target={pid}", *(f"--{names.get(space, space)}" for space in spaces)]


def _called(command: list[str]) -> None:
    path = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{_path()}"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=path)


def _line(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []
