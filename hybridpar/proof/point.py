"""The points of a training run at which a recorder is told what happens; without one nobody listens.

    parallelizes      the module is whole still; what the recorder returns is cut in its place
    parallelized      the model is ready
    begins, ends      around each training step; `begins` may change the batch (to fp64), or end the run
    evaluates         an evaluation or a prediction begins; may end the run
    clips             gradients are about to be clipped
    loads             weights of the unsplit module are about to be loaded

Who listens is `hybridpar.proof.recorder`, for `hp.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Silent:
    """Nobody: every point does nothing."""

    def parallelizes(
        self, module: Any, loss: Any, example: Any, mesh: Any, weights: Any, init: Any
    ) -> tuple[Any, Any, Any]:
        return module, loss, example

    def parallelized(self, model: Any) -> None:
        return None

    def begins(self, model: Any, batch: Any, microbatches: int) -> Any:
        return batch

    def ends(self, model: Any, loss: float) -> None:
        return None

    def evaluates(self, model: Any) -> None:
        return None

    def clips(self, max_norm: float, norm_type: float) -> None:
        return None

    def loads(self, model: Any, state: Any) -> None:
        return None


_LISTENER: ContextVar[Silent] = ContextVar("hybridpar recorder", default=Silent())  # noqa: B039, it has no state


def listener() -> Silent:
    """Who is told now.

    Example:
        >>> listener().begins(None, (1, 2), microbatches=1)
        (1, 2)
    """
    return _LISTENER.get()


@contextmanager
def listening(one: Silent) -> Iterator[None]:
    """Tell `one` within a `with`."""
    token = _LISTENER.set(one)
    try:
        yield
    finally:
        _LISTENER.reset(token)
