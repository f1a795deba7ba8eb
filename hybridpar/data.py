"""Batches for replicas: each rank gets its replica's part of every batch, from any position, in any layout.

    which samples    batches.py: drawn from a seed       orders.py: a sampler of the user's       streams.py: iterables
    how              fetching, collating and worker processes are torch's own `DataLoader`
    on which ranks   all, or with `shared` the first of each replica, which hands its batches on: handing.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from hybridpar.batches import Batches, mixed
from hybridpar.handing import handed
from hybridpar.microbatch import Elsewhere
from hybridpar.orders import Sampled
from hybridpar.streams import Stream, agree, check_stream

if TYPE_CHECKING:
    from hybridpar.engine import ParallelModel
    from hybridpar.wires.world import World


class DataLoader:
    """Iterates over `dataset`, one epoch for each `for`, in batches of `batch_size` samples over all replicas.

    Ranks of one replica (tensor and pipeline peers) get the same samples. The order depends on `seed` (the world's
    unless given) and on the epoch, not on the layout. `options` go to `torch.utils.data.DataLoader`: num_workers,
    collate_fn, pin_memory and so on.

    A `sampler` gives the order instead, or a `batch_sampler` the batches (then without `batch_size`), as for one
    process: of all replicas together. Of an iterable data set every replica reads all and keeps its part of each batch;
    with `own_stream` it gives each replica samples of its own, and all end together, when the first one does.
    With `shared` only the first rank of each replica loads, and hands its batches to the others. With `model`, for
    which the batches are, ranks whose stages use neither inputs nor targets load nothing and have no workers.

    The position, `epoch` and `batch`, is that of the next batch to be handed out; batches that workers have prefetched
    do not count. A loop that is left early is taken up where it was left.

    Raises ValueError where some replica would get no sample of a batch, and for what cannot be resumed.

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
        batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        *,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        own_stream: bool = False,
        shared: bool = False,
        model: ParallelModel | None = None,
        **options: Any,
    ) -> None:
        _check(dataset, batch_size, shuffle, drop_last, sampler, batch_sampler, own_stream, options)
        if model is not None and (shared or isinstance(dataset, IterableDataset)):
            raise ValueError("model= is for map-style data sets that each rank loads: leave it out, or shared=True")
        self._mesh, self._shared, self._model, self._agreed = mesh, shared, model, False
        self._replica, self._replicas = mesh.data.index, mesh.data.size
        self.epoch = self.batch = 0
        self._generator = torch.Generator()  # torch draws the seeds of workers from it
        seed, workers = mesh.seed if seed is None else seed, options.get("num_workers", 0)
        self._source: Batches | Sampled | Stream
        if isinstance(dataset, IterableDataset):
            check_stream(dataset, workers, batch_size, self._replicas)
            self._source = Stream(dataset, batch_size, drop_last, seed, own_stream)
            options = {"collate_fn": default_collate} | options
            self._samples, what = None, {"dataset": self._source, "batch_size": None}
        else:
            self._samples, what = _length(dataset), {"dataset": dataset, "batch_sampler": _Rest(self)}
            if sampler is None and batch_sampler is None:
                self._source = Batches(self._samples, batch_size, shuffle is not False, seed, drop_last)
                self._source.check(self._replicas)
            else:
                self._source = Sampled(sampler, batch_sampler, batch_size, drop_last, seed)
        self._loader = torch.utils.data.DataLoader(**what, generator=self._generator, **options)

    def __iter__(self) -> Iterator[Any]:
        source = self._source
        self._generator.manual_seed(mixed(source.seed ^ mixed(self.epoch)) >> 1)
        if isinstance(source, Sampled):
            source.check(self.epoch, self._mesh.everyone, self._replicas)
        if isinstance(source, Stream):
            if not (source.own or self._agreed) and self._replicas > 1:
                agree(source, self._mesh.everyone)
                self._agreed = True
            source.place(self._replica, self._replicas, self.epoch, self.batch)
        looks = self._model is None or self._model.reads_batches
        loads = looks and (not self._shared or self._mesh.replica.index == 0)
        batches = iter(self._loader) if loads else iter(())
        if not looks:
            batches = (Elsewhere() for _ in self.indices())
        if isinstance(source, Stream) and source.own and loads:
            batches = self._until_one_ends(batches)
        for batch in handed(batches, self._mesh.replica) if self._shared else batches:
            self.batch += 1  # before it is used: a position saved in the loop is that of the next batch
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def __len__(self) -> int:
        """How many batches an epoch has. Raises TypeError for a stream, which ends when it ends."""
        if isinstance(self._source, Stream):
            raise TypeError(f"{self._source.facts(1)['stream']} is a stream, and how many batches it has is not known")
        return self._source.count if isinstance(self._source, Batches) else len(self._source)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; the same on every rank, and for any layout."""
        here = {"epoch": self.epoch, "batch": self.batch, "seed": self._source.seed, **self._facts()}
        if isinstance(self._source, Sampled):
            here["order"] = self._source.checksum(self.epoch) if self.batch else None
        return here

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, with its seed.

        Raises ValueError if the data set or the batches are not those of the position.
        """
        self.check_state(state)
        self._source = _seeded(self._source, state["seed"])
        self.epoch, self.batch = state["epoch"], state["batch"]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the data set or the batches are not those of the saved position `state`."""
        for name, value in self._facts().items():
            if name not in state or state[name] != value:
                raise ValueError(
                    f"the saved position is one in {_words(state)} and this loader has {_words(self._facts())}: "
                    f"{name} must be the same to continue; start a new loader to begin anew"
                )
        if state.get("order") is None:
            return
        seed = self._source.seed
        drawn = _seeded(self._source, state["seed"]).checksum(state["epoch"])
        _seeded(self._source, seed)
        if drawn != state["order"]:
            raise ValueError(
                f"{state['sampler']} now gives another order in epoch {state['epoch']} than when the position was "
                "saved: let it depend on its generator, torch's random numbers or set_epoch(epoch) only"
            )

    def indices(self) -> Iterator[list[int]]:
        """The samples of this replica's part of each batch from the position to the end of the epoch.

        Raises ValueError for a stream, whose samples have no numbers.
        """
        which, epoch = self._source, self.epoch
        if isinstance(which, Stream):
            raise ValueError("the samples of a stream have no numbers: iterate over the loader itself")
        count = which.count if isinstance(which, Batches) else len(which.batches(epoch))
        for batch in range(self.batch, count):
            yield which.of(epoch, batch, self._replica, self._replicas)

    def _facts(self) -> dict[str, Any]:
        """What a position here is a position in."""
        which = self._source
        if isinstance(which, Batches):
            return {
                "samples": which.samples,
                "batch_size": which.size,
                "shuffle": which.shuffle,
                "drop_last": which.drop_last,
            }
        return which.facts(self._replicas) if isinstance(which, Stream) else {"samples": self._samples, **which.facts()}

    def _until_one_ends(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, as long as every replica has one more."""
        peers = self._mesh.peers  # between those of equal place in their replicas, each of which counts for itself
        nothing = object()
        while True:
            batch = next(batches, nothing)
            have = torch.tensor([batch is not nothing], dtype=torch.int64)
            if not peers.allreduce(have, "min").item():
                return
            yield batch


class _Rest:
    """What torch's loader takes its samples from: the rest of the epoch."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader.indices()

    def __len__(self) -> int:
        return len(self._loader)


def _seeded(source: Batches | Sampled | Stream, seed: int) -> Batches | Sampled | Stream:
    if isinstance(source, Batches):
        return replace(source, seed=seed)
    source.reseed(seed)
    return source


def _check(
    dataset: Dataset[Any],
    batch_size: int | None,
    shuffle: bool | None,
    drop_last: bool,
    sampler: Any,
    batch_sampler: Any,
    own_stream: bool,
    options: dict[str, Any],
) -> None:
    """Raise ValueError for what contradicts itself."""
    stream = isinstance(dataset, IterableDataset)
    if "generator" in options:
        raise ValueError("generator: hp.DataLoader chooses random numbers by seed and epoch; give seed= instead")
    if options.get("in_order") is False:
        raise ValueError("in_order=False: batches that overtake one another differ between ranks; leave it out")
    if (sampler is not None) + (batch_sampler is not None) + stream > 1:
        raise ValueError("a sampler, a batch_sampler and an iterable data set each give an order: choose one of them")
    if shuffle is not None and (stream or sampler is not None or batch_sampler is not None):
        raise ValueError(f"shuffle={shuffle}: the order is that of the stream or of the sampler; leave shuffle out")
    if batch_sampler is not None and (batch_size is not None or drop_last):
        raise ValueError("a batch_sampler makes the batches itself: leave out batch_size and drop_last")
    if batch_sampler is None and batch_size is None:
        raise ValueError("batch_size is missing: the number of samples in a batch of all replicas together")
    if sampler is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a batch has at least 1 sample")
    if own_stream and not stream:
        raise ValueError(f"own_stream is for iterable data sets, and {type(dataset).__name__} has samples by number")
    if stream and options.get("persistent_workers"):
        raise ValueError("persistent_workers would go on from where a stream once was: leave it out")


def _length(dataset: Dataset[Any]) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{type(dataset).__name__} has no samples by number: which replica gets which one, and where to resume, "
            "needs a map-style data set with __len__ and __getitem__, or a torch.utils.data.IterableDataset"
        )
    return len(dataset)


def _words(facts: dict[str, Any]) -> str:
    if "shuffle" not in facts:
        return ", ".join(f"{name}={value}" for name, value in facts.items() if name not in ("epoch", "batch", "seed"))
    return (
        f"{facts['samples']} samples in batches of {facts['batch_size']} "
        f"(shuffle={facts['shuffle']}, drop_last={facts['drop_last']})"
    )
