"""What can fail on one rank fails on all, with the same sentence: none is left waiting for a rank that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybridpar.wires.axis import Axis


def together(axis: Axis, work: Callable[[], Any]) -> list[Any]:
    """Do `work` on each rank of `axis`; returns what each rank's gave, small Python values, in order of index.

    Raises the error of the first rank that failed, on all of them: ValueError, or RuntimeError for what else the
    machine has said.

    Example:
        >>> from hybridpar.wires.axis import Alone
        >>> together(Alone("everyone"), lambda: 3)
        [3]
    """
    value, failed = None, None
    try:
        value = work()
    except (ValueError, RuntimeError, OSError) as error:
        failed = error
    told = axis.objects((value, isinstance(failed, ValueError), None if failed is None else str(failed)))
    for _, misused, words in told:
        if words is not None and misused:
            raise ValueError(words) from failed
        if words is not None:
            raise RuntimeError(words) from failed
    return [one for one, _, _ in told]
