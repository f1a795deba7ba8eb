"""Whether a stage's forward looks at values, or asks for some, that only an earlier stage has.

    x = block(x)                       a block of an earlier stage, whose result nobody needs here: NaN
    k = 2.0 if x.mean() > 0 else 1.0   a decision on NaN, which would be another one than on the value
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybridpar.skeleton.freight import tensors

_LOOKS = frozenset(
    ("__bool__", "__float__", "__int__", "__index__", "__contains__", "__array__")
    + ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero")
)
_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")
_Value = TypeVar("_Value")


def check_asked(module: nn.Module, inputs: Any) -> None:
    """Raise ValueError where a Hugging Face model is to collect what its blocks give besides their results.

    Example:
        >>> check_asked(nn.Linear(1, 1), {"input_ids": None, "output_attentions": True})
        Traceback (most recent call last):
        ValueError: output_attentions=True collects from all blocks what stays on their stages: leave it off, ...
    """
    given, config = inputs if isinstance(inputs, Mapping) else {}, getattr(module, "config", None)
    for flag in _COLLECTED:
        if given[flag] if flag in given else getattr(config, flag, False) is True:
            raise ValueError(
                f"{flag}=True collects from all blocks what stays on their stages: leave it off, or use pipeline=1"
            )


class Reads(TorchFunctionMode):
    """Within a `with`: raise ValueError where the value of a tensor is looked at that was computed from a tainted one.

    Example:
        >>> import torch
        >>> with Reads(1, ["blocks.2"]) as reads:
        ...     x = reads.taint(torch.tensor([float("nan")])) + 1
        ...     bool(x.mean() > 0)
        Traceback (most recent call last):
        ValueError: stage 1 (blocks.2 to blocks.2) looks at a value (bool) that only an earlier stage has: ...
    """

    def __init__(self, stage: int, names: Sequence[str]) -> None:
        super().__init__()
        self._where = f"stage {stage} ({names[0]} to {names[-1]})"
        self._tainted: dict[int, Tensor] = {}  # by id, kept alive so that no id is used again
        self._on = self._asleep = False

    def __enter__(self) -> Reads:
        self._on, self._asleep = True, False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._tainted, self._on = {}, False

    def taint(self, value: _Value) -> _Value:
        """`value`, whose tensors nobody may look at."""
        if self._on:
            self._tainted |= {id(t): t for t in tensors(value)}
        return value

    def aside(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call `function`, in which nothing is looked after: a block has its own inputs."""
        before, self._asleep = self._asleep, True
        try:
            return function(*args, **kwargs)
        finally:
            self._asleep = before

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tainted = not self._asleep and any(id(t) in self._tainted for t in tensors([args, kwargs]))
        name = getattr(func, "__name__", "")
        if tainted and name in _LOOKS:
            raise ValueError(
                f"{self._where} looks at a value ({name.strip('_')}) that only an earlier stage has: a forward may "
                "decide by its inputs, or by values inside a block, but not between blocks of several stages; move the "
                "decision into a block, or choose stages= so that one stage has all of it"
            )
        output = func(*args, **kwargs)
        return self.taint(output) if tainted else output
