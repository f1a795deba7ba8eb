"""`hp.save`: a checkpoint that any mesh can load, complete or not there at all.

    all     what is there is told: names, shapes, plain values         -> every rank knows who writes what
    first   makes .tmp-NAME-TOKEN beside the goal                      -> all see that it is one folder for all hosts
    each    gathers its tensors one by one, writes, checksums, syncs   -> a receipt
    first   with all receipts: index, manifest, sync, rename           -> NAME
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hybridpar.checkpoint import commit, folders, writing
from hybridpar.checkpoint.agreement import together
from hybridpar.checkpoint.gathering import wholes
from hybridpar.checkpoint.inventory import Inventory, inventory
from hybridpar.checkpoint.manifest import File
from hybridpar.checkpoint.parts import Parts
from hybridpar.checkpoint.plain import to_plain
from hybridpar.checkpoint.saving import Saving
from hybridpar.checkpoint.writers import Item, files


def save(
    path: str | Path,
    *parts: Any,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Saving:
    """Write a checkpoint of `parts`, in any order, to the folder `path`; all ranks call it together.

    `parts` are the model that hp.parallelize returned and, as far as they are there, optimizers, learning rate
    schedulers, a GradScaler, an hp.EMA and an hp.DataLoader. The random generators go with them. `step` is the number
    of training steps unless given; `metrics` are numbers to choose the best by; `extra` is kept for you (numbers,
    strings, lists, tuples, dicts, tensors). An earlier checkpoint at `path` is replaced when the new one is complete.

    With `asynchronous` the call returns when what is to be written is copied; a thread writes it. One such save is
    under way at a time: the next one waits for it. On the first rank `before` is called when all is written, to make
    way for it at `path`, and `after` when the checkpoint is in place.

    Raises ValueError for what cannot be kept and for a folder that the hosts do not share, RuntimeError where the disk
    does not take it; nothing that was there before is touched then.

    Example:
        >>> hp.save("run/last", model, optimizer, loader, schedule)     # doctest: +SKIP
    """
    given = Parts.of(parts)
    goal = Path(path).absolute()
    settle(given)
    rest = {"extra": to_plain(dict(extra or {}), "extra"), "metrics": dict(metrics or {})}
    listed = inventory(given, rest, step, str(goal))
    job = _Job(goal, given, listed, files(listed.items, listed.writers), before, after)
    try:
        job.open()
        if asynchronous:
            return job.behind()
        job.at_once()
    except BaseException:
        job.forget()
        raise
    return Saving(goal)


def settle(given: Parts) -> None:
    """Wait for an earlier asynchronous save, on all ranks. Raises RuntimeError, on all of them, where it failed."""
    before, given.model._unsplit.saving = given.model._unsplit.saving, None
    together(given.model.world.everyone, lambda: None if before is None else before.wait())


@dataclass
class _Job:
    goal: Path
    given: Parts
    listed: Inventory
    names: Mapping[tuple[str, int], str]
    before: Callable[[], None] | None
    after: Callable[[], None] | None
    token: str = ""

    @property
    def folder(self) -> Path:
        """What is being written."""
        return folders.beside(self.goal, "tmp", self.token)

    def open(self) -> None:
        """Make the folder, and see that all ranks see it."""
        world = self.given.model.world
        self.token = together(world.everyone, self._made if world.rank == 0 else str)[0]
        together(world.everyone, self._seen)

    def at_once(self) -> None:
        """Gather and write at the same time; return when the checkpoint is in its place."""
        world = self.given.model.world
        pipe = writing.Pipe(self.folder, self._mine(), self.goal)
        for x in wholes(self.listed.items, self.listed.writers, self.listed.held, world, copied=False):
            pipe.put(x)
        told = together(world.everyone, pipe.finish)
        written = {name: file for one in told for name, file in one.items()}
        together(world.everyone, lambda: self._commit(written) if world.rank == 0 else None)

    def behind(self) -> Saving:
        """Gather, and write in a thread."""
        world, folder, mine = self.given.model.world, self.folder, self._mine()
        copies = list(wholes(self.listed.items, self.listed.writers, self.listed.held, world, copied=True))
        first = world.rank == 0

        def work() -> None:
            try:
                written = writing.write(folder, mine, writing.drained(copies), self.goal)
                writing.leave_receipt(folder, world.rank, written)
            except (RuntimeError, OSError) as error:
                sentence = str(error) if isinstance(error, RuntimeError) else writing.refusal(self.goal, error)
                writing.leave_failure(folder, world.rank, sentence)
                if not first:
                    raise RuntimeError(sentence) from error
            if first:
                try:
                    self._commit(writing.await_receipts(folder, range(world.mesh.size)))
                except BaseException:
                    self.forget()
                    raise

        self.given.model._unsplit.saving = saving = Saving(self.goal, work)
        return saving

    def forget(self) -> None:
        """Remove what was written so far."""
        if self.given.model.world.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _mine(self) -> dict[str, list[Item]]:
        """This rank's files with their tensors."""
        rank, found = self.given.model.world.rank, {}
        for item in self.listed.items:
            if self.listed.writers[item.key] == rank:
                found.setdefault(self.names[item.kind, rank], []).append(item)
        return found

    def _made(self) -> str:
        self.token = folders.new_token()
        if self.before is None and folders.is_taken(self.goal):
            raise ValueError(f"{self.goal} is there and is no checkpoint: save to a new folder, such as run/last")
        try:
            self.goal.parent.mkdir(parents=True, exist_ok=True)
            for path in folders.leftovers(self.goal.parent):
                shutil.rmtree(path, ignore_errors=True)
            self.folder.mkdir()
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RuntimeError(writing.refusal(self.goal, error)) from error
        return self.token

    def _seen(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.goal.parent} on this host (rank {self.given.model.world.rank}) is not the folder that rank 0 "
                "writes to: save to a folder that all hosts share"
            )
        try:
            writing.begin(self.folder, self.given.model.world.rank)
        except OSError as error:
            raise RuntimeError(writing.refusal(self.goal, error)) from error

    def _commit(self, written: Mapping[str, File]) -> None:
        told = self.listed.manifest(written, datetime.now(timezone.utc).isoformat(timespec="seconds"))
        try:
            commit.complete(self.folder, self.goal, self.token, told, self.listed.config, self.before)
        except OSError as error:
            raise RuntimeError(writing.refusal(self.goal, error)) from error
        if self.after is not None:
            self.after()
