"""What the code of a module's forward reads of the module itself: the source, parsed, with dead branches left out.

A forward is trusted only where everything that it reads has been understood, so unknown code is found before it runs.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn


class Unsure(Exception):
    """The code cannot be trusted to work on a part; the message is the reason."""


_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_UNKNOWN = object()


@dataclass(frozen=True)
class Reads:
    """What a forward reads of its module.

    `attributes` maps each to whether every read of it gives a shape; `called` are those called as self.x(..), `within`
    those of which something is read but a dtype or device, and `config` what is read of self.config. `arguments` are
    those of forward itself.
    """

    attributes: dict[str, bool] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    within: set[str] = field(default_factory=set)
    config: set[str] = field(default_factory=set)
    arguments: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def parsed(function: FunctionType) -> ast.FunctionDef:
    """The definition of `function`. Unsure where its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise Unsure(f"the source of {function.__qualname__} cannot be read ({type(error).__name__})") from None
    if not isinstance(tree.body[0], ast.FunctionDef):
        raise Unsure(f"{function.__qualname__} is no plain function")
    return tree.body[0]


def method(module: nn.Module, name: str) -> FunctionType | None:
    """The function behind `module.name`, without its decorators; None where it is not a method."""
    found = inspect.getattr_static(type(module), name, None)
    if isinstance(found, staticmethod):
        return None  # it does not see the module
    found = inspect.unwrap(found) if callable(found) else None
    return found if isinstance(found, FunctionType) else None


def parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    """The node around each node."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def path(node: ast.AST, me: str = "self") -> str | None:
    """"a.b" for the expression `self.a.b`, else None."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == me and names else None


def value(node: ast.AST, module: nn.Module, me: str = "self") -> Any:
    """The value of an expression of constants and the module's own plain attributes; `_UNKNOWN` for any other."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = value(node.operand, module, me)
        return inner if inner is _UNKNOWN else not inner
    if isinstance(node, ast.BoolOp):
        found = [value(part, module, me) for part in node.values]
        stop = isinstance(node.op, ast.Or)
        if any(v is not _UNKNOWN and bool(v) == stop for v in found):
            return stop
        return _UNKNOWN if any(v is _UNKNOWN for v in found) else not stop
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = value(node.left, module, me), value(node.comparators[0], module, me)
        if _UNKNOWN in (left, right):
            return _UNKNOWN
        try:
            return _COMPARE[type(node.ops[0])](left, right)
        except TypeError:
            return _UNKNOWN
    dotted = path(node, me)
    if dotted is None or dotted == "training":
        return _UNKNOWN
    found = module
    for name in dotted.split("."):
        found = getattr(found, name, _UNKNOWN)
    return _UNKNOWN if isinstance(found, Tensor | nn.Module) or callable(found) else found


def known(node: ast.AST, module: nn.Module, me: str = "self") -> bool | None:
    """Whether a test holds, as far as the module's plain attributes tell."""
    found = value(node, module, me)
    return None if found is _UNKNOWN else bool(found)


def largest(node: ast.AST, module: nn.Module, me: str = "self") -> float:
    """The largest number in (0, 1] in an expression such as `self.p if self.training else 0.0`; 0 if there is none."""
    found = 0.0
    for part in ast.walk(node):
        number = value(part, module, me) if isinstance(part, ast.Attribute | ast.Constant) else None
        if isinstance(number, float) and 0 < number <= 1:
            found = max(found, number)
    return found


def alive(tree: ast.AST, module: nn.Module, me: str = "self") -> Iterator[ast.AST]:
    """All nodes but those of branches that this module never takes."""
    yield tree
    if isinstance(tree, ast.If | ast.IfExp):
        test = known(tree.test, module, me)
        body = tree.body if isinstance(tree.body, list) else [tree.body]
        other = tree.orelse if isinstance(tree.orelse, list) else [tree.orelse]
        inside = [tree.test, *(body if test is not False else []), *(other if test is not True else [])]
    else:
        function = isinstance(tree, ast.FunctionDef)
        inside = [c for c in ast.iter_child_nodes(tree) if not (function and _outside(c, tree))]
    for node in inside:
        yield from alive(node, module, me)


def _outside(child: ast.AST, function: ast.FunctionDef) -> bool:
    return child in function.decorator_list or child is function.args or child is function.returns


_SHAPING = {
    *("view", "reshape", "split", "expand", "zeros", "new_zeros", "repeat_interleave", "repeat_kv", "chunk"),
    *("_split_heads", "_merge_heads"),
}
_PASSED = {"attention_interface", "attention_interface_fn", "attn_interface", "attention_function"}


def reads(module: nn.Module) -> Reads:
    """What the forward of `module`, its own methods and its eager attention function read.

    Unsure where the module itself is handed to code that is not known.
    """
    forward = method(module, "forward")
    if forward is None:
        raise Unsure("its forward is not a plain method")
    arguments = parsed(forward).args
    _not_by_input(parsed(forward))
    found = Reads(arguments=tuple(a.arg for a in [*arguments.args[1:], *arguments.kwonlyargs]))
    todo, seen = [forward], set()
    while todo:
        function = todo.pop()
        if function not in seen:
            seen.add(function)
            todo += _read(function, module, found)
    return found


def _not_by_input(tree: ast.FunctionDef) -> None:
    """Unsure where the forward reshapes by the features of its input, which are not those of the heads held here."""
    given = {a.arg for a in tree.args.args}
    lengths = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and len(node.targets[0].elts) > 2:
            shape = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(shape, ast.Attribute) and shape.attr in ("shape", "size"):
                last = node.targets[0].elts[-1]
                if isinstance(shape.value, ast.Name) and shape.value.id in given and isinstance(last, ast.Name):
                    lengths.add(last.id)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) in ("view", "reshape"):
            used = {n.id for a in call.args for n in ast.walk(a) if isinstance(n, ast.Name)} & lengths
            if used:
                raise Unsure(f"its forward reshapes by {used.pop()}, the length of its input's last dim")


def _read(function: FunctionType, module: nn.Module, found: Reads) -> list[FunctionType]:
    """Add what `function`, whose first argument is the module, reads; returns what it hands the module on to."""
    tree = parsed(function)
    me = tree.args.args[0].arg
    around, onward = parents(tree), []
    for node in alive(tree, module, me):
        if isinstance(node, ast.Name) and (eager := _eager(node, function)) is not None:
            onward.append(eager)
        if not (isinstance(node, ast.Name) and node.id == me):
            continue
        above = around[node]
        if not isinstance(above, ast.Attribute):
            name = _getattr(above)
            if name is not None:
                found.attributes[name] = False
            elif not _handed(above, node):
                raise Unsure(f"{function.__qualname__} hands the module on to code that is not known")
            continue
        if callable(getattr(type(module), above.attr, None)):
            own = method(module, above.attr)
            onward += [own] if own is not None else []  # a static method does not see the module
            continue
        if above.attr == "config" and isinstance(around[above], ast.Attribute):
            found.config.add(around[above].attr)
        beyond = around[above]
        if isinstance(beyond, ast.Call) and beyond.func is above:
            found.called.add(above.attr)
        if isinstance(beyond, ast.Attribute) and getattr(around[beyond], "attr", None) not in ("dtype", "device"):
            found.within.add(above.attr)
        found.attributes[above.attr] = found.attributes.get(above.attr, True) and _shapes(above, around)
    return onward


def _eager(node: ast.Name, function: FunctionType) -> FunctionType | None:
    found = function.__globals__.get(node.id) if "eager" in node.id else None
    return found if isinstance(found, FunctionType) else None


def _getattr(call: ast.AST) -> str | None:
    """The name in `getattr(self, "name", ..)` or `hasattr(self, "name")`."""
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr"):
        return str(call.args[1].value) if isinstance(call.args[1], ast.Constant) else None
    return None


def _handed(call: ast.AST, node: ast.AST) -> bool:
    """Whether the module is given to an attention function, which are known."""
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _PASSED


def _shapes(node: ast.AST, around: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether the value ends as part of a shape or as a number of repeats."""
    while node in around and not isinstance(node, ast.stmt):
        node = around[node]
        if isinstance(node, ast.Assign) and "heads" in ast.unparse(node.targets[0]):
            return True  # under another name
        if isinstance(node, ast.Tuple | ast.Compare | ast.Slice):
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
            return True  # of a length that is cut alike
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            return name in _SHAPING
    return False
