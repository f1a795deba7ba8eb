"""Which modules' weights the forward of a module around them takes itself: of a part it would make something else.

    def forward(self, x):
        ...
        return y + sum(block.up.weight.norm() for block in self.blocks)

What can be read is the source of each forward and of the module's own methods; a name that stands for a module in a
loop is taken for every module below that has what is read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from types import FunctionType

from torch import nn

from hybridpar.tensor.derive.source import Unsure, alive, method, parents, parsed

_ALL = ("parameters", "named_parameters", "state_dict")
_DESCRIBE = ("dtype", "device", "is_meta", "is_cuda", "requires_grad")
_LOOKS = ("next", "isinstance", "hasattr")


def taken(module: nn.Module) -> dict[str, str]:
    """{module: why it must be whole} for what is below `module`.

    A module that reads the weights of its own children is for `flow` to judge, but where it takes them all.

    Example:
        >>> class Norms(nn.Sequential):                                       # doctest: +SKIP
        ...     def forward(self, x):
        ...         return super().forward(x), sum(block[0].weight.norm() for block in self)
        >>> taken(Norms(nn.Sequential(nn.Linear(2, 2))))                      # doctest: +SKIP
        {'0.0': 'the forward of Norms takes its weight itself'}
    """
    found: dict[str, str] = {}
    for name, one in module.named_modules():
        below = {path: child for path, child in one.named_modules(remove_duplicate=False) if path}
        for leaf, way in _read(one) if below else ():
            for path, child in below.items():
                if _meant(child, path, leaf, way):
                    what = f"{leaf}()" if leaf in _ALL else leaf
                    reason = f"the forward of {type(one).__name__} takes its {what} itself"
                    found.setdefault(f"{name}.{path}" if name else path, reason)
    return found


def _meant(child: nn.Module, path: str, leaf: str, way: tuple[bool, str]) -> bool:
    """Whether a read of `leaf` at `way`, (from self, dotted path), is one of `child`."""
    mine, where = way
    if leaf in _ALL:
        return not where or f".{path}.".startswith(f".{where}.") if mine else f".{where}." in f".{path}."
    if child._parameters.get(leaf) is None:
        return False
    return path == where if mine else not where or f".{path}".endswith(f".{where}")


def _read(module: nn.Module) -> Iterator[tuple[str, tuple[bool, str]]]:
    """(what is read, (whether by a path from self, the path)) in the module's forward and its own methods."""
    forward = method(module, "forward")
    todo, seen = [forward] if forward is not None else [], set()
    while todo:
        function = todo.pop()
        if function in seen or function.__module__.startswith("torch."):
            continue
        seen.add(function)
        try:
            tree = parsed(function)
        except Unsure:
            continue
        me = tree.args.args[0].arg if tree.args.args else "self"
        around = parents(tree)
        for node in alive(tree, module, me):
            if isinstance(node, ast.Attribute):
                todo += _onward(node, module, me)
                if _takes(node, around):
                    yield node.attr, _way(node.value, me)


def _takes(node: ast.Attribute, around: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether `node` is a read of weights that goes on with their values or shapes."""
    above = around[node]
    if node.attr in _ALL:
        return isinstance(above, ast.Call) and above.func is node and not _looked_at(above, around)
    if not node.attr.startswith(("weight", "bias")) or not isinstance(node.ctx, ast.Load):
        return False
    called = isinstance(above, ast.Call) and above.func is node
    return not called and getattr(above, "attr", None) not in _DESCRIBE and not _looked_at(node, around)


def _looked_at(node: ast.AST, around: Mapping[ast.AST, ast.AST]) -> bool:
    above = around[node]
    return isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id in _LOOKS


def _way(node: ast.expr, me: str) -> tuple[bool, str]:
    """(True, "a.b") of `self.a.b`; (False, "a.b") of the same of another, as in `block.a.b`, `self.c[0].a.b`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return isinstance(node, ast.Name) and node.id == me, ".".join(reversed(names))


def _onward(node: ast.Attribute, module: nn.Module, me: str) -> list[FunctionType]:
    """The functions behind `self.name` and `super().name`."""
    if isinstance(node.value, ast.Name) and node.value.id == me:
        own = method(module, node.attr)
        return [own] if own is not None else []
    if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
        found = [kind.__dict__.get(node.attr) for kind in type(module).__mro__]
        return [one for one in found if isinstance(one, FunctionType)]
    return []
