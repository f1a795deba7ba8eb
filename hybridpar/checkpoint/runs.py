"""`hp.Checkpoints`: the checkpoints of one run, of which the newest and the best are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridpar.checkpoint import folders, manifest
from hybridpar.checkpoint.agreement import together
from hybridpar.checkpoint.load import Loaded, load
from hybridpar.checkpoint.parts import Parts
from hybridpar.checkpoint.save import save
from hybridpar.checkpoint.saving import Saving


class Checkpoints:
    """The folder `run`, which holds a checkpoint for each step that was saved.

    `keep` is how many of the newest stay; all do if it is None. With `best`, the name of a metric, the one with the
    least of it (the most with `largest`) stays besides. `asynchronous` is as in `hp.save`.

    Raises ValueError where `keep` is less than 1.

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
        step = Parts.of(parts).model.steps if step is None else step
        return save(
            folders.step_folder(self.run, step), *parts, step=step, metrics=metrics, extra=extra,
            asynchronous=self._asynchronous, after=self._tidy,
        )  # fmt: skip

    def load(self, *parts: Any, verify: bool = True) -> Loaded | None:
        """Load the newest complete checkpoint, as `hp.load` does; None, and nothing is changed, if there is none.

        All ranks call it together.
        """
        everyone = Parts.of(parts).model.world.everyone
        found = together(everyone, lambda: None if self.latest() is None else str(self.latest()))[0]
        return None if found is None else load(found, *parts, verify=verify)

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

    def _tidy(self) -> None:
        """On the first rank, when a checkpoint is in its place."""
        if self._keep is None:
            return
        several = self.all()
        order = {path: place for place, path in enumerate(several)}
        for path in folders.surplus(order, self._keep, self._scores(several), self._largest):
            folders.remove(path, folders.new_token())


def _metrics(path: Path) -> Mapping[str, float]:
    try:
        return manifest.read(path).metrics
    except ValueError:
        return {}  # damaged: it is no candidate for the best
