"""Which linear layers of a module are a column and a row layer with only elementwise work between them.

No names are needed: candidates are layers whose sizes fit, and the module's code decides (`flow`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from hybridpar.tensor.derive.flow import CUT, WHOLE, Flow, elementwise
from hybridpar.tensor.derive.source import Unsure
from hybridpar.tensor.linear import features


@dataclass(frozen=True)
class Pair:
    """The styles of a module's layers by path, with the dropouts between them, and how many features are cut."""

    styles: dict[str, str] = field(default_factory=dict)
    features: int = 0


def linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(input, output features) of the children that a column or row layer can take the place of."""
    found = {}
    for name, child in module.named_children():
        try:
            found[name] = features(child, "column", name)[:2]
        except ValueError:
            continue
    return found


def pair(module: nn.Module) -> Pair | None:
    """The column and row layers among the children of `module`; None where no sizes fit. Unsure with a reason.

    Example:
        >>> pair(LlamaMLP(config)).styles                                     # doctest: +SKIP
        {'gate_proj': 'column', 'up_proj': 'column', 'down_proj': 'row'}
    """
    if type(module) is nn.Sequential:
        return _chain(module)
    reason = None
    for candidate, length in _candidates(module):
        try:
            flow = Flow(module, candidate)
            if flow.run() is not WHOLE:
                raise Unsure("its forward returns what is cut")
        except Unsure as found:
            reason = reason or found
            continue
        return Pair(candidate | dict.fromkeys(flow.dropouts, "hidden dropout"), length)
    if reason is not None:
        raise reason
    return None


def _chain(module: nn.Sequential) -> Pair | None:
    """In a chain, each linear layer and the next one with only elementwise work between them."""
    styles, lengths, children, sizes = {}, [], dict(module.named_children()), linears(module)
    waiting: str | None = None  # a layer that could be a column layer, and the dropouts since then
    dropouts: list[str] = []
    for name, child in children.items():
        if name in sizes and waiting is not None:
            styles |= {waiting: "column", name: "row"} | dict.fromkeys(dropouts, "hidden dropout")
            lengths.append(sizes[name][0])
            waiting = None
        elif name in sizes:
            waiting, dropouts = name, []
        elif isinstance(child, nn.Dropout):
            dropouts.append(name)
        elif not elementwise(child):
            waiting = None
    # "hidden dropout" takes its cut from the column layers beside it, which must be cut alike.
    alike = len({sizes[name][1] for name, style in styles.items() if style == "column"}) == 1
    if not styles or not alike and "hidden dropout" in styles.values():
        return None
    return Pair(styles, min(lengths))


def _candidates(module: nn.Module) -> Iterator[tuple[dict[str, str], int]]:
    """Styles that fit the sizes, likelier ones first, with the number of features between the layers."""
    sizes = linears(module)
    for row, (length, _) in reversed(sizes.items()):  # the row layer is mostly the last
        columns = [name for name, (_, out) in sizes.items() if name != row and out == length]
        if columns:
            yield dict.fromkeys(columns, "column") | {row: "row"}, length
        for name in columns if len(columns) > 1 else ():
            yield {name: "column", row: "row"}, length
        for name, (_, out) in sizes.items():
            if name != row and out == 2 * length:
                yield {name: "packed column", row: "row"}, length


def beside(module: nn.Module) -> Pair | None:
    """The layers of `intermediate.dense` and `output.dense` (BERT and its kin); None where they are not there."""
    first, second = getattr(module, "intermediate", None), getattr(module, "output", None)
    if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
        return None
    up, down = linears(first).get("dense"), linears(second).get("dense")
    if up is None or down is None:
        return None
    if up[1] != down[0]:
        raise Unsure(f"intermediate gives {up[1]} features and output takes {down[0]}")
    if Flow(first, {"dense": "column"}).run() is not CUT:
        raise Unsure("what intermediate gives is not cut")
    last = Flow(second, {"dense": "row"})
    if last.run(CUT) is not WHOLE or last.dropouts:
        raise Unsure("output does not begin with its dense layer")
    if Flow(module, {"intermediate": "column", "output": "row"}).run() is not WHOLE:
        raise Unsure("output does not take what intermediate gives")
    return Pair({"intermediate.dense": "column", "output.dense": "row"}, up[1])
