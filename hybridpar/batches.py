"""Which samples are in which batch: pure arithmetic.

    epoch e      the order of all samples, drawn from (seed, e)       5 2 7 0 6 1 4 3
    batch k      B consecutive ones of it, the last may be shorter    5 2 7 0 | 6 1 4 3       B = 4
    replica d    its balanced piece of each batch, in order           5 2     | 6 1           d = 0 of 2

Nothing here depends on how many replicas there are but the last cut, so the batches of one process and of many are the
same, and a position (epoch, batch) means the same in every layout.

The order is a pseudorandom permutation that is computed at one place at a time: a Feistel network on pairs (left,
right) whose domain is barely larger than the data set, walking on from where it leaves the data set (Black and Rogaway
2002, "Ciphers with arbitrary finite domains"). So a thousand million samples need no list, and resuming no replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

from hybridpar.shard import balanced

_ROUNDS = 8
_WORD = 2**64 - 1


@dataclass(frozen=True)
class Batches:
    """The batches of one data set.

    `samples` in the data set, `size` of a batch over all replicas, `drop_last` leaves a shorter last batch out.

    Example:
        >>> batches = Batches(samples=7, size=4, shuffle=False, seed=0)
        >>> batches.count, batches.of(epoch=0, batch=1, replica=0, replicas=2)
        (2, [4, 5])
    """

    samples: int
    size: int
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False

    @property
    def count(self) -> int:
        """How many batches an epoch has."""
        whole, rest = divmod(self.samples, self.size)
        return whole + (rest > 0 and not self.drop_last)

    def check(self, replicas: int) -> None:
        """Raise ValueError unless every replica gets a sample of every batch."""
        if self.size < 1 or self.samples < 1:
            raise ValueError(f"a data set of {self.samples} samples in batches of {self.size}: both must be at least 1")
        if self.size < replicas:
            raise ValueError(
                f"batch_size={self.size} is shared by {replicas} replicas, and some would get no sample; "
                f"make it at least {replicas} (batch_size counts the samples of all replicas together)"
            )
        if not self.count:
            raise ValueError(
                f"{self.samples} samples hold no whole batch of {self.size}, and drop_last leaves out the shorter one; "
                "make batch_size smaller or drop_last False"
            )
        rest = self.samples % self.size
        if not self.drop_last and 0 < rest < replicas:
            raise ValueError(
                f"the last batch of an epoch has {rest} of {self.size} samples ({self.samples} in all) for {replicas} "
                f"replicas, and some would get none; set drop_last=True, or change batch_size or the data set"
            )

    def of(self, epoch: int, batch: int, replica: int = 0, replicas: int = 1) -> list[int]:
        """The samples of `replica`'s part of batch `batch` in epoch `epoch`."""
        start = batch * self.size
        here, stop = balanced(min(self.size, self.samples - start), replicas)[replica]
        places = range(start + here, start + stop)
        return [*map(shuffled(self.samples, self.seed, epoch), places)] if self.shuffle else list(places)


def shuffled(samples: int, seed: int, epoch: int) -> Callable[[int], int]:
    """A permutation of `range(samples)`, drawn from (seed, epoch): sample = permutation(place).

    Example:
        >>> sorted(map(shuffled(5, seed=1, epoch=0), range(5)))
        [0, 1, 2, 3, 4]
    """
    rows = isqrt(max(samples - 1, 0)) + 1
    columns = -(-samples // rows)
    state = mixed(seed ^ mixed(epoch + 1))
    keys = [mixed(state + i) for i in range(1, _ROUNDS + 1)]

    def permutation(place: int) -> int:
        while True:
            left, right = divmod(place, columns)
            for i in range(0, _ROUNDS, 2):
                left = (left + mixed(keys[i] ^ right)) % rows
                right = (right + mixed(keys[i + 1] ^ left)) % columns
            place = left * columns + right
            if place < samples:
                return place

    return permutation


def mixed(x: int) -> int:
    """64 bits that look random: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
