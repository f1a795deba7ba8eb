"""Iterable data sets: every replica reads the whole stream and keeps its part of each batch.

    stream      s0 s1 s2 s3 | s4 s5 s6 s7 | s8        B = 4
    replica 0   s0 s1       | s4 s5       |           a last batch that has not a sample for each replica is left out
    replica 1         s2 s3 |       s6 s7 |
    to resume   the stream is begun anew, and what has been used is read and passed over

With `own` a replica's stream has its own samples, a share of each batch, and nothing of it is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from hybridpar.batches import mixed
from hybridpar.chance import Chance
from hybridpar.microbatch import fingerprint
from hybridpar.shard import balanced
from hybridpar.skeleton.freight import pack
from hybridpar.wires.axis import Axis


class Stream(IterableDataset[list[Any]]):
    """The parts of `replica` of the batches of `dataset`, each a list of samples, from batch `start` of `epoch`.

    The stream draws random numbers from a sequence that depends on `seed` and the epoch alone; its `set_epoch` is
    called where there is one.

    Example:
        >>> stream = Stream(iter_of_numbers, size=4, drop_last=False, seed=0)           # doctest: +SKIP
        >>> stream.place(replica=1, replicas=2, epoch=0, start=0); next(iter(stream))   # doctest: +SKIP
        [2, 3]
    """

    def __init__(self, dataset: IterableDataset[Any], size: int, drop_last: bool, seed: int, own: bool = False) -> None:
        self.dataset, self.size, self.drop_last, self.seed, self.own = dataset, size, drop_last, seed, own
        self.place(0, 1, 0, 0)

    def place(self, replica: int, replicas: int, epoch: int, start: int) -> None:
        """Where the next iteration begins, and for whom."""
        self._replica, self._replicas, self._epoch, self._start = replica, replicas, epoch, start

    def reseed(self, seed: int) -> None:
        """Draw from another seed in the next iteration."""
        self.seed = seed

    def facts(self, replicas: int) -> dict[str, Any]:
        """What a position in this stream is a position in."""
        shared = {"stream": type(self.dataset).__name__, "batch_size": self.size, "drop_last": self.drop_last}
        return shared | {"own_streams": replicas if self.own else 0}

    def __iter__(self) -> Iterator[list[Any]]:
        chance = Chance(mixed(self.seed ^ mixed(self._epoch)) >> 1)
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(self._epoch)
        wanted = self.size
        if self.own:
            start, stop = balanced(self.size, self._replicas)[self._replica]
            wanted = stop - start
        with chance:
            samples = iter(self.dataset)
            for _ in islice(samples, self._start * wanted):
                pass
        while True:
            with chance:
                batch = list(islice(samples, wanted))
            if not self.own:
                if len(batch) < (wanted if self.drop_last else self._replicas):
                    return
                start, stop = balanced(len(batch), self._replicas)[self._replica]
                batch = batch[start:stop]
            elif len(batch) < (wanted if self.drop_last else 1):
                return
            yield batch


def agree(stream: Stream, everyone: Axis) -> None:
    """Raise ValueError, on all ranks, where the stream does not begin with the same sample on each of them.

    A stream that gives each replica its own part would lose most of it when its batches are cut once more.
    """
    with Chance(mixed(stream.seed) >> 1):
        first = next(iter(stream.dataset), None)
    structure, tensors = pack(first)
    if len(set(everyone.objects((structure, fingerprint(tensors))))) > 1:
        raise ValueError(
            f"{type(stream.dataset).__name__} does not begin with the same sample on all {everyone.size} ranks: let it "
            "give all samples everywhere, in the same order, or, if it gives each replica its own, set own_stream=True"
        )


def check_stream(dataset: IterableDataset[Any], workers: int, size: int, replicas: int) -> None:
    """Raise ValueError for what cannot be done with an iterable data set."""
    name = type(dataset).__name__
    if workers > 1:
        raise ValueError(
            f"num_workers={workers}: {name} is a stream, which has one order, and each of several workers would read "
            "all of it: use 0 or 1"
        )
    if size < 1:
        raise ValueError(f"batch_size={size}: a batch has at least 1 sample")
    if size < replicas:
        raise ValueError(
            f"batch_size={size} is shared by {replicas} replicas, and some would get no sample; make it at least "
            f"{replicas} (batch_size counts the samples of all replicas together)"
        )
    with Chance(0):  # some draw as soon as they are asked
        once = iter(dataset) is iter(dataset)
    if once:
        raise ValueError(
            f"{name} can be read once only (its __iter__ gives the same iterator again), so nothing can be resumed: "
            "let __iter__ begin anew each time"
        )
