"""Dropouts that code draws by a function call, which no module can take the place of: they are named in the report."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from torch import nn

from hybridpar.tensor.derive.source import Unsure, alive, method, parsed


def draws(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(module, what it draws) for each module whose forward drops elements by a function with p > 0."""
    for name, child in module.named_modules():
        p = _probability(child)
        if p:
            told = f"drops with p={p:g} by a function: its masks come from torch's generator and depend on the layout"
            yield name, told


def _probability(module: nn.Module) -> float:
    forward = method(module, "forward")
    if forward is None or forward.__module__.startswith("torch."):
        return 0.0
    try:
        tree = parsed(forward)
    except Unsure:
        return 0.0
    for node in alive(tree, module):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("dropout", "dropout_p", "p", "attn_dropout") and (p := _largest(keyword.value, module)):
                    return p
    return 0.0


def _largest(node: ast.AST, module: nn.Module) -> float:
    """The largest number that is read of the module in an expression such as `self.p if self.training else 0.0`."""
    found = 0.0
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            value = module
            for name in ast.unparse(part).split(".")[1:]:
                value = inspect.getattr_static(value, name, None) if not isinstance(value, nn.Module) else getattr(value, name, None)
            if isinstance(value, float) and 0 < value <= 1:
                found = max(found, value)
    return found
