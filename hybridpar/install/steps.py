"""The order of things: look, take what works, else take it from the cache, else build; and try it each time."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hybridpar.install import cache, flags, mpi, probe, smoke
from hybridpar.install.build import RUN_TIME, Plan, add, build
from hybridpar.install.probe import Missing

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What the user asked for: build anew even if all is well, which MPI, how many compilers (None: as many as fit)."""

    force: bool = False
    mpi: str = "auto"
    jobs: int | None = None


def check(wishes: Wishes, environment: Mapping[str, str], say: Say) -> bool:
    """Say whether Horovod is installed and works for this torch; change nothing.

    Raises Missing where it is not, with what to do.
    """
    probe.check_python()
    torch = probe.find_torch()
    inside, machine = mpi.find(environment, probe.scripts(), probe.prefix())
    choice = mpi.choose(inside, machine, wishes.mpi)
    reason = "no MPI is installed" if choice.mpi is None else _unfit(torch, environment, nccl=False)
    if reason:
        raise Missing(f"Horovod is not ready: {reason}; run `{Path(sys.executable).name} -m hybridpar.install`")
    say(f"Horovod {cache.HOROVOD} is installed and works with torch {torch.version}; {choice.note}")
    return True


def install(wishes: Wishes, environment: Mapping[str, str], say: Say, out: TextIO) -> None:
    """Install a Horovod that works with this environment's torch. Raises Missing with what stands in the way."""
    probe.check_python()
    torch = probe.find_torch()
    inside, machine = mpi.find(environment, probe.scripts(), probe.prefix())
    choice = mpi.choose(inside, machine, wishes.mpi)
    say(choice.note)
    if choice.mpi is None:
        say(f"Installing {mpi.FROM_PYPI}")
        add([mpi.FROM_PYPI], environment)
    ready = mpi.settings(environment, probe.scripts(), probe.prefix())
    wants_nccl = environment.get("HOROVOD_GPU_OPERATIONS") == "NCCL"
    if not wishes.force and smoke.built_for() and _unfit(torch, environment, wants_nccl) is None:
        say(f"Horovod {cache.HOROVOD} is installed already and works with torch {torch.version}")
        return
    facts = probe.gather(ready)
    settings, wrapper = flags.build_settings(facts, environment), flags.wrapper(facts.compiler, facts.torch)
    note = flags.gpu_note(facts, settings)
    if note:
        say(note)
    folder, key = cache.home(environment), cache.key(facts, choice.mpi, settings, wrapper)
    cached = None if wishes.force else cache.find(folder, key)
    if cached is not None:
        say(f"Taking the wheel that was built before: {cached}")
        reason = _take(cached, ready)
        if reason is None:
            say(f"Horovod {cache.HOROVOD} works with torch {torch.version}")
            return
        say(f"It does not work any more, so it is built anew: {reason}")
        cache.drop(folder, key)
    mpi_inside = choice.mpi is None or choice.mpi.inside
    plan = Plan(wrapper, settings, wishes.jobs or flags.jobs(facts), mpi_inside, probe.prefix())
    log = cache.log(folder, key)
    say(f"Log of the build, which takes 2 to 10 minutes: {log}")
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
        wheel = cache.store(folder, key, build(plan, ready, Path(work), log, out))
    reason = _take(wheel, ready)
    if reason:
        cache.drop(folder, key)
        raise Missing(f"Horovod {cache.HOROVOD} was built but does not work: {reason}\n  the build's output: {log}")
    say(f"Horovod {cache.HOROVOD} works with torch {torch.version}; the wheel is kept as {wheel}")


def _unfit(torch: probe.Torch, environment: Mapping[str, str], nccl: bool) -> str | None:
    """Why the installed Horovod is not the one that is needed; None if it is."""
    found = smoke.built_for()
    if found is None:
        return "Horovod is not installed"
    if found != (cache.HOROVOD, torch.version):
        return f"Horovod {found[0]} is built for torch {found[1]}, and torch {torch.version} is installed"
    outcome = smoke.run(mpi.settings(environment, probe.scripts(), probe.prefix()))
    if not outcome.works:
        return outcome.reason
    return "Horovod is built without NCCL" if nccl and not outcome.nccl else None


def _take(wheel: Path, environment: Mapping[str, str]) -> str | None:
    """Install `wheel` and try it; why it does not work, or None."""
    add(RUN_TIME, environment)
    add([str(wheel)], environment, "--no-deps", "--force-reinstall", "--no-index")
    importlib.invalidate_caches()
    outcome = smoke.run(environment)
    return None if outcome.works else outcome.reason
