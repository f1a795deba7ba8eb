"""How many floating-point operations a model's step has, and how many a rank could do.

The operations of the forward passes are counted as they are dispatched, once; a backward pass has twice as many, and
what is computed again for want of memory counts as no work (Chowdhery et al. 2022, "PaLM", appendix B: model FLOPs).
The peak is what a product of two square matrices reaches on this rank while all the other ranks do the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

_TRIES = 5


class Work:
    """Counts the operations of the training forwards of `stages` from now until `stop`.

    Example:
        >>> layer = nn.Linear(3, 5); work = Work([layer])
        >>> _ = layer(torch.ones(2, 3))
        >>> work.stop()                                 # 3 x (2 x 2 x 3 x 5)
        180
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        self._flops = 0
        self._open: list[_Counting] = []
        self._hooks: list[RemovableHandle] = []
        for stage in stages:
            self._hooks.append(stage.register_forward_pre_hook(self._enter))
            self._hooks.append(stage.register_forward_hook(self._leave, always_call=True))

    def stop(self) -> int:
        """Count no more; the operations of the forwards that were seen and of their backwards."""
        while self._hooks:
            self._hooks.pop().remove()
        return 3 * self._flops

    def _enter(self, stage: nn.Module, inputs: Any) -> None:
        counting = _Counting()
        counting.__enter__()
        self._open.append(counting)

    def _leave(self, stage: nn.Module, inputs: Any, output: Any) -> None:
        counting = self._open.pop()
        counting.__exit__(None, None, None)
        if torch.is_grad_enabled():  # an evaluation is no part of a step
            self._flops += counting.flops


class _Counting(TorchDispatchMode):
    """Adds up the operations of what torch dispatches, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        kind = function._overloadpacket
        if kind is aten._scaled_dot_product_flash_attention_for_cpu:  # of which torch has no formula of its own
            kind = aten._scaled_dot_product_flash_attention
        formula = flop_registry.get(kind)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


def compiled(stages: Iterable[nn.Module]) -> bool:
    """Whether some of it runs as compiled code, in which no operation can be counted."""
    return any(m._compiled_call_impl is not None for stage in stages for m in stage.modules())


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """The operations per second of a product of square matrices here and now, the best of a few tries."""
    side = 4096 if device.type == "cuda" else 384
    a = torch.full((side, side), 0.5, device=device, dtype=dtype)
    seconds = []
    for _ in range(_TRIES + 1):  # the first warms up
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])
