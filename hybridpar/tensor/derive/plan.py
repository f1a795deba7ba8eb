"""`derive`: a tensor plan for a module that brings none, from its code and its sizes; what is not sure stays whole.

    attention       "heads"                      where `attention.recognised` knows all that its forward reads
    two layers      "column" and "row"           where `flow` finds elementwise work between them only
    vocabulary      "vocabulary" and "gathered"  embedding and head, both or none if they share a weight
    recurrence      "recurrent"                  nn.LSTM, nn.GRU and nn.RNN as torch makes them
    all the rest    "whole", with a reason if it is an attention, a pair of layers or a vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hybridpar.tensor import hooks
from hybridpar.tensor.derive import attention, mlp
from hybridpar.tensor.derive.flow import elementwise
from hybridpar.tensor.derive.functional import draws
from hybridpar.tensor.derive.source import Unsure
from hybridpar.tensor.derive.taken import taken
from hybridpar.tensor.derive.vocabulary import vocabulary
from hybridpar.tensor.gates import checked


@dataclass(frozen=True)
class Derived(Mapping[str, str]):
    """A tensor plan {pattern: style}.

    `reasons` are (pattern, why it stays whole) and `draws` (pattern, what it draws from torch's generator).
    """

    plan: Mapping[str, str]
    reasons: tuple[tuple[str, str], ...] = ()
    draws: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, pattern: str) -> str:
        return self.plan[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)

    def __str__(self) -> str:
        """The plan as a table, and the reasons below it."""
        wide = max(map(len, self.plan), default=0)
        lines = [f"{pattern:{wide}}  {style}" for pattern, style in self.plan.items() if style != "whole"]
        lines += [f"whole: {pattern} ({reason})" for pattern, reason in self.reasons]
        return "\n".join([*lines, *(f"random: {pattern} {reason}" for pattern, reason in self.draws)])


@dataclass
class _Found:
    """What has been decided so far."""

    styles: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)  # why each must be whole, of what code around it reads

    def whole(self, name: str, reason: object) -> None:
        self.reasons.setdefault(name, str(reason))


def derive(module: nn.Module, tensor: int = 1, logits: str = "gathered") -> Derived:
    """A plan that cuts what is sure to be right over `tensor` ranks; the rest is "whole".

    `logits` is the style of heads over the vocabulary: "gathered" gives whole logits, which the model may go on with;
    "column" leaves them cut, for `hp.CrossEntropy` on logits that nothing else reads. The module may be on the meta
    device and is not changed.

    Example:
        >>> class Up(nn.Module):                                              # doctest: +SKIP
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)
        ...     def forward(self, x):
        ...         return self.down(self.up(x).relu())
        >>> dict(derive(Up()))                                                # doctest: +SKIP
        {'up': 'column', 'down': 'row'}
    """
    found = _Found(taken=taken(module))
    _vocabulary(module, tensor, logits, found)
    _blocks(module, "", tensor, found)
    _recurrences(module, tensor, found)
    _rest(module, found)
    return Derived(_patterns(found.styles, module), _grouped(found.reasons), _grouped(dict(draws(module))))


def _vocabulary(module: nn.Module, tensor: int, logits: str, found: _Found) -> None:
    for styles, entries, reason in vocabulary(module, logits):
        if reason is None and entries < tensor:
            reason = f"a vocabulary of {entries} cannot be cut over tensor={tensor}"
        for name in styles:
            reason = reason or found.taken.get(name) or _hooked(hooks.on(module.get_submodule(name)))
        found.styles |= dict.fromkeys(styles, "whole") if reason else styles
        if reason:
            found.whole(next(iter(styles)), reason)


def _blocks(module: nn.Module, name: str, tensor: int, found: _Found) -> None:
    """Decide about `module` and all that is inside it."""
    if attention.looks(module):
        _attention(module, name, tensor, found)
        return
    for look in (mlp.pair, mlp.beside):
        try:
            pair = look(module)
        except Unsure as reason:
            found.whole(name, reason)
            continue
        if pair is None or any(_join(name, where) in found.styles for where in pair.styles):
            continue
        if pair.features < tensor:
            found.whole(name, f"{pair.features} features cannot be cut over tensor={tensor}")
        elif reason := _held(module, name, pair.styles, found):
            found.whole(name, reason)
        else:
            found.styles |= {_join(name, where): style for where, style in pair.styles.items()}
    for leaf, child in module.named_children():
        _blocks(child, _join(name, leaf), tensor, found)


def _held(module: nn.Module, name: str, styles: Mapping[str, str], found: _Found) -> str | None:
    """Why the layers of a pair must be whole: the code around takes their weights, or a hook would see a part."""
    for where in styles:
        if reason := found.taken.get(_join(name, where)):
            return f"{where}: {reason}"
    between = [leaf for leaf, child in module.named_children() if elementwise(child)]
    around = dict.fromkeys(where.rpartition(".")[0] for where in styles if "." in where)
    for where in [*styles, *around, *between]:
        if reason := _hooked(hooks.on(module.get_submodule(where))):
            return f"{where}: {reason}"
    return None


def _hooked(hook: str | None) -> str | None:
    return hook and f"it has {hook}, which would see a part"


def _attention(module: nn.Module, name: str, tensor: int, found: _Found) -> None:
    try:
        heads = attention.recognised(module)
        if heads.heads < tensor:
            raise Unsure(f"{heads.heads} heads cannot be cut over tensor={tensor}")
        reasons = [found.taken.get(_join(name, where)) for where, _ in module.named_modules() if where]
        if reason := next(filter(None, reasons), None) or _hooked(hooks.inside(module)):
            raise Unsure(reason)
    except Unsure as reason:
        found.whole(name, reason)
        return
    found.styles[name] = "heads"
    found.styles |= {_join(name, where): "partial" for where in heads.partial}


def _recurrences(module: nn.Module, tensor: int, found: _Found) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.RNNBase) and name and name not in found.styles:
            try:
                checked(child, tensor, name)
            except ValueError as reason:
                found.whole(name, reason)
            else:
                reason = found.taken.get(name) or _hooked(hooks.on(child))
                found.styles[name] = "whole" if reason else "recurrent"
                if reason:
                    found.whole(name, reason)


def _rest(module: nn.Module, found: _Found) -> None:
    """Everything else is whole; dropouts are named where another style is around them or beside them."""
    heads = tuple(f"{name}." for name, style in found.styles.items() if style == "heads")
    for name, child in module.named_modules():
        if not name or name in found.styles or name.startswith(heads):
            continue
        if isinstance(child, nn.Dropout):
            found.styles[name] = "dropout"
        elif any(True for _ in child.parameters(recurse=False)):
            found.styles[name] = "whole"
            if not any(n in found.reasons for n in _around(name)) and (reason := _unpaired(child)):
                found.whole(name, found.reasons.get("", reason) if "." not in name else reason)
    found.reasons.pop("", None)  # those of the module itself have gone to its layers


def _unpaired(module: nn.Module) -> str | None:
    """Why a module with matrices stays whole; None where it has none."""
    sizes = {name: [length for length in p.shape if length > 1] for name, p in module.named_parameters(recurse=False)}
    name = max(sizes, key=lambda name: len(sizes[name]))
    if len(sizes[name]) < 2:
        return None
    if isinstance(module, nn.Embedding):
        return "an embedding that is not the model's vocabulary"
    if isinstance(module, _ConvNd):
        return 'a convolution is cut by a plan by hand: "conv column" and "conv row", or "space"'
    if len(sizes[name]) > 2:
        return f"{type(module).__name__} holds several matrices in its {name} (experts, say)"
    if not isinstance(module, nn.Linear) and not type(module).__module__.startswith("torch."):
        return f"what {type(module).__name__} does with its {name} is not known"
    return "no other layer goes with it as column and row"


def _around(name: str) -> Iterator[str]:
    """The names of a module and of those around it."""
    while name:  # the module itself is not asked
        yield name
        name = name.rpartition(".")[0]


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _patterns(styles: Mapping[str, str], module: nn.Module) -> dict[str, str]:
    """One pattern for the same module of all blocks, where they are treated alike."""
    everything = [name for name, _ in module.named_modules(remove_duplicate=False)]
    plan: dict[str, str] = {}
    kinds: dict[str, set[str | None]] = {}
    for name in everything:
        kinds.setdefault(_starred(name), set()).add(styles.get(name))
    for name, style in styles.items():
        alike = kinds.get(_starred(name)) == {style}
        plan[_starred(name) if alike else name] = style
    return plan


def _grouped(reasons: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The same reason for the same module of all blocks once."""
    return tuple(dict.fromkeys((_starred(name), reason) for name, reason in reasons.items()))
