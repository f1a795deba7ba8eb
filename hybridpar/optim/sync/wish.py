"""What a sync policy is asked for, from one word such as "diloco(64, lr=0.7)".

    allreduce                               gradients are averaged in every step
    local_sgd(steps)                        weights are averaged every so many steps
    diloco(steps, lr, momentum, delay, inside)
    easgd(steps, pull)
    async_ps(staleness)

docs/sync.md says what each does, and whose it is.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class AllReduce:
    """Gradients averaged over all replicas in every step."""


@dataclass(frozen=True)
class LocalSgd:
    """Each replica trains for itself; weights are averaged every `steps` steps."""

    steps: int

    def __post_init__(self) -> None:
        _whole(self, "steps", 1)


@dataclass(frozen=True)
class DiLoCo:
    """As LocalSgd, but what all replicas moved on average is the gradient of an outer Nesterov optimizer.

    The outer step is done `delay` steps after it was begun. Gradients are averaged in every step among `inside`
    replicas, a number or "node".
    """

    steps: int
    lr: float = 0.7
    momentum: float = 0.9
    delay: int = 0
    inside: int | str = 1

    def __post_init__(self) -> None:
        _whole(self, "steps", 1)
        _whole(self, "delay", 0)
        _between(self, "lr", 0, None)
        if not isinstance(self.momentum, int | float) or not 0 <= self.momentum < 1:
            raise ValueError(f"diloco: momentum={self.momentum!r}: it is at least 0 and less than 1")
        if self.delay >= self.steps:
            raise ValueError(
                f"diloco: delay={self.delay} steps do not fit into a round of {self.steps}: choose a smaller delay"
            )
        if self.inside != "node":
            _whole(self, "inside", 1)


@dataclass(frozen=True)
class Easgd:
    """Each replica trains for itself; every `steps` steps it and a common centre pull each other.

    `pull` is the share of the distance that the centre moves towards the replicas' mean, 0.9 as its authors advise.
    """

    steps: int
    pull: float = 0.9

    def __post_init__(self) -> None:
        _whole(self, "steps", 1)
        _between(self, "pull", 0, 1)


@dataclass(frozen=True)
class AsyncPs:
    """Each replica sends what it learns to servers and takes what others sent, at most `staleness` steps behind."""

    staleness: int

    def __post_init__(self) -> None:
        _whole(self, "staleness", 0)


Wish = AllReduce | LocalSgd | DiLoCo | Easgd | AsyncPs

NAMES: dict[str, type[Any]] = {
    "allreduce": AllReduce, "local_sgd": LocalSgd, "diloco": DiLoCo, "easgd": Easgd, "async_ps": AsyncPs,
}  # fmt: skip


def parse(text: str) -> Wish:
    """What `text` asks for.

    Raises ValueError where it is none of the policies, or its numbers are not theirs.

    Example:
        >>> parse("diloco(64, lr=0.5)")
        DiLoCo(steps=64, lr=0.5, momentum=0.9, delay=0, inside=1)
        >>> parse("allreduce")
        AllReduce()
    """
    name, positional, named = _read(text)
    if name not in NAMES:
        raise ValueError(f"sync={text!r}: there is no policy {name!r}; the policies are {', '.join(NAMES)}")
    kind = NAMES[name]
    known = [field.name for field in fields(kind)]
    unknown = [key for key in named if key not in known]
    if unknown or len(positional) > len(known):
        what = f"no {unknown[0]!r}" if unknown else f"not {len(positional)} numbers"
        raise ValueError(f"sync={text!r}: {name} takes {what}; it takes ({', '.join(known)})")
    try:
        return kind(*positional, **named)
    except TypeError:
        all_ = ", ".join(known)
        raise ValueError(f"sync={text!r}: {name} needs {known[0]}, as in {name}(8); it takes ({all_})") from None


def _read(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The name of a call that is written in `text`, and its arguments."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        assert isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)
        assert all(keyword.arg for keyword in tree.keywords)
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
        return tree.func.id, [ast.literal_eval(one) for one in tree.args], named
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"sync={text!r} cannot be read: write it as in local_sgd(8) or diloco(64, lr=0.7)") from None


def _whole(wish: Any, name: str, least: int) -> None:
    value = getattr(wish, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{called(wish)}: {name}={value!r}: it is a whole number of at least {least}")


def _between(wish: Any, name: str, low: float, high: float | None) -> None:
    value = getattr(wish, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > low or (high and value > high):
        most = f" and at most {high}" if high else ""
        raise ValueError(f"{called(wish)}: {name}={value!r}: it is more than {low}{most}")


def called(wish: Any) -> str:
    """The name of its policy."""
    return next(name for name, kind in NAMES.items() if isinstance(wish, kind))
