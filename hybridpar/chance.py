"""Random numbers of one's own: what runs within cannot disturb the training's, nor be disturbed.

Users' samplers and streams draw from the global generators of torch, Python and numpy. Within a `with` these continue
a sequence that depends on a seed alone, so that an epoch can be drawn anew on any rank, in any layout, at any time.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class Chance:
    """The global generators of the CPU, seeded by `seed`, within each `with`; those from before come back after it.

    Example:
        >>> chance, other = Chance(7), Chance(7)
        >>> with chance: first = torch.rand(2)
        >>> with chance: second = torch.rand(2)         # goes on
        >>> with other: both = torch.rand(4)
        >>> bool((torch.cat([first, second]) == both).all())
        True
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._own: tuple[Any, ...] = ()
        self._outside: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._outside = _states()
        if self._seed is None:
            _restore(self._own)
            return
        torch.default_generator.manual_seed(self._seed)  # torch.manual_seed would seed the GPUs too
        random.seed(self._seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self._seed % 2**32)
        self._seed = None

    def __exit__(self, *_: object) -> None:
        self._own = _states()
        _restore(self._outside)


def _states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])
