"""`hp.Checkpoints`: the checkpoints of one run, of which the newest and the best are kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridpar.checkpoint import folders, manifest
from hybridpar.checkpoint.agreement import together
from hybridpar.checkpoint.load import Loaded, load_newest_whole
from hybridpar.checkpoint.parts import Parts
from hybridpar.checkpoint.save import save, settle
from hybridpar.checkpoint.saving import Saving


class Checkpoints:
    """The folder `run`, which holds a checkpoint for each step that was saved.

    `keep` is how many of the newest stay; all do if it is None. With `best`, the name of a metric, the one with the
    least of it (the most with `largest`) stays besides. `asynchronous` is as in `hp.save`.

    A run may go back: when a step is saved and the folder has later ones, or another training's of this step, these
    are set aside as aside-step-..., which is said. They take no part in `load`, `keep` and `best` any more, are never
    removed, and `hp.load` takes them by their name.

    Raises ValueError where `keep` is less than 1 and where `run` is a file.

    Example:
        >>> checkpoints = hp.Checkpoints("run", keep=3, best="loss")                    # doctest: +SKIP
        >>> checkpoints.load(model, optimizer, loader)      # None in the first run     # doctest: +SKIP
        >>> for batch in loader:                                                        # doctest: +SKIP
        ...     loss = model.train_step(batch)
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if model.steps % 100 == 0:
        ...         checkpoints.save(model, optimizer, loader, metrics={"loss": loss})
    """

    def __init__(
        self,
        run: str | Path,
        keep: int | None = None,
        best: str | None = None,
        largest: bool = False,
        asynchronous: bool = False,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint is kept; None keeps all")
        self.run = Path(run).absolute()
        if self.run.exists() and not self.run.is_dir():
            raise ValueError(f"{self.run} is a file: give the folder in which the checkpoints of this run shall be")
        self._ours: set[Path] = set()  # what this training has saved or loaded: it may be replaced
        self._damaged: set[Path] = set()
        self._keep, self._best, self._largest, self._asynchronous = keep, best, largest, asynchronous

    def save(
        self,
        *parts: Any,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Saving:
        """Write the checkpoint of `step` (the model's, unless given), then remove what is not to be kept.

        All ranks call it together. Raises what `hp.save` raises, and ValueError where the metric to choose by is
        missing.
        """
        if self._best is not None and self._best not in (metrics or {}):
            raise ValueError(f'the best is chosen by "{self._best}": give metrics={{"{self._best}": ...}}')
        given = Parts.of(parts)
        step = given.model.steps if step is None else step
        goal, world = folders.step_folder(self.run, step), given.model.world
        settle(given)
        ours = goal in self._ours

        def in_the_way() -> list[Path]:
            damaged = [path for path in sorted(self._damaged) if path.exists()]
            return list(dict.fromkeys([*folders.in_the_way(self.run, step, ours), *damaged]))

        def make_way() -> None:
            for path in in_the_way():
                path.rename(folders.aside(path))
            self._damaged.clear()  # their names may be those of whole ones from now on

        found = together(world.everyone, lambda: list(map(str, in_the_way())) if world.rank == 0 else [])[0]
        if found and world.rank == 0:
            _tell(
                f"{self.run} has {', '.join(map(folders.plain_name, map(Path, found)))}, which step {step} does not "
                "follow: set aside as aside-... when it is saved; they are kept, and hp.load takes them by that name"
            )
        return save(
            goal, *parts, step=step, metrics=metrics, extra=extra,
            asynchronous=self._asynchronous, before=make_way, after=lambda: self._placed(goal),
        )  # fmt: skip

    def load(self, *parts: Any, verify: bool = True) -> Loaded | None:
        """Load the newest whole checkpoint, as `hp.load` does; None, and nothing is changed, if there is none.

        All ranks call it together. Damaged ones that are newer are told, in one sentence each, and left as they are.
        Raises what `hp.load` raises, and ValueError where all are damaged.
        """
        given = Parts.of(parts)
        world = given.model.world
        settle(given)
        several = together(
            world.everyone, lambda: list(map(str, folders.all_placed(self.run))) if world.rank == 0 else []
        )[0]
        found, damaged = load_newest_whole([Path(path) for path in several], given, verify)
        if damaged and found is None:
            raise ValueError(
                f"no checkpoint in {self.run} is whole: {next(iter(damaged.values()))}; "
                "give another folder to start anew"
            )
        for path, wrong in damaged.items() if world.rank == 0 else ():
            _tell(f"{path.name} is passed over: {wrong}; loaded {found.path.name} instead")
        self._damaged |= set(damaged)
        if found is not None:
            self._ours = {self.run / folders.plain_name(found.path)}
        return found

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none."""
        several = self.all()
        return several[-1] if several else None

    def all(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        return folders.complete(self.run)

    def best(self) -> Path | None:
        """The one that is best by the metric, None if there is none."""
        scores = self._scores(self.all())
        choose = max if self._largest else min
        return choose(reversed(scores), key=lambda path: scores[path]) if scores else None

    def _scores(self, several: list[Path]) -> dict[Path, float]:
        told = {path: _metrics(path).get(self._best) for path in several} if self._best is not None else {}
        return {path: score for path, score in told.items() if score is not None and score == score}

    def _placed(self, written: Path) -> None:
        """On the first rank, when `written` is in its place. What is damaged is neither counted nor removed."""
        self._ours.add(written)
        if self._keep is None:
            return
        several = [path for path in self.all() if folders.is_of_a_step(path) and (path == written or _sound(path))]
        order = {path: place for place, path in enumerate(several)}
        for path in folders.surplus(order, self._keep, self._scores(several), self._largest):
            folders.remove(path, folders.new_token())


def _sound(path: Path) -> bool:
    """Whether all files have their sizes, without reading them."""
    try:
        told = manifest.read(path)
    except ValueError:
        return False
    return not any(manifest.flaw(path, name, file, deep=False) for name, file in told.files.items())


def _tell(sentence: str) -> None:
    print(f"hybridpar: {sentence}", file=sys.stderr, flush=True)


def _metrics(path: Path) -> Mapping[str, float]:
    try:
        return manifest.read(path).metrics
    except ValueError:
        return {}  # damaged: it is no candidate for the best
