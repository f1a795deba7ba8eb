"""Activations that are computed again in the backward pass instead of kept: modules by their names.

    kept          forward: x -> [a b c d] -> y          backward: needs a b c d, which wait since the forward
    recomputed    forward: x -> ......... -> y          backward: x -> [a b c d], then as above

Only the inputs of such a module stay (Chen et al. 2016, https://arxiv.org/abs/1604.06174). The second forward is the
first one again: torch's generators are set back for it, our dropouts draw by the sample and the number of their call,
autocast is as it was, and buffers (the running statistics of a batch norm) are left as the first forward left them.
Collectives inside run again, on all ranks of their axis alike; what comes after the last tensor that the backward
needs is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridpar.pipeline.budget import Budget
from hybridpar.pipeline.skip import Pop, Stash
from hybridpar.tensor.gates import KINDS
from hybridpar.tensor.patterns import fits
from hybridpar.tensor.recurrent import Recurrent

Hook = Callable[..., Any]


@dataclass
class Switch:
    """Which blocks are recomputed, where that is known only when they have been watched: `watch(name, inputs, run)`
    runs one for as long as there is a `watch`."""

    names: frozenset[str] = frozenset()
    watch: Callable[[str, Any, Callable[[], Any]], Any] | None = None


def switched(module: nn.Module, stages: int = 1) -> Switch:
    """Have every block of `module` that can be recomputed ask the returned switch whether it is.

    Example:
        >>> layers = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4))
        >>> switch = switched(layers)
        >>> switch.names = frozenset(["0"])
    """
    switch = Switch()
    for name in blocks(module):
        child = module.get_submodule(name)
        try:
            _check(child, name, stages)
        except ValueError:
            continue  # it stays as it is, and what it leaves is counted
        _install(child, name, switch)
    return switch


def recomputed(module: nn.Module, wish: str | Sequence[str] | None, stages: int = 1) -> tuple[str, ...]:
    """Have the modules in `module` that `wish` names computed again in the backward pass; returns their names.

    `wish` is "full" for every block (`blocks`), a pattern, or several; in a pattern a `*` stands for one component of a
    dotted name, or a part of one. To be called when the module has been cut over the tensor axis, and before it is cut
    into `stages`.

    Raises ValueError for a pattern that matches nothing, one module inside another, and what cannot be repeated.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        >>> recomputed(nn.ModuleDict({"layers": layers}), "full")
        ('layers.0', 'layers.1')
    """
    names = chosen(module, wish)
    for name in names:
        child = module.get_submodule(name)
        _check(child, name, stages)
        _install(child, name, Switch(frozenset([name])))
    return names


def chosen(module: nn.Module, wish: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the modules that `wish` means; the plain module gives the same answer as the one cut."""
    if wish is None:
        return ()
    if wish == "full":
        names = blocks(module)
        if not names:
            raise ValueError(
                f'recompute="full" finds no blocks in {type(module).__name__}: no child of a ModuleList or Sequential '
                'has parts of its own; name modules instead, as recompute="encoder" or ["encoder", "decoder.*"]'
            )
        return names
    patterns = [wish] if isinstance(wish, str) else wish
    if isinstance(patterns, int | float) or not all(isinstance(one, str) for one in patterns):
        raise ValueError(f'recompute={wish!r}: give "full", a pattern such as "blocks.*.mlp", or a list of patterns')
    return _matched(dict(module.named_modules()), patterns)


def kind(wish: str | Sequence[str] | Budget | None) -> str:
    """Which of `support.RECOMPUTE` a wish is.

    Example:
        >>> kind("full"), kind("blocks.*.mlp"), kind(None)
        ('full', 'selective', 'none')
    """
    return "none" if wish is None else "full" if wish == "full" else "selective"


def blocks(module: nn.Module, name: str = "") -> tuple[str, ...]:
    """The outermost children of a ModuleList or Sequential that have parts of their own.

    Example:
        >>> from hybridpar.models.gpt import GPT
        >>> blocks(GPT(vocabulary=10, width=8, depth=2, heads=2, context=4))
        ('blocks.0', 'blocks.1')
    """
    found: list[str] = []
    for leaf, child in module.named_children():
        path = f"{name}.{leaf}" if name else leaf
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, nn.ModuleList)
        whole = listed and any(child.children()) and any(True for _ in child.parameters())
        found += [path] if whole else blocks(child, path)
    return tuple(found)


def _matched(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in modules if name and fits(pattern, name)]
        if not names:
            near = get_close_matches(pattern, list(modules), n=3, cutoff=0.3) or list(modules)[1:4]
            raise ValueError(f'recompute: "{pattern}" matches no module; the nearest are {", ".join(near)}')
        found |= dict.fromkeys(names)
    for name in found:
        around = next((other for other in found if name.startswith(f"{other}.")), None)
        if around is not None:
            raise ValueError(f"recompute: {name} is inside {around}, which is recomputed as a whole; name one of them")
    return tuple(found)


def _check(child: nn.Module, name: str, stages: int) -> None:
    """Raise ValueError for what cannot be computed twice."""
    for local, part in child.named_modules():
        full = f"{name}.{local}" if local else name
        if isinstance(part, Stash | Pop):
            raise ValueError(f"recompute: {full} is an end of a skip connection; recompute modules that hold none")
        if part._compiled_call_impl is not None:
            raise ValueError(f"recompute: {full} is compiled; leave it uncompiled, or name modules without it")
    if isinstance(child, (Recurrent, *KINDS)) and child.num_layers > 1 and stages > 1:
        raise ValueError(
            f"recompute: {name} is a recurrence of {child.num_layers} layers, which {stages} stages take apart; leave "
            "it out, or use pipeline=1"
        )


def _install(child: nn.Module, name: str, switch: Switch) -> None:
    """Put a checkpoint around the forward of `child` and around our hooks, which hold what its masks depend on."""
    first = vars(child).get("forward")
    inner = type(child).forward if first is None else first.__func__ if isinstance(first, MethodType) else first
    bound = first is None or isinstance(first, MethodType)
    before = _ours(child._forward_pre_hooks, child._forward_pre_hooks_with_kwargs)
    after = _ours(child._forward_hooks, child._forward_hooks_with_kwargs)
    # A method, so that a stage's copy of the module is given one of its own.
    child.forward = MethodType(_Recomputed(inner, bound, before, after, name, switch), child)


def _ours(hooks: dict[int, Hook], changing: Mapping[int, bool]) -> list[Hook]:
    """The hooks that hybridpar has registered, taken out of `hooks`; the user's stay outside and run once, as do those
    of `changing`, which change what the module is given."""
    ours = [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("hybridpar.")]
    mine = [key for key in ours if key not in changing]
    return [hooks.pop(key) for key in mine]


class _Recomputed:
    """The forward of a module: once, or in training and if the switch says so with the promise to do it again."""

    def __init__(
        self, inner: Hook, bound: bool, before: Sequence[Hook], after: Sequence[Hook], name: str, switch: Switch
    ) -> None:
        self._inner, self._bound, self._before, self._after = inner, bound, before, after
        self._name, self._switch = name, switch

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._switch.watch is not None:
            return self._switch.watch(self._name, (args, kwargs), lambda: self._run(module, *args, **kwargs))
        if not torch.is_grad_enabled() or self._name not in self._switch.names:
            return self._run(module, *args, **kwargs)
        around = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _unmoved(module))}
        return checkpoint(self._run, module, *args, **around, **kwargs)

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for hook in self._before:
            hook(module, args)
        output = None
        try:
            output = self._inner(module, *args, **kwargs) if self._bound else self._inner(*args, **kwargs)
        finally:  # a recomputation ends by an exception when nothing more is needed
            for hook in self._after:
                hook(module, args, output)
        return output


@contextmanager
def _unmoved(module: nn.Module) -> Iterator[None]:
    """Leave the buffers of `module` as they are now."""
    held = [(part, *item) for part in module.modules() for item in part._buffers.items()]
    kept = [(part, name, x, x.clone()) for part, name, x in held if x is not None]
    try:
        yield
    finally:
        for part, name, x, before in kept:
            x.data.copy_(before)  # not seen by autograd, which may have kept the buffer for another backward
            part._buffers[name] = x
