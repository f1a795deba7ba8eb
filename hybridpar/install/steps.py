"""The order of things: look, take what works, else take it from the cache, else build; and try it each time."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hybridpar.install import cache, cuda, debian, flags, mpi, probe, smoke
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
    launcher = smoke.launcher(ready)
    if not launcher.works:
        raise Missing(f"MPI does not start processes here: {launcher.reason}")
    recipe = _recipe(wishes, torch, choice, ready, environment, say)
    reason = None if wishes.force else _from_cache(recipe, ready, say)
    if reason is None and not wishes.force:
        say(f"Horovod {cache.HOROVOD} works with torch {torch.version}")
        return
    wheel = _from_source(recipe, ready, say, out)
    say(f"Horovod {cache.HOROVOD} works with torch {torch.version}; the wheel is kept as {wheel}")


@dataclass(frozen=True)
class _Recipe:
    """How to build, and where and under which key the wheel is kept."""

    plan: Plan
    folder: Path
    key: str


def _recipe(
    wishes: Wishes,
    torch: probe.Torch,
    choice: mpi.Choice,
    ready: dict[str, str],
    environment: Mapping[str, str],
    say: Say,
) -> _Recipe:
    """Look at the machine; adds to `ready` where the headers are, if they had to be fetched."""
    folder = cache.home(environment)
    headers = None if probe.has_headers() else debian.headers(folder / f"python3.{sys.version_info[1]}")
    if headers:
        ready["CPATH"] = ":".join(p for p in (headers, environment.get("CPATH")) if p)
    compiler = probe.find_tools(ready, probe.has_headers() or headers is not None)
    facts = probe.gather(ready, torch, compiler)
    settings, wrapper = flags.build_settings(facts, environment), flags.wrapper(compiler, torch)
    note = flags.gpu_note(facts, settings)
    if note:
        say(note)
    inside = choice.mpi is None or choice.mpi.inside
    jobs = wishes.jobs or flags.jobs(facts)
    nccl = cuda.pypi_nccl() if facts.nccl == str(cuda.pypi_nccl()) else None
    nvcc = flags.nvcc_wrapper(facts.cuda_home, compiler, torch) if facts.cuda_home else ""
    plan = Plan(wrapper, settings, jobs, inside, probe.prefix(), facts.cuda_home, nvcc, nccl)
    return _Recipe(plan, folder, cache.key(facts, choice.mpi, settings, wrapper))


def _from_cache(recipe: _Recipe, environment: Mapping[str, str], say: Say) -> str | None:
    """Install what was built before and try it; why that is not possible, or None."""
    wheel = cache.find(recipe.folder, recipe.key)
    if wheel is None:
        return "nothing was built before"
    say(f"Taking the wheel that was built before: {wheel}")
    reason = _take(wheel, environment)
    if reason:
        say(f"It does not work any more, so it is built anew: {reason}")
        cache.drop(recipe.folder, recipe.key)
    return reason


def _from_source(recipe: _Recipe, environment: Mapping[str, str], say: Say, out: TextIO) -> Path:
    """Build, keep the wheel, install it and try it. Raises Missing with what went wrong."""
    log = cache.log(recipe.folder, recipe.key)
    say(f"Log of the build, which takes 2 to 10 minutes: {log}")
    with tempfile.TemporaryDirectory(prefix="build-", dir=recipe.folder) as work:
        wheel = cache.store(recipe.folder, recipe.key, build(recipe.plan, environment, Path(work), log, out))
    reason = _take(wheel, environment)
    if reason:
        raise Missing(f"Horovod {cache.HOROVOD} was built but does not work: {reason}\n  the build's output: {log}")
    return wheel


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
    try:
        add([str(wheel)], environment, "--no-deps", "--force-reinstall", "--no-index")
    except Missing as error:
        return str(error)
    importlib.invalidate_caches()
    outcome = smoke.run(environment)
    return None if outcome.works else outcome.reason
