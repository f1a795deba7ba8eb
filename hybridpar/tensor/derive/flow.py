"""Whether what lies between column and row layers works on each feature alone: a forward read statement by statement.

    y = self.down(self.act(self.gate(x)) * self.up(x))

A value is WHOLE, the same on every index, or CUT, features of this index, or HALVES of a packed projection before they
are taken apart. Column layers make CUT of WHOLE, row layers WHOLE of CUT; in between only what works on each element
is let through. Branches that this module never takes are passed over.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor, nn

from hybridpar.tensor.derive.source import Unsure, known, largest, method, parsed, path


class State(Enum):
    """What an index has of a value."""

    WHOLE = "whole"
    CUT = "cut"
    HALVES = "halves"


WHOLE, CUT, HALVES = State.WHOLE, State.CUT, State.HALVES
Value = State | tuple  # a tuple of values is one of Python's
_METHODS = {
    *("to", "float", "type", "type_as", "contiguous", "clamp", "clamp_", "pow", "relu", "square", "sigmoid", "tanh"),
}
_FUNCTIONS = {
    *("relu", "gelu", "silu", "tanh", "sigmoid", "dropout", "leaky_relu", "elu", "softplus", "mish", "hardswish"),
    *("clamp", "square", "pow", "abs", "quick_gelu", "relu6", "swish"),
}
_DESCRIBE = ("dtype", "device")
_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.Softmax2d, nn.MultiheadAttention, nn.RReLU, nn.Threshold)


class Flow:
    """Reads the forward of `module`, whose children `layers`, {path: "column" | "packed column" | "row"}, are cut.

    `dropouts` are then the children that draw masks for what is cut. Unsure where something else than a row layer, or
    than what works on each element, takes what is cut.

    Example:
        >>> Flow(mlp, {"up": "column", "down": "row"}).run()                  # doctest: +SKIP
        <State.WHOLE: 'whole'>
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, str]) -> None:
        self.module, self.layers = module, layers
        self.dropouts: set[str] = set()
        self.met: set[str] = set()  # of `layers`

    def run(self, *arguments: Value) -> Value:
        """What the forward returns for these arguments; those not given are whole."""
        forward = method(self.module, "forward")
        if forward is None:
            raise Unsure("its forward is not a plain method")
        result = self._call(parsed(forward), arguments, depth=0)
        missing = self.layers.keys() - self.met
        if missing:
            raise Unsure(f"its forward does not call {sorted(missing)[0]}")
        return result

    def _call(self, tree: ast.FunctionDef, arguments: tuple[Value, ...], depth: int) -> Value:
        if depth > 4:
            raise Unsure(f"{tree.name} calls itself")
        names = [a.arg for a in tree.args.args]
        env: dict[str, Value] = {name: WHOLE for name in [*names, *(a.arg for a in tree.args.kwonlyargs)]}
        env |= dict(zip(names[1:], arguments))
        return _Body(self, names[0], env, depth).block(tree.body)


class _Body:
    """One function's statements under one environment."""

    def __init__(self, flow: Flow, me: str, env: dict[str, Value], depth: int) -> None:
        self.flow, self.me, self.env, self.depth = flow, me, env, depth
        self.returned: Value = WHOLE

    def block(self, body: list[ast.stmt]) -> Value:
        for statement in body:
            self._statement(statement)
        return self.returned

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self._value(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            value = self._value(node.value) if node.value is not None else WHOLE
            if isinstance(node, ast.AugAssign):
                value = self._binary(node.op, node.target, self._value(_loaded(node.target)), node.value, value)
            self._assign(node.target, value)
        elif isinstance(node, ast.Return):
            value = WHOLE if node.value is None else self._value(node.value)
            self.returned = value if _cut(value) else self.returned
        elif isinstance(node, ast.If):
            self._branches(node)
        elif isinstance(node, ast.FunctionDef):
            raise Unsure("its forward defines a function")
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._statement(child)
                elif isinstance(child, ast.expr) and _cut(self._value(child)):
                    raise Unsure(f"what {ast.unparse(child)} does with the features is not known")

    def _branches(self, node: ast.If) -> None:
        test = known(node.test, self.flow.module, self.me)
        if test is None and _cut(self._value(node.test)):
            raise Unsure(f"it decides by {ast.unparse(node.test)}")
        before, ends = dict(self.env), []
        for taken, body in ((True, node.body), (False, node.orelse)):
            if test is None or test is taken:
                self.env = dict(before)
                self.block(body)
                ends.append(self.env)
        self.env = ends[0]
        for other in ends[1:]:
            for name in self.env.keys() | other.keys():
                mine, its = self.env.get(name, WHOLE), other.get(name, WHOLE)
                if mine != its and (_cut(mine) or _cut(its)):
                    raise Unsure(f"{name} is cut on one way through its forward only")
                self.env[name] = mine

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            values = value if isinstance(value, tuple) else (value,) * len(target.elts)
            if not isinstance(value, tuple) and _cut(value) or len(values) != len(target.elts):
                raise Unsure(f"{ast.unparse(target)} takes the features apart")
            for one, its in zip(target.elts, values):
                self._assign(one, its)
        elif _cut(value):
            raise Unsure(f"what is cut is kept in {ast.unparse(target)}")

    def _value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Name):
            return self.env.get(node.id, WHOLE)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.BinOp):
            return self._binary(node.op, node.left, self._value(node.left), node.right, self._value(node.right))
        if isinstance(node, ast.UnaryOp):
            return self._value(node.operand)
        if isinstance(node, ast.Tuple):
            return tuple(self._value(part) for part in node.elts)
        if isinstance(node, ast.Attribute) and node.attr in _DESCRIBE:
            return WHOLE
        if isinstance(node, ast.Attribute) and (path(node, self.me) or "").rpartition(".")[0] in self.flow.layers:
            raise Unsure(f"its forward takes {ast.unparse(node)} itself")
        if isinstance(node, ast.IfExp):
            test = known(node.test, self.flow.module, self.me)
            sides = (node.body,) * (test is not False) + (node.orelse,) * (test is not True)
            found = set(map(self._value, sides))
            if len(found) == 1:
                return found.pop()
            raise Unsure(f"what {ast.unparse(node)} gives is not known")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and _cut(self._value(child)):
                raise Unsure(f"what {ast.unparse(node)} does with the features is not known")
        return WHOLE

    def _called(self, node: ast.Call) -> Value:
        if getattr(node.func, "id", "") in ("isinstance", "hasattr"):
            return WHOLE
        mine, given = path(node.func, self.me), node.args
        if getattr(node.func, "id", "") == "apply_chunking_to_forward":  # of transformers: calls its first argument
            mine, given = path(node.args[0], self.me), node.args[3:]
        inputs = [self._value(a) for a in [*given, *(k.value for k in node.keywords)]]
        if mine is not None and mine in self.flow.layers:
            return self._layer(mine, inputs)
        if mine is not None:
            own = method(self.flow.module, mine)
            if own is not None:
                values = tuple(self._value(a) for a in given)
                if any(_cut(self._value(k.value)) for k in node.keywords):
                    raise Unsure(f"{mine} is given what is cut by keyword")
                return self.flow._call(parsed(own), values, self.depth + 1)
        if isinstance(node.func, ast.Attribute) and _cut(self._value(node.func.value)):
            return self._method(node, self._value(node.func.value))
        if not any(map(_cut, inputs)):
            return WHOLE
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "dropout" and mine is None and any(largest(a, self.flow.module) for a in ast.iter_child_nodes(node)):
            raise Unsure("a function drops features between the layers")
        first = inputs[0] is CUT and not any(map(_cut, inputs[1:]))
        if first and (name in _FUNCTIONS if mine is None else self._elementwise(mine)):
            return CUT
        raise Unsure(f"what {ast.unparse(node.func)} does with the features is not known")

    def _layer(self, name: str, inputs: list[Value]) -> Value:
        self.flow.met.add(name)
        style = self.flow.layers[name]
        if inputs[:1] != [CUT if style == "row" else WHOLE] or any(map(_cut, inputs[1:])):
            raise Unsure(f"{name} is not given what a {style} layer takes")
        return {"row": WHOLE, "column": CUT, "packed column": HALVES}[style]

    def _method(self, node: ast.Call, value: Value) -> Value:
        name = node.func.attr
        if value is HALVES and name == "chunk" and _literals(node) in ([2, -1], [2]) and _last(node):
            return (CUT, CUT)
        if value is CUT and name in _METHODS:
            return CUT
        raise Unsure(f"what .{name} does with the features is not known")

    def _elementwise(self, name: str) -> bool:
        """Whether the child or function under `name` works on each element alone."""
        found: Any = self.flow.module
        for part in name.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, nn.Module):
            return getattr(found, "__name__", "") in _FUNCTIONS
        if isinstance(found, nn.Dropout):
            self.flow.dropouts.add(name)
            return True
        return elementwise(found)

    def _binary(self, op: ast.operator, left: ast.expr, one: Value, right: ast.expr, other: Value) -> Value:
        if not _cut(one) and not _cut(other):
            return WHOLE
        sides = ((left, one), (right, other))
        same = one is CUT and other is CUT
        scaled = any(a is CUT and self._number(node) for (_, a), (node, _) in (sides, sides[::-1]))
        if isinstance(op, ast.Mult | ast.Add | ast.Sub | ast.Div | ast.Pow) and (same or scaled):
            return CUT
        raise Unsure(f"what {ast.unparse(left)} and {ast.unparse(right)} give together is not known")

    def _number(self, node: ast.expr) -> bool:
        """Whether an expression is a plain number."""
        if isinstance(node, ast.Constant):
            return True
        found: Any = self.flow.module
        for part in (path(node, self.me) or "?").split("."):
            found = getattr(found, part, None)
        return isinstance(found, int | float) or (isinstance(found, Tensor) and found.dim() == 0)


def elementwise(module: nn.Module) -> bool:
    """Whether a module works on each element alone, without weights and without masks."""
    home = type(module).__module__
    plain = isinstance(module, nn.Identity) or home in ("torch.nn.modules.activation", "transformers.activations")
    plain = plain or type(module).__name__ == "BloomGelu"
    return plain and not isinstance(module, _MIXING) and not any(True for _ in module.parameters())


def _cut(value: Value) -> bool:
    return any(map(_cut, value)) if isinstance(value, tuple) else value is not WHOLE


def _loaded(node: ast.expr) -> ast.expr:
    return ast.Name(node.id, ast.Load()) if isinstance(node, ast.Name) else node


def _literals(node: ast.Call) -> list[Any]:
    found = []
    for argument in [*node.args, *(k.value for k in node.keywords)]:
        try:
            found.append(ast.literal_eval(argument))
        except ValueError:
            return []
    return found


def _last(node: ast.Call) -> bool:
    """Whether a chunk names the last dim."""
    return len(_literals(node)) == 2
