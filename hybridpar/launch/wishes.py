"""What the user asks of a launch, beyond the mesh and the script. Everything left out is found out or left to MPI."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

LAUNCHERS = ("auto", "mpirun", "srun", "horovodrun")
BINDINGS = ("none", "core", "socket", "numa")


@dataclass(frozen=True)
class Wishes:
    """The options of `hybridpar run`.

    `hosts` is as `-H` takes it. `threads` of each rank; None shares the cores out. `sets` are pairs of `--env`, whose
    value is None where the present one is meant. `mpi_args` go to mpirun as they are.
    """

    launcher: str = "auto"
    hosts: str | None = None
    hostfile: str | None = None
    ssh_port: int | None = None
    ssh_identity: str | None = None
    ssh_config: str | None = None
    network_interface: str | None = None
    bind_to: str = "none"
    threads: int | None = None
    sets: tuple[tuple[str, str | None], ...] = ()
    tag_output: bool = False
    output_dir: str | None = None
    mpi_args: str = ""

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"--launcher {self.launcher!r} is unknown: use {', '.join(LAUNCHERS)}")
        if self.bind_to not in BINDINGS:
            raise ValueError(f"--bind-to {self.bind_to!r} is unknown: use {', '.join(BINDINGS)}")
        if self.hosts is not None and self.hostfile is not None:
            raise ValueError(f"-H {self.hosts} and --hostfile {self.hostfile} both say where to run: give one")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: a rank has at least 1")
        if self.ssh_port is not None and not 0 < self.ssh_port < 65536:
            raise ValueError(f"--ssh-port {self.ssh_port} is no port: 1 to 65535")
        try:
            shlex.split(self.mpi_args)
        except ValueError as error:
            raise ValueError(
                f"--mpi-args {self.mpi_args!r} cannot be split into options ({str(error).lower()}): quote it as "
                "for a shell"
            ) from None


def setting(text: str) -> tuple[str, str | None]:
    """The pair that `--env` means.

    Example:
        >>> setting("A=b=c"), setting("A")
        (('A', 'b=c'), ('A', None))
    """
    name, equals, value = text.partition("=")
    if not name.isidentifier():
        raise ValueError(f"--env {text!r} has no name: write NAME or NAME=value")
    return name, value if equals else None
