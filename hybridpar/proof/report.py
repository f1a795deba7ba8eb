"""What `hp.verify` found, as values: differences, the rows of its table, one finding, and the verdict.

    Difference    one tensor of one rank against the reference: how far off, and how far rounding may take it
    Row           the worst difference of one quantity in one run
    Finding       the first difference of all: where it is, how large, and the likely cause
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

# In the order in which a training step makes them.
KINDS = ("weights at the start", "loss", "gradients", "buffers", "updated parameters")


@dataclass(frozen=True)
class Difference:
    """`error` is the largest absolute difference, `allowed` what rounding explains, `scale` the size of the tensor."""

    step: int
    kind: str
    name: str
    rank: int
    error: float
    allowed: float
    scale: float

    @property
    def excess(self) -> float:
        """How many times what is allowed; infinite for numbers that are not, and where none is."""
        if not self.allowed or not math.isfinite(self.error):
            return math.inf if self.error else 0.0
        return self.error / self.allowed

    @property
    def order(self) -> tuple[int, int]:
        """Earlier differences first."""
        return self.step, KINDS.index(self.kind)


@dataclass(frozen=True)
class Row:
    """One line of the table. `verdict` is equal, rounding or different."""

    run: str
    quantity: str
    error: float
    allowed: float
    scale: float
    where: str
    verdict: str


@dataclass(frozen=True)
class Finding:
    """The first difference: `microbatch` counts over all replicas in order; None where it is in all or in none."""

    kind: str
    module: str
    step: int
    rank: int
    microbatch: int | None
    error: float
    allowed: float
    cause: str
    sentence: str


@dataclass(frozen=True)
class Report:
    """Whether the run equals one process, and if not, where it does not.

    Example:
        >>> report = Report("data=1 x pipeline=1 x tensor=2", 3, (), None, ())
        >>> report.equal, report.sentence
        (True, 'The run on data=1 x pipeline=1 x tensor=2 equals one process in each of 3 steps.')
    """

    mesh: str
    steps: int
    rows: tuple[Row, ...]
    finding: Finding | None
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.finding is None

    @property
    def sentence(self) -> str:
        """The result in words."""
        if self.finding is not None:
            return self.finding.sentence
        steps = f"in each of {self.steps} steps" if self.steps > 1 else "in the one step that it made"
        return f"The run on {self.mesh} equals one process {steps}."

    def as_json(self) -> str:
        """The report as a JSON object; numbers that are not finite are null."""
        told = {"equal": self.equal, "sentence": self.sentence, **asdict(self)}
        return json.dumps(_finite(told), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `as_json` wrote."""
        told = json.loads(text)
        rows = tuple(Row(**_numbers(row)) for row in told["rows"])
        finding = None if told["finding"] is None else Finding(**_numbers(told["finding"]))
        return cls(told["mesh"], told["steps"], rows, finding, tuple(told["notes"]))


def rows(run: str, differences: Iterable[Difference], excused: bool = False) -> tuple[Row, ...]:
    """The worst difference of each kind; `excused` says that an exact run has shown them to be rounding."""
    worst: dict[str, Difference] = {}
    for one in differences:
        if one.kind not in worst or one.excess > worst[one.kind].excess:
            worst[one.kind] = one
    return tuple(_row(run, worst[kind], excused) for kind in KINDS if kind in worst)


def _row(run: str, one: Difference, excused: bool) -> Row:
    verdict = "equal" if one.excess <= 1 else "rounding" if excused and math.isfinite(one.error) else "different"
    where = f"step {one.step}, rank {one.rank}" + (f", {one.name}" if one.name else "")
    return Row(run, one.kind, one.error, one.allowed, one.scale, where, verdict)


def first(differences: Sequence[Difference]) -> Difference | None:
    """The earliest difference that rounding does not explain; of several at once the largest."""
    wrong = [one for one in differences if not one.excess <= 1]
    if not wrong:
        return None
    order = min(one.order for one in wrong)
    return max((one for one in wrong if one.order == order), key=lambda one: one.excess)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _numbers(told: dict[str, object]) -> dict[str, object]:
    return {key: math.inf if key in ("error", "allowed", "scale") and v is None else v for key, v in told.items()}
