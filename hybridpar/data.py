"""Batches for replicas: each rank gets its replica's part of every batch, from any position, in any layout.

Which samples these are is `batches.py`; fetching, collating and worker processes are torch's own `DataLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, IterableDataset

from hybridpar.batches import Batches, mixed

if TYPE_CHECKING:
    from hybridpar.wires.world import World

_OURS = ("sampler", "batch_sampler", "shuffle", "generator")


class DataLoader:
    """Iterates over `dataset`, one epoch for each `for`, in batches of `batch_size` samples over all replicas.

    Ranks of one replica (tensor and pipeline peers) get the same samples. The order depends on `seed` (the world's
    unless given) and on the epoch, not on the layout. `options` go to `torch.utils.data.DataLoader`: num_workers,
    collate_fn, pin_memory and so on.

    The position, `epoch` and `batch`, is that of the next batch to be handed out; batches that workers have prefetched
    do not count. A loop that is left early is taken up where it was left.

    Raises ValueError where some replica would get no sample of a batch, or the data set has no length.

    Example:
        >>> loader = hp.DataLoader(dataset, mesh, batch_size=64, num_workers=2)     # doctest: +SKIP
        >>> while loader.epoch < 3:                                                 # doctest: +SKIP
        ...     for batch in loader:
        ...         loss = model.train_step(batch, microbatches=8)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        mesh: World,
        batch_size: int,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        taken = [name for name in _OURS if name in options]
        if taken:
            raise ValueError(f"{', '.join(taken)}: hp.DataLoader chooses the samples itself; leave it out")
        self._batches = Batches(_length(dataset), batch_size, shuffle, mesh.seed if seed is None else seed, drop_last)
        self._batches.check(mesh.data.size)
        self._replica, self._replicas = mesh.data.index, mesh.data.size
        self.epoch = self.batch = 0
        self._generator = torch.Generator()  # torch draws the seeds of workers from it
        self._loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=_Rest(self), generator=self._generator, **options
        )

    def __iter__(self) -> Iterator[Any]:
        self._generator.manual_seed(mixed(self._batches.seed ^ mixed(self.epoch)) >> 1)
        for batch in self._loader:
            self.batch += 1  # before it is used: a position saved in the loop is that of the next batch
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return self._batches.count

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; the same on every rank, and for any layout."""
        which = self._batches
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": which.seed,
            "samples": which.samples,
            "batch_size": which.size,
            "shuffle": which.shuffle,
            "drop_last": which.drop_last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, with its seed.

        Raises ValueError if the data set or the batches are not those of the position.
        """
        self.check_state(state)
        which = self._batches
        self._batches = Batches(which.samples, which.size, which.shuffle, state["seed"], which.drop_last)
        self.epoch, self.batch = state["epoch"], state["batch"]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the data set or the batches are not those of the saved position `state`."""
        here = self.state_dict()
        for name in ("samples", "batch_size", "shuffle", "drop_last"):
            if state[name] != here[name]:
                raise ValueError(
                    f"the saved position is one in {_words(state)} and this loader has {_words(here)}: "
                    f"{name} must be the same to continue; start a new loader to begin anew"
                )

    def indices(self) -> Iterator[list[int]]:
        """The samples of this replica's part of each batch from the position to the end of the epoch."""
        which, epoch = self._batches, self.epoch
        for batch in range(self.batch, which.count):
            yield which.of(epoch, batch, self._replica, self._replicas)


class _Rest:
    """What torch's loader takes its samples from: the rest of the epoch."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader.indices()

    def __len__(self) -> int:
        return len(self._loader)


def _length(dataset: Dataset[Any]) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{type(dataset).__name__} has no samples by number: which replica gets which one, and where to resume, "
            "needs a map-style data set with __len__ and __getitem__"
        )
    return len(dataset)


def _words(state: dict[str, Any]) -> str:
    return (
        f"{state['samples']} samples in batches of {state['batch_size']} "
        f"(shuffle={state['shuffle']}, drop_last={state['drop_last']})"
    )
