"""What is known about a difference, as values: numbers only, so that signatures can be tried without a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

CLOSE = 1e-5  # a hypothesis holds where it leaves no more than this; the facts are in fp64, or nearly
_PLAIN = 2e-4  # a factor nearer to 1 is what a small error somewhere else looks like


@dataclass(frozen=True)
class Cause:
    """`key` for programs, `words` for people; module, microbatch and rank where the signature tells them."""

    key: str
    words: str
    module: str | None = None
    microbatch: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Fit:
    """Coefficients that explain a tensor, and what they leave unexplained, relative to it."""

    coefficients: tuple[float, ...]
    residual: float

    @property
    def holds(self) -> bool:
        return self.residual < CLOSE

    @property
    def factor(self) -> float | None:
        """The number that all coefficients are, if they are."""
        if not self.holds or not self.coefficients:
            return None
        mean = fmean(self.coefficients)
        return mean if all(near(c, mean) for c in self.coefficients) else None


@dataclass(frozen=True)
class Part:
    """A microbatch, over all replicas in order: its replica, how much it counts, its loss in one process."""

    replica: int
    counted: float
    loss: float


@dataclass(frozen=True)
class Mask:
    """A dropout mask that `rank` drew: see watch.Mask. `right` tells whether the reference draws it too."""

    rank: int
    replica: int
    site: str
    sample: int
    crc: int
    length: int
    parts: tuple[tuple[int, int], ...]
    right: bool


@dataclass(frozen=True)
class Divergence:
    """The first module whose output, or its gradient, differs. `total`, `twin`: how far the sum over the tensor ranks,
    and another index's slice, are from what is wanted; `ratio` explains the tensor up to its `residual`."""

    forward: bool
    module: str
    reader: str  # the module that read it, whose backward made the gradient
    kind: str
    microbatch: int
    rank: int
    error: float
    scale: float
    total: float
    twin: float
    ratio: float
    residual: float


@dataclass(frozen=True)
class Facts:
    """All that is known about the first difference."""

    kind: str
    name: str
    rank: int
    degrees: tuple[int, int, int]  # data, pipeline, tensor
    places: Sequence[tuple[int, int, int]]  # of each rank
    wrong: Sequence[Sequence[str]] = ()  # of each rank, the names that differ
    held: Sequence[int] = ()  # of each rank, how many names it has
    parts: Sequence[Part] = ()
    fits: Sequence[Fit | None] = ()  # of each rank's gradients, or updates
    returned: Sequence[tuple[str, float] | None] = ()  # of each rank, before anything is averaged: the worst gradient
    totals: float = 1.0  # how far the sum over the tensor ranks is from the gradient
    uses: Fit | None = None  # of a tied gradient, by its uses
    use_names: Sequence[str] = ()
    clipped: bool = False  # then gradients are known up to a factor: the norm may be wrong because they are
    loss: float = 0.0  # of the run
    reference_loss: float = 0.0
    unseen: Sequence[str] = ()  # trained, with a gradient, in no optimizer
    idle: Sequence[int] = ()  # ranks whose optimizer has not stepped
    options: Sequence[tuple[str, int, object, int, object]] = ()  # that differ between two ranks
    apart: Sequence[tuple[str, int, str]] = ()  # changed unequally between steps: (name, a rank that did, words)
    moved: Sequence[tuple[int, str, str]] = ()  # (rank, name, which slice it holds)
    masks: Sequence[Mask] = ()
    random: bool = False  # the module gives something else when it is called again
    divergence: Divergence | None = None


def near(a: float, b: float) -> bool:
    return isfinite(a) and isfinite(b) and abs(a - b) <= CLOSE * max(1.0, abs(a), abs(b))


def told_by(factor: float) -> bool:
    """Whether `factor` explains anything: nearly 1 is no cause.

    Example:
        >>> told_by(0.999991), told_by(0.5)
        (False, True)
    """
    return abs(factor - 1) > _PLAIN


def module_of(name: str) -> str:
    """The module of a parameter or buffer."""
    return name.rpartition(".")[0]
