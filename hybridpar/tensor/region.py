"""A region: a module whose forward runs on tensors that are cut by rows, as if they were whole.

    split -> the module's own forward, every torch function of which is looked up in RULES -> gather

Inside, a tensor is *cut* (it carries `Rows`: which dim, how long the whole is; `balanced` says what is here) or
*whole*. A cut tensor pretends to be the whole one: its shape is the whole's, a convolution fetches its halo, a norm
has the statistics of all rows. What has no rule is refused by the names of the function and of the module.

Parameters are whole on each index, and see its rows only; so all gradients inside are shares (`rows.total` says how).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybridpar.shard import Range, balanced
from hybridpar.tensor import collectives
from hybridpar.tensor.rows import speak
from hybridpar.wires.axis import Axis

_MARK = "_hybridpar_rows"


@dataclass(frozen=True)
class Rows:
    """A tensor is cut along `dim`, counted from the end (so that it survives broadcasting), and has `length` rows."""

    dim: int
    length: int


Rule = Callable[["Region", Callable[..., Any], tuple, dict[str, Any]], Any]


class Region(TorchFunctionMode):
    """Runs the forward of `module` on rows; `rules` tell for each function's name what it does with cut tensors.

    Example:
        >>> region = Region(conv, Alone("tensor"), RULES, "stem")                             # doctest: +SKIP
        >>> region.run(conv, torch.ones(2, 1, 5, 5)).shape                                   # doctest: +SKIP
        torch.Size([2, 1, 5, 5])
    """

    def __init__(self, module: nn.Module, axis: Axis, rules: Mapping[str, Rule], name: str) -> None:
        super().__init__()
        self.axis, self.name = axis, name
        self._rules = rules
        self._inside: list[str] = []  # the names of the modules that are running
        self._running = self._asleep = False
        self._kept: set[int] = set()
        for local, child in module.named_modules():
            if child is not module:
                child.register_forward_pre_hook(self._enter(f"{name}.{local}" if name else local))
                child.register_forward_hook(self._left)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of the module, or of a stage's copy of it, for whole inputs on each index: those of as many dims
        as the first are cut along dim 2, the others are whole inside too."""
        first = next((x for x in _tensors((args, kwargs))), None)
        if first is None or first.dim() < 3:
            found = "no tensor" if first is None else f"one of shape {list(first.shape)}"
            raise ValueError(f'{self.name}: style "space" cuts inputs [b, c, rows, ..], and {found} came in')
        self._inside, self._running, self._asleep = [self.name], True, False
        self._kept = {id(x) for x in module.buffers()}
        args, kwargs = _mapped((args, kwargs), lambda x: self._come(x, first.dim()))
        try:
            with self:
                out = type(module).forward(module, *args, **kwargs)
        finally:
            self._inside, self._running = [], False
        return _mapped(out, self._leave)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._asleep:
            return func(*args, **kwargs)
        name = _name(func)
        cut = False
        for x in _tensors((args, kwargs)):
            cut = self.rows(x) is not None or cut
        if cut and name not in self._rules:
            self.refuse(f"torch's {name} of a tensor whose rows are cut")
        rule = self._rules[name] if cut else self._rules.get(f"whole {name}")
        if rule is None:
            return self.whole(func(*args, **kwargs))
        return rule(self, func, args, kwargs)

    # ---- what rules ask

    def rows(self, x: Any) -> Rows | None:
        """How `x` is cut; None if it is whole."""
        if not isinstance(x, Tensor):
            return None
        function = getattr(x.grad_fn, "_forward_cls", None)
        if function is not None and not function.__module__.startswith("hybridpar."):
            self.refuse(f"the autograd function {function.__name__}, whose backward would see the rows here only,")
        if hasattr(x, _MARK):
            return getattr(x, _MARK)
        if not isinstance(x, nn.Parameter) and id(x) not in self._kept and x.dim():
            made = type(x.grad_fn).__name__ if x.grad_fn is not None else "an attribute that is no buffer"
            self.refuse(f"a tensor of shape {list(x.shape)} whose origin is not seen ({made})")
        return None

    def held(self, rows: Rows) -> Range:
        """Which rows are here."""
        return balanced(rows.length, self.axis.size)[self.axis.index]

    def cut(self, out: Any, rows: Rows | None) -> Any:
        """Note that the tensors of `out` are cut so, or, where `rows` is None, that they are whole."""
        for x in _tensors(out):
            if not isinstance(x, nn.Parameter) and id(x) not in self._kept:
                setattr(x, _MARK, rows)
        return out

    def whole(self, out: Any) -> Any:
        """Note that the tensors of `out` are whole."""
        return self.cut(out, None)

    def same(self, values: Any) -> Rows:
        """How the cut ones among the tensors of `values` are cut, all alike."""
        found = {rows for rows in map(self.rows, _tensors(values)) if rows is not None}
        if len(found) != 1:
            told = " and ".join(f"{rows.length} rows along dim {rows.dim}" for rows in found)
            self.refuse(f"one function of tensors of {told}")
        return found.pop()

    def here(self, x: Any, rows: Rows) -> Any:
        """The part of a whole tensor `x` that meets the rows here by broadcasting; a cut one is returned."""
        if not isinstance(x, Tensor) or self.rows(x) is not None or x.dim() < -rows.dim or x.shape[rows.dim] == 1:
            return x
        if x.shape[rows.dim] != rows.length:
            self.refuse(f"a tensor of shape {list(x.shape)} beside one of {rows.length} rows along dim {rows.dim}")
        first, stop = self.held(rows)
        return x.narrow(rows.dim, first, stop - first)

    def refuse(self, what: str) -> NoReturn:
        """Raise, naming the module at hand."""
        at = self._inside[-1] if self._inside else self.name
        raise ValueError(
            f'{at or "the model itself"}: {what} is not known to style "space"; leave it out of the region'
        )

    def let(self, child: nn.Module, see: Callable[[Tensor, Rows | None], None]) -> None:
        """Let `child`, of one tensor, work on the rows here by itself; `see` is told its input and how that is cut.

        Its output is cut like its input.
        """
        found: list[Rows | None] = []

        def before(_: nn.Module, args: tuple) -> None:
            found.append(self.rows(args[0]))
            see(args[0], found[-1])
            self._asleep = True

        def after(_: nn.Module, args: tuple, out: Tensor) -> None:
            self._asleep = False
            self.cut(out, found.pop())

        child.register_forward_pre_hook(before)
        child.register_forward_hook(after)

    # ---- in and out

    def _come(self, x: Tensor, dims: int) -> Tensor:
        if x.dim() != dims:
            x = collectives.copy(x, self.axis)
            return self.cut(x.view_as(x), None)
        rows = Rows(2 - dims, x.shape[2])
        x = collectives.split(x, self.axis, 2)
        return self.cut(x.view_as(x), rows)  # a tensor of its own: the caller's keeps no mark

    def _leave(self, x: Tensor) -> Tensor:
        self._inside = [self.name]
        rows = self.rows(x)
        return speak(x, self.axis) if rows is None else collectives.gather(x, self.axis, rows.dim)

    def _left(self, *_: Any) -> None:
        self._inside.pop()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if not self._running:
                raise ValueError(
                    f'{name} was called outside of the region {self.name}, whose style is "space": checkpoint the '
                    f"region as a whole, and call its parts through it only"
                )
            self._inside.append(name)

        return enter


def _name(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _tensors(value: Any) -> Iterable[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        parts = [_mapped(one, change) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return value
