"""The order that a user's own sampler gives: drawn anew for each epoch, the same on every rank, then cut for replicas.

    sampler         numbers of samples, of all replicas together: cut into batches of B
    batch_sampler   lists of such numbers, each a batch of all replicas together

An order is drawn with random numbers of its own (`chance`), from the seed and the epoch; a generator that the sampler
brings is seeded alike, and `set_epoch` is called where there is one. So a position can be resumed in another process;
a checksum of the order is saved with it and compared, for samplers whose order comes from elsewhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data.distributed import DistributedSampler

from hybridpar.batches import mixed
from hybridpar.chance import Chance
from hybridpar.shard import balanced
from hybridpar.wires.axis import Axis


class Sampled:
    """The batches of a `sampler`, cut into batches of `size`, or of a `batch_sampler`.

    Example:
        >>> order = Sampled([4, 2, 0, 1, 3], None, size=2, drop_last=False, seed=0)
        >>> order.batches(epoch=0)
        [[4, 2], [0, 1], [3]]
        >>> order.of(epoch=0, batch=1, replica=1, replicas=2)
        [1]
    """

    def __init__(
        self,
        sampler: Iterable[int] | None,
        batch_sampler: Iterable[Sequence[int]] | None,
        size: int | None,
        drop_last: bool,
        seed: int,
    ) -> None:
        self._given: Any = sampler if batch_sampler is None else batch_sampler
        self._whole, self.size, self.drop_last, self.seed = batch_sampler is not None, size, drop_last, seed
        self._drawn: tuple[int, list[list[int]]] | None = None
        if any(isinstance(part, DistributedSampler) for part in _parts(self._given)):
            raise ValueError(
                "a DistributedSampler gives each replica its own part, and hp.DataLoader cuts each batch for the "
                "replicas itself: leave it out, or give the sampler that one process would have"
            )

    def __len__(self) -> int:
        """How many batches an epoch has, as the sampler tells its length."""
        count = len(self._given)
        return count if self._whole else (count // self.size if self.drop_last else -(-count // self.size))

    def batches(self, epoch: int) -> list[list[int]]:
        """The samples of every batch of an epoch, over all replicas."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def of(self, epoch: int, batch: int, replica: int, replicas: int) -> list[int]:
        """The samples of `replica`'s part of a batch."""
        whole = self.batches(epoch)[batch]
        start, stop = balanced(len(whole), replicas)[replica]
        return whole[start:stop]

    def check(self, epoch: int, everyone: Axis, replicas: int) -> None:
        """Raise ValueError where ranks have drawn different orders, or some replica would get nothing of a batch."""
        if len(set(everyone.objects(self.checksum(epoch)))) > 1:
            raise ValueError(
                f"{type(self._given).__name__} gives the {everyone.size} ranks different orders in epoch {epoch}, and "
                "hp.DataLoader cuts one order for all: let it depend on neither the rank nor the time"
            )
        for number, batch in enumerate(self.batches(epoch)):
            if len(batch) < replicas:
                raise ValueError(
                    f"batch {number} of epoch {epoch} has {len(batch)} samples for {replicas} replicas, and some would "
                    "get none: set drop_last=True, or let the sampler give each batch as many samples as replicas"
                )

    def checksum(self, epoch: int) -> int:
        """A number that tells orders of an epoch apart."""
        crc = 0
        for batch in self.batches(epoch):
            crc = zlib.crc32(repr(batch).encode(), crc)
        return crc

    def reseed(self, seed: int) -> None:
        """Draw from another seed from now on."""
        self.seed, self._drawn = seed, None

    def facts(self) -> dict[str, Any]:
        """What a position in these batches is a position in."""
        return {"sampler": type(self._given).__name__, "batch_size": self.size, "drop_last": self.drop_last}

    def _draw(self, epoch: int) -> list[list[int]]:
        seed = mixed(self.seed ^ mixed(epoch)) >> 1
        for part in _parts(self._given):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(seed)
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
        with Chance(seed):
            if self._whole:
                return [[int(i) for i in batch] for batch in self._given]
            numbers = iter([int(i) for i in self._given])
        cut = list(iter(lambda: list(islice(numbers, self.size)), []))
        return cut[:-1] if cut and self.drop_last and len(cut[-1]) < self.size else cut


def _parts(sampler: Any) -> Iterator[Any]:
    """A sampler and the samplers within it."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)
