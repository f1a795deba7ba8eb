"""Which modules draw random numbers by function calls in their own code, where no module can be replaced."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from hybridpar.tensor.derive.source import Unsure, alive, largest, method, parsed

_OTHER = {
    *("rand", "rand_like", "randn", "randn_like", "bernoulli", "bernoulli_", "uniform_", "normal_", "randint"),
    *("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "drop_path"),
}
_KEYWORDS = ("dropout", "dropout_p", "attn_dropout")


def dropping(module: nn.Module) -> bool:
    """Whether the forward of `module` may call F.dropout, or attention with a dropout, with p > 0.

    Example:
        >>> dropping(BartDecoderLayer(BartConfig(dropout=0.1)))               # doctest: +SKIP
        True
    """
    return any(_drops(call, module, me) for call, me in _calls(module))


def draws(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(module, what it draws) where that comes from torch's generator whatever is done."""
    for name, child in module.named_modules():
        for call, _ in _calls(child):
            if _name(call) in _OTHER:
                yield name, f"calls {_name(call)}, which draws from torch's generator: it depends on the layout"
                break


def _calls(module: nn.Module) -> Iterator[tuple[ast.Call, str]]:
    """The calls in the module's forward and its own methods, each with the name it has for the module."""
    forward = method(module, "forward")
    todo: list[FunctionType] = [] if forward is None or forward.__module__.startswith("torch.") else [forward]
    seen: set[FunctionType] = set()
    while todo:
        function = todo.pop()
        seen.add(function)
        try:
            tree = parsed(function)
        except Unsure:
            continue
        me = tree.args.args[0].arg if tree.args.args else "self"
        for node in alive(tree, module, me):
            if isinstance(node, ast.Call):
                yield node, me
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
                own = method(module, node.attr)
                todo += [own] if own is not None and own not in seen and own not in todo else []


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _drops(call: ast.Call, module: nn.Module, me: str) -> bool:
    by_keyword = any(k.arg in _KEYWORDS and largest(k.value, module, me) for k in call.keywords)
    own = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == me
    if own or _name(call) not in ("dropout", "dropout_add"):
        return by_keyword
    given = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "p")]
    return not given or any(largest(a, module, me) for a in given)
