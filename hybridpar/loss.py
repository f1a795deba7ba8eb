"""The loss over a batch that is spread over microbatches and replicas: sums and weights, divided once.

    batch loss = sum of (weight x mean) over all microbatches of all replicas / sum of the weights

The weight of a microbatch is what the loss divides by: the counted tokens, or the sum of their class weights, where the
loss is `CrossEntropy` or one of torch's for classes; else the number of samples. So unequal microbatches and ignored
tokens count as they would in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybridpar.shard import Spec
from hybridpar.tensor.loss import CrossEntropy
from hybridpar.wires.axis import Axis

LossFunction = Callable[[Any, Any], Tensor]


class WeightedLoss:
    """A user's loss function, as a sum over what it counts and the number of what it counts.

    `logits()` is the spec of the column layer, if any, from which the output at hand may come.
    """

    def __init__(self, function: LossFunction, axis: Axis, logits: Callable[[], Spec | None]) -> None:
        self._function = _known(function)
        self._counts = isinstance(self._function, CrossEntropy)
        self._torchs = self._counts and function is not self._function
        self._axis, self._logits = axis, logits

    def weight(self, targets: Any, samples: int) -> float:
        """How much the microbatch counts."""
        if isinstance(self._function, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
            kept = targets[targets != self._function.ignore_index]
            each = self._function.weight
            return float(kept.numel() if each is None else each.to(kept.device)[kept].sum())
        return float(self._function.weight(targets) if self._counts else samples)

    def total(self, output: Any, targets: Any, weight: float) -> Tensor:
        """The sum (not the mean) over what counts."""
        if self._counts:
            output = logits(output)
        if weight == 0:
            return output.sum() * 0.0 if isinstance(output, Tensor) else torch.zeros((), requires_grad=True)
        spec = self._logits()
        cut = is_cut(output, spec, self._axis)
        if cut and not self._counts:
            raise ValueError(
                f"the plan leaves the output cut over the vocabulary, which {_name(self._function)} cannot read: use "
                "loss=hp.CrossEntropy(), or take the last layer out of the plan"
            )
        if self._torchs and not cut and output.dim() > 2 and targets.shape == (len(output), *output.shape[2:]):
            output = output.movedim(1, -1)  # [b, v, ..], which is what torch's own takes
        value = (self._function.cut(self._axis, spec.parts) if cut else self._function)(output, targets)
        if value.dim():
            shape = list(value.shape)
            raise ValueError(f"the loss function returned shape {shape} and must return one number, the mean")
        return value if self._counts else value * weight


def logits(output: Any) -> Any:
    """The `logits` of an output that has some (an attribute or an item), as those of Hugging Face models; or itself."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def is_cut(output: Any, logits: Spec | None, axis: Axis) -> bool:
    """Whether `output` comes from the column layer `logits`, by its last dim: the module may go on after that layer."""
    if logits is None or axis.size == 1 or not isinstance(output, Tensor) or not output.dim():
        return False
    return output.shape[-1] == sum(b - a for a, b in logits.held(axis.index)) != logits.shape[0]


def _name(function: LossFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _known(function: LossFunction) -> LossFunction:
    """torch's own cross entropy as ours, which knows how many tokens it counts; its functions as modules."""
    if isinstance(function, functools.partial) and not function.args:
        if function.func is nn.functional.cross_entropy:
            return _known(nn.CrossEntropyLoss(**function.keywords))
        if function.func is nn.functional.nll_loss:
            return _known(nn.NLLLoss(**function.keywords))
    if function is nn.functional.cross_entropy:
        return CrossEntropy()
    if function is nn.functional.nll_loss:
        return nn.NLLLoss()
    if type(function) is nn.CrossEntropyLoss and function.weight is None and function.reduction == "mean":
        return CrossEntropy(function.ignore_index, function.label_smoothing)
    if isinstance(function, nn.Module) and getattr(function, "reduction", "mean") == "sum":
        raise ValueError(f"{type(function).__name__}(reduction='sum') cannot be averaged over microbatches: use 'mean'")
    return function
