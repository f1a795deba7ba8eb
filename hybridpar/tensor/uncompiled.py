"""`torch.compile` and what hybridpar puts into a model: layers that send messages or draw masks run as they are.

    for block in model.blocks:
        block.compile()                         the user's, before hp.parallelize
    q = self.q(x); ...                          compiled
    self.out(a)                                 a row-cut layer of ours: the graph is left, and entered again after it

torch's compiler cannot see that a message must have come, and not all of the whole numbers in a mask's making compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def check(module: nn.Module, stages: int) -> None:
    """Raise ValueError where a whole module is compiled that is to be cut into `stages`.

    Example:
        >>> check(nn.Linear(2, 2), stages=4)
    """
    way_out = "compile its parts instead, as in `for block in model.blocks: block.compile()`"
    if type(module).__name__ == "OptimizedModule":
        raise ValueError(f"what torch.compile(model) returns hides the model that is to be cut: {way_out}")
    if stages > 1 and module._compiled_call_impl is not None:
        raise ValueError(f"the model is compiled as a whole, and {stages} stages each run a part of it: {way_out}")


def leave_out(module: nn.Module) -> None:
    """Keep the compiler out of hybridpar's layers and hooks in `module`, if any part of it is compiled."""
    if all(one._compiled_call_impl is None for one in module.modules()):
        return
    outside: dict[int, Any] = {}  # one for each function: the compiler makes code anew for another one
    for one in module.modules():
        kind = type(one)
        # For the class and not for each layer, so that blocks share what is compiled.
        if _ours(kind) and not hasattr(kind.forward, "_torchdynamo_disable"):
            kind.forward = torch.compiler.disable(kind.forward)
        for hooks in (one._forward_pre_hooks, one._forward_hooks):
            for key, hook in hooks.items():
                if _ours(type(hook)) or _ours(hook):
                    hooks[key] = outside.setdefault(id(hook), torch.compiler.disable(hook))


def _ours(what: Any) -> bool:
    return str(getattr(what, "__module__", "")).startswith(f"{__package__}.")
