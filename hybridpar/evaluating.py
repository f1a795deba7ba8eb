"""Evaluation mode for a while: within a `with`, and afterwards what was before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from hybridpar.proof.point import listener

if TYPE_CHECKING:
    from hybridpar.engine import ParallelModel


class Evaluating:
    """`model`, whose `stages` are those held here, is in evaluation mode within a `with`.

    Example:
        >>> with Evaluating(model, stages):     # doctest: +SKIP
        ...     outputs = run()
    """

    def __init__(self, model: ParallelModel, stages: Iterable[nn.Module]) -> None:
        self._model, self._before = model, model.training
        # Each module's own: some may be in evaluation mode amid training, such as frozen batch norms.
        self._modes = [(module, module.training) for stage in stages for module in stage.modules()]

    def __enter__(self) -> None:
        listener().evaluates(self._model)
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.training = self._before
        for module, mode in self._modes:
            module.training = mode
