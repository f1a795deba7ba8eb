"""What one report of a training says: plain numbers, as a record and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metrics:
    """One report, about the steps since the one before; the same on every rank.

    `seconds` of one step; `samples` and `tokens` per second over all replicas; `norm` of the whole model's gradient,
    before clipping; `flops` of the model per second over all ranks, and `peak`, their share of what the ranks could
    do; `bubble`, the idle share of the ranks in the last step's schedule; `sent`, the bytes that all ranks hand to
    each axis in one step; `memory`, the most bytes that any rank has held; `staleness`, under sync="async_ps(...)", by
    how many steps the slowest replica was behind, on average; `scale` of fp16's losses, and `skipped`, the steps that
    overflowed so far. None is what is not known.

    Example:
        >>> print(Metrics(12, 5.25, seconds=0.5, samples=32.0, tokens=4096.0, norm=1.5).words(total=300))
        step 12/300  loss 5.250  norm 1.50  4,096 tokens/s  left 2:24
    """

    step: int
    loss: float
    seconds: float | None = None
    samples: float | None = None
    tokens: float | None = None
    norm: float | None = None
    flops: float | None = None
    peak: float | None = None
    bubble: float | None = None
    sent: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None
    staleness: float | None = None
    scale: float | None = None
    skipped: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def numbers(self) -> dict[str, float]:
        """All numbers that are known, by flat names: those of axes as `sent.data`, the user's own by theirs.

        Example:
            >>> Metrics(1, 2.0, sent={"data": 8.0}, more={"lr": 0.1}).numbers()
            {'loss': 2.0, 'sent.data': 8.0, 'lr': 0.1}
        """
        known = asdict(self)
        for name in ("step", "warnings", "sent", "more"):
            known.pop(name)
        known |= {f"sent.{axis}": count for axis, count in self.sent.items()} | dict(self.more)
        return {name: value for name, value in known.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """What JSON can hold: a number that is not finite, which JSON does not know, is None."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.numbers().items()}
        return {"step": self.step, **finite} | ({"warnings": list(self.warnings)} if self.warnings else {})

    def words(self, total: int | None = None) -> str:
        """One line of what matters, for a terminal."""
        said = [f"step {self.step}" + (f"/{total}" if total else ""), f"loss {self.loss:.3f}"]
        if self.norm is not None:
            said.append(f"norm {self.norm:.3g}" if self.norm >= 1000 else f"norm {self.norm:.2f}")
        if self.tokens is not None:
            said.append(f"{self.tokens:,.0f} tokens/s")
        elif self.samples is not None:
            said.append(f"{self.samples:,.1f} samples/s")
        if self.flops is not None:
            share = f" ({self.peak:.0%} of peak)" if self.peak is not None else ""
            said.append(f"{scaled(self.flops)}FLOP/s{share}")
        if self.bubble is not None:
            said.append(f"bubble {self.bubble:.0%}")
        said += [f"{axis} {scaled(count)}B" for axis, count in self.sent.items() if count]
        if self.memory is not None:
            said.append(f"memory {scaled(self.memory)}B")
        if self.staleness is not None:
            said.append(f"staleness {self.staleness:.1f}")
        if self.skipped:
            said.append(f"skipped {self.skipped}")
        said += [f"{name} {value:.4g}" for name, value in self.more.items()]
        if total and self.seconds:
            said.append(f"left {clock((total - self.step) * self.seconds)}")
        return "  ".join(said)


def scaled(number: float) -> str:
    """Three digits and the letter of a thousand, a million and so on.

    Example:
        >>> scaled(1234567.0), scaled(12.0)
        ('1.23 M', '12 ')
    """
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g} "


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    Example:
        >>> clock(75), clock(3700)
        ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
