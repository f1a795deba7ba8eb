"""Where checkpoints lie: their names in a run's folder, the newest complete one, what to remove.

    run/step-00000300/            complete: it has a manifest
    run/.tmp-step-00000400-x/     being written, or what a run that was killed has left
    run/.old-step-00000300-x/     one that is being replaced by another of the same name
    run/.gone-step-00000100-x/    one that is being removed
    run/aside-step-00000500/      one that the run went back behind, or that is damaged: only its name finds it

A folder is renamed into place when all of it is on the disk, and out of its place before anything of it is removed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from hybridpar.checkpoint import manifest

_STRANGER_SECONDS = 3600.0  # what another host has not touched for so long is nobody's
_STEP = re.compile(r"step-(\d+)$")
_ASIDE = "aside-"


def step_folder(run: Path, step: int) -> Path:
    """Where `hp.Checkpoints` keeps the checkpoint of `step`.

    Example:
        >>> step_folder(Path("run"), 300).name
        'step-00000300'
    """
    return run / f"step-{step:08d}"


def new_token() -> str:
    """The end of the name of a folder that this process makes: its host, itself, and a number."""
    return f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"


def beside(path: Path, kind: str, token: str) -> Path:
    """The folder that takes the place of `path` for a while; `kind` is tmp, old or gone."""
    return path.parent / f".{kind}-{path.name}-{token}"


def is_complete(folder: Path) -> bool:
    """Whether `folder` was written to its end."""
    return (folder / manifest.NAME).is_file()


def is_taken(path: Path) -> bool:
    """Whether something is at `path` that a checkpoint must not replace."""
    return path.exists() and not is_complete(path) and not (path.is_dir() and not any(path.iterdir()))


def present(path: Path) -> Path | None:
    """The complete checkpoint that goes by `path`: itself, or the one that was being replaced when a run was killed."""
    if is_complete(path):
        return path
    replaced = [old for old in path.parent.glob(f".old-{path.name}-*") if is_complete(old)]
    return max(replaced, key=lambda old: old.stat().st_mtime) if replaced else None


def complete(run: Path) -> list[Path]:
    """The complete checkpoints in the folder `run`, the oldest step first."""
    # pathlib's "*" matches .tmp-... too, which may have its manifest already
    found = {path for path in run.glob("*") if not path.name.startswith((".", _ASIDE)) and is_complete(path)}
    for old in run.glob(".old-*"):
        name = old.name.removeprefix(".old-").rpartition("-")[0]
        if not is_complete(run / name):
            found |= {kept for kept in [present(run / name)] if kept is not None}
    return sorted(found, key=_age)


def all_placed(run: Path) -> list[Path]:
    """The complete checkpoints in `run` and the folders of a step that have lost their manifest, the oldest first.

    A manifest is written before the folder gets its name, so one without it is damaged.
    """
    several = complete(run)
    replaced = {plain_name(path) for path in several}
    lost = [path for path in run.glob("step-*") if _STEP.match(path.name) and path.name not in replaced]
    return sorted([*several, *(path for path in lost if is_taken(path))], key=_age)


def plain_name(path: Path) -> str:
    """What the checkpoint `path` is called when it is not being replaced.

    Example:
        >>> plain_name(Path("run/.old-step-00000300-x"))
        'step-00000300'
    """
    return re.sub(r"^\.old-(.*)-[^-]*$", r"\1", path.name)


def is_of_a_step(path: Path) -> bool:
    """Whether `path` has a name that `step_folder` gives."""
    return _STEP.match(plain_name(path)) is not None


def in_the_way(run: Path, step: int, ours: bool) -> list[Path]:
    """What the checkpoint of `step` cannot follow: later ones, and one of its name unless that is `ours` and whole."""
    goal = step_folder(run, step).name
    found = []
    for path in all_placed(run):
        same = plain_name(path) == goal
        if _age(path)[0] > step or (same and not (ours and is_complete(path))):
            found.append(path)
    return found


def aside(path: Path) -> Path:
    """The name under which `path` stays without being one of the run's checkpoints any more."""
    first = path.with_name(_ASIDE + plain_name(path))
    return next(name for name in chain([first], (Path(f"{first}-{n}") for n in count(2))) if not name.exists())


def newest(path: Path) -> Path:
    """The checkpoint `path`, or the newest one in the run's folder `path`.

    Raises ValueError where there is none, and where the newest has lost its manifest.
    """
    here = present(path)
    if here is not None:
        return here
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path} on this host")
    several = all_placed(path)
    if not several or not is_complete(several[-1]):
        manifest.read(several[-1] if several else path)  # says what is there instead
    return several[-1]


def surplus(
    steps: Mapping[Path, int], keep: int | None, scores: Mapping[Path, float], largest: bool = False
) -> list[Path]:
    """What to remove so that the `keep` newest are left, and the best of `scores`; all are kept where `keep` is None.

    Example:
        >>> steps = {Path("a"): 1, Path("b"): 2, Path("c"): 3}
        >>> surplus(steps, keep=1, scores={Path("a"): 0.5, Path("b"): 0.7})
        [PosixPath('b')]
    """
    if keep is None:
        return []
    in_order = sorted(steps, key=lambda path: steps[path])
    known = [path for path in in_order if path in scores and scores[path] == scores[path]]  # a NaN is never best
    choose = max if largest else min
    best = {choose(reversed(known), key=lambda path: scores[path])} if known else set()
    return [path for path in in_order[:-keep] if path not in best]


def remove(path: Path, token: str) -> None:
    """Remove a checkpoint, so that a part of it is never taken for the whole."""
    gone = beside(path, "gone", token)
    with suppress(FileNotFoundError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def place(written: Path, path: Path, token: str) -> None:
    """Put what was written in its place, by a rename; what was there before is removed after it."""
    old = beside(path, "old", token)
    replaced = is_complete(path)
    if replaced:
        path.rename(old)
    written.rename(path)
    manifest.sync_folder(path.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def leftovers(parent: Path) -> list[Path]:
    """What runs that were killed have left in `parent` and nobody needs."""
    found = [path for kind in ("tmp", "gone") for path in parent.glob(f".{kind}-*") if not _alive(path)]
    for old in parent.glob(".old-*"):
        if is_complete(parent / old.name.removeprefix(".old-").rpartition("-")[0]):
            found.append(old)
    return found


def _alive(folder: Path) -> bool:
    """Whether somebody may still be writing in `folder`: its name says which process of which host made it."""
    host, _, rest = folder.name.rpartition("-")[2].partition(".")
    process = rest.partition(".")[0]
    if host == _host() and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return _touched(folder, folder.iterdir() if folder.is_dir() else ()) > time.time() - _STRANGER_SECONDS


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _touched(folder: Path, inside: Iterable[Path]) -> float:
    latest = 0.0
    for path in (folder, *inside):
        with suppress(OSError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def _age(path: Path) -> tuple[int, float]:
    """By step, where the name tells it, else by what the manifest says."""
    told = _STEP.search(plain_name(path))
    if told:
        return int(told[1]), path.stat().st_mtime
    try:
        return manifest.read(path).step, path.stat().st_mtime
    except ValueError:
        return -1, path.stat().st_mtime
