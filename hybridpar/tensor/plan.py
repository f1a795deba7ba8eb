"""Plans for tensor parallelism: which module is cut how, as data.

    {"embed.token": "vocabulary", "blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row", ...}

    style             the module becomes                           input -> output, under sequence parallelism
    column            ColumnLinear                                 piece of the tokens -> all tokens, own features
    row               RowLinear                                    all tokens, own features -> piece of the tokens
    packed column     ColumnLinear, of each half of the outputs    all tokens -> all tokens, own features of each half
    gathered          WholeLinear                                  all tokens -> all tokens, all features
    vocabulary        VocabularyEmbedding                          all ids -> piece of the tokens
    sequence          SequenceEmbedding                            all ids -> piece of the tokens
    attention         itself, with this index's heads              piece of the tokens -> piece of the tokens
    heads             the same for code of other people            all tokens -> all tokens
    norm              itself                                       piece of the tokens -> piece of the tokens
    dropout           Dropout                                      piece of the tokens -> piece of the tokens
    hidden dropout    Dropout between column and row layer         own features -> own features
    partial           itself, on this index's heads or features    own part -> own part
    whole             itself                                       all tokens -> all tokens
    conv column, conv row, conv groups, conv norm                  the same for channels: see `conv`, `channels`
    space             itself, and all below it, on rows            all rows -> all rows: see `space`

A `*` stands for one component of a dotted name, or a part of one; the first pattern that fits a module counts.
"heads" and "gathered" do not go with sequence parallelism. Modules without an entry stay as they are and are reported;
but every nn.Dropout, and every call of F.dropout, becomes one whose masks do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from hybridpar.seeds import Draw
from hybridpar.shard import Spec
from hybridpar.tensor import attention, channels, heads, hooks, norm, space
from hybridpar.tensor.derive.plan import Derived
from hybridpar.tensor.dropout import Dropout, restart
from hybridpar.tensor.functional import mask_calls
from hybridpar.tensor.patterns import around, beside, matched
from hybridpar.tensor.sequence import Sequence
from hybridpar.tensor.styles import Channels, Layer, Site, build
from hybridpar.wires.axis import Axis


@dataclass(frozen=True)
class Applied:
    """What became of a module.

    `specs` has every parameter once, by its global name; `tied` gives for each other name of a tied parameter the one
    it has in `specs`. `replicated` lists (module, reason) for what the plan does not speak of. `columns` are the specs
    of the column layers' weights by layer, and `called` names the cut layer that was called last (at first, before any
    call, the one registered last): modules need not be registered in the order in which they are called. `buffers` has
    the specs of those buffers that are cut.
    """

    specs: dict[str, Spec]
    tied: dict[str, str] = field(default_factory=dict)
    replicated: tuple[tuple[str, str], ...] = ()
    columns: Mapping[str, Spec] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    buffers: Mapping[str, Spec] = field(default_factory=dict)

    @property
    def logits(self) -> Spec | None:
        """The spec of the weight of the cut layer called last, where that is a column layer.

        If the module's output comes from it, it is cut along its last dim as `logits.parts`.
        """
        return self.columns.get(self.called[0]) if self.called else None


def apply(
    module: nn.Module,
    plan: Mapping[str, str],
    axis: Axis,
    draw: Draw,
    sequence: bool = False,
    names: Mapping[str, str] | None = None,
) -> Applied:
    """Cut `module` in place by `plan`; every rank of `axis` calls it with the same whole module.

    With `names`, `module` is a part of a model: {prefix in it: prefix in the model}. Patterns and results speak of the
    model's names, and a pattern may match nothing here. Tied parameters stay one object and must be cut alike.
    ValueError for a pattern that matches nothing, an unknown style, and what cannot be cut.

    Example:
        >>> model = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
        >>> applied = apply(model, {"up": "column", "down": "row"}, Alone("tensor"), Draw(seed=0))
        >>> applied.specs["down.weight"].dim
        1
    """
    rename = _renamer(names or {})
    modules = {rename(name): (name, child) for name, child in module.named_modules(remove_duplicate=False)}
    styles = matched(plan, list(modules), everything=names is None)
    children = {name: child for name, (_, child) in modules.items()}
    styles = hooks.heed(children, styles, axis.size)
    styles |= heads.inside(children, styles)
    _refuse(children, styles, sequence)
    ties = _ties(module)
    mask_calls(children, styles, axis, draw)
    _replace(module, modules, styles, axis, draw, Sequence(axis, draw) if sequence else None)
    specs = _specs(module, styles, rename, sequence)
    tied = _tie(module, ties, specs, rename)
    found = {name: specs[f"{name}.weight"] for name, style in styles.items() if style == "column"}
    columns = {name: spec for name, spec in found.items() if spec.dim == 0}
    called = _watch({name: module.get_submodule(modules[name][0]) for name in styles}, styles)
    specs = {name: spec for name, spec in specs.items() if name not in tied}
    told = (*plan.reasons, *plan.draws) if isinstance(plan, Derived) else ()
    replicated = (*_replicated(module, styles, rename), *told)
    return Applied(specs, tied, replicated, columns, called, _buffers(module, rename))


def _replace(
    root: nn.Module,
    modules: Mapping[str, tuple[str, nn.Module]],
    styles: Mapping[str, str],
    axis: Axis,
    draw: Draw,
    tokens: Sequence | None,
) -> None:
    """Put the replacements of `modules`, {global name: (local name, module)}, in their places."""
    done: dict[int, nn.Module] = {}  # a module with two places has one replacement
    for name in sorted(modules, key=lambda n: "dropout" in (styles.get(n) or "dropout")):  # hidden ones ask columns
        local, child = modules[name]
        above, _, leaf = local.rpartition(".")
        parent = root.get_submodule(above)
        if not local and styles.get(name) == "space":
            space.shard(child, axis, name, draw)
        if not local or getattr(parent, leaf) is not child:
            continue  # the root, or its parent has dealt with it
        if id(child) not in done:
            done[id(child)] = build(styles.get(name), Site(name, child, parent, axis, draw, tokens))
        setattr(parent, leaf, done[id(child)])
    for parent in root.modules():
        if any(isinstance(child, Dropout) for child in parent.children()):
            parent.register_forward_pre_hook(restart)


def _renamer(names: Mapping[str, str]) -> Callable[[str], str]:
    """From names in the part to names in the model: the longest prefix counts."""

    def rename(name: str) -> str:
        head, tail = name, ""
        while head and head not in names:
            head, _, last = head.rpartition(".")
            tail = f"{last}.{tail}" if tail else last
        return ".".join(filter(None, (names.get(head, head), tail)))

    return rename


def _refuse(modules: Mapping[str, nn.Module], styles: Mapping[str, str], sequence: bool) -> None:
    """ValueError for modules of which only the plan can say what they see, and it does not."""
    for name, child in modules.items():
        masks = isinstance(child, nn.Dropout) and child.p > 0
        weights = any(True for _ in child.parameters(recurse=False))
        above = around(name, styles)
        if styles.get(name) == "attention":
            attention.protocol(child, name)
        _refuse_among_channels(name, child, styles)
        if not masks and not weights or name in styles and not (above == "attention" and weights):
            continue
        if above == "attention":
            if name.rpartition(".")[2] not in attention.CHILDREN or name in styles:
                raise ValueError(
                    f"{name} is inside an attention that is cut by heads, and only {', '.join(attention.CHILDREN)} are "
                    f'known there: give it the style "partial" if it sees the heads, else "norm" or "dropout"'
                )
        elif above is None and sequence:
            raise ValueError(
                f"{name or 'the model itself'} has no entry in the tensor plan, which under sequence parallelism must "
                f'say what it sees: "norm" or "dropout" for a piece of the tokens, "whole" for all of them'
            )
        elif above is None and {"column", "row"} <= beside(styles, name):
            between = "hidden dropout" if masks else "partial"
            raise ValueError(
                f"{name} has no entry in the tensor plan and stands beside a column and a row layer: it is "
                f'"{between}" if it works between them, else "{"dropout" if masks else "norm"}"'
            )


def _refuse_among_channels(name: str, child: nn.Module, styles: Mapping[str, str]) -> None:
    """The same where channels or rows are cut: what has the wrong number of channels is found when it is called."""
    if name in styles:
        if name and around(name.rpartition(".")[0], styles) == "space" and styles[name] != "dropout":
            raise ValueError(f'{name} has the style "{styles[name]}" inside of a module of style "space": leave it out')
        return
    masks = isinstance(child, nn.Dropout | Channels) and child.p > 0
    shared = isinstance(child, nn.PReLU) and child.num_parameters == 1
    if (masks or shared) and {"conv column", "conv row"} <= beside(styles, name):
        between, after = ("hidden dropout", "dropout") if masks else ("partial", "whole")
        raise ValueError(
            f"{name} has no entry in the tensor plan and stands beside a column and a row convolution: it is "
            f'"{between}" if it works between them, else "{after}"'
        )
    if {"conv column", "conv row"} <= beside(styles, name):
        channels.guard(child, name)


def _ties(module: nn.Module) -> list[list[str]]:
    """The local names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _specs(
    module: nn.Module, styles: Mapping[str, str], rename: Callable[[str], str], sequence: bool
) -> dict[str, Spec]:
    """The spec of every parameter under each of its global names."""
    specs = {}
    for local, child in module.named_modules(remove_duplicate=False):
        name = rename(local)
        own = child.specs() if isinstance(child, Layer) else {}
        for leaf, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            whole = norm.spec(leaf, parameter, around(name, styles), sequence)
            spec = own.get(leaf, whole).renamed(name)
            specs[spec.name] = spec
    return specs


def _buffers(module: nn.Module, rename: Callable[[str], str]) -> dict[str, Spec]:
    """The spec of every buffer that is cut, under each of its global names."""
    specs = {}
    for local, child in module.named_modules(remove_duplicate=False):
        own = child.specs() if isinstance(child, Layer) else {}
        cut = (spec.renamed(rename(local)) for name, spec in own.items() if name in child._buffers)
        specs |= {spec.name: spec for spec in cut}
    return specs


def _tie(
    module: nn.Module, ties: list[list[str]], specs: Mapping[str, Spec], rename: Callable[[str], str]
) -> dict[str, str]:
    """Make each tied parameter one object again; returns {its other names: its first}."""
    tied = {}
    for first, *others in ties:
        parameter, spec = module.get_parameter(first), specs[_global(first, rename)]
        for other in others:
            name = _global(other, rename)
            if replace(specs[name], name=spec.name) != spec:
                raise ValueError(
                    f"{spec.name} and {name} are one parameter and the tensor plan cuts them differently; "
                    f"give both modules styles that go together (vocabulary and column, for one)"
                )
            above, _, leaf = other.rpartition(".")
            setattr(module.get_submodule(above), leaf, parameter)
            tied[name] = spec.name
    return tied


def _global(parameter: str, rename: Callable[[str], str]) -> str:
    above, _, leaf = parameter.rpartition(".")
    return ".".join(filter(None, (rename(above), leaf)))


def _replicated(
    module: nn.Module, styles: Mapping[str, str], rename: Callable[[str], str]
) -> tuple[tuple[str, str], ...]:
    """(module, reason) for what the plan does not speak of."""
    found = []
    for local, child in module.named_modules():
        name = rename(local) or "the model itself"
        if _draws(child):
            found.append((name, f"{type(child).__name__} draws from torch's generator: its masks depend on the layout"))
        elif around(rename(local), styles) is None and any(True for _ in child.parameters(recurse=False)):
            found.append((name, "no entry in the tensor plan"))
    return tuple(found)


def _draws(module: nn.Module) -> bool:
    """Whether a module of torch's draws numbers that no plan makes independent of the layout."""
    between = isinstance(module, nn.MultiheadAttention) or isinstance(module, nn.RNNBase) and module.num_layers > 1
    masks = isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout) and module.p > 0
    return masks or isinstance(module, nn.RReLU) or between and module.dropout > 0


def _watch(modules: Mapping[str, nn.Module], styles: Mapping[str, str]) -> list[str]:
    """The name of the cut layer called last, kept up to date by hooks; at first the one registered last."""
    cut = [name for name in modules if styles[name] in ("column", "row", "gathered", "attention", "heads")]
    called = cut[-1:]
    for name in cut:
        modules[name].register_forward_hook(lambda *_, name=name: called.__setitem__(0, name))
    return called
