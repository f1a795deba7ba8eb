"""A user's hooks on modules that a plan puts others in the place of: they would be lost, or see a part only.

    a hook on the module            nn.Module.register_forward_hook and its kin, nn.utils.weight_norm
    a hook on its parameter         Tensor.register_hook, register_post_accumulate_grad_hook

A derived plan leaves such a module whole; one by hand that cuts it is refused. hybridpar's own hooks do not count.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

_ON_MODULES: Mapping[str, str] = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_ON_PARAMETERS: Mapping[str, str] = {"_backward_hooks": "hook", "_post_accumulate_grad_hooks": "hook"}
_REPLACING = (
    *("column", "row", "packed column", "gathered", "vocabulary", "sequence", "hidden dropout", "recurrent"),
    *("conv column", "conv row", "conv groups", "conv norm"),
)


def on(module: nn.Module) -> str | None:
    """What of the user's hangs on `module` or on its own parameters, in words; None where nothing does.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> on(layer), layer.weight.register_hook(print) and on(layer)
        (None, 'a hook on its weight (print)')
    """
    for where, kind in _ON_MODULES.items():
        if (name := _first(getattr(module, where))) is not None:
            return f"a {kind} ({name})"
    for leaf, parameter in module.named_parameters(recurse=False):
        for where, kind in _ON_PARAMETERS.items():
            if (name := _first(getattr(parameter, where, None))) is not None:
                return f"a {kind} on its {leaf} ({name})"
    return None


def inside(module: nn.Module) -> str | None:
    """The same for everything below `module`, whose own hooks see what they always saw."""
    for name, child in module.named_modules():
        if name and (found := on(child)) is not None:
            return f"{found} at its {name}"
    return None


def heed(modules: Mapping[str, nn.Module], styles: Mapping[str, str], size: int) -> dict[str, str]:
    """`styles`, to be cut over `size` indices; on one, what has a hook is left as it is.

    ValueError for a module with a hook that would be cut.
    """
    kept = dict(styles)
    for name, style in styles.items():
        among = style in ("attention", "heads")
        look = inside if among else on
        if not among and style not in _REPLACING or (found := look(modules[name])) is None:
            continue
        if size > 1:
            raise ValueError(
                f'{name} has {found}, and style "{style}" puts a layer in its place that has only a part: give it '
                f'the style "whole" (with the layers that it is paired with), or register the hook on a module around'
            )
        kept[name] = "whole"
    return kept


def carry(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, which computes the same as `old` of the same inputs, with the hooks of `old`."""
    for where in (*_ON_MODULES, "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(new, where).update(getattr(old, where))
    new._forward_pre_hooks_with_kwargs.update(old._forward_pre_hooks_with_kwargs)
    new._is_full_backward_hook = old._is_full_backward_hook
    return new


def _first(hooks: Mapping[int, Any] | None) -> str | None:
    """The name of the first hook that is not hybridpar's own."""
    for hook in (hooks or {}).values():
        while isinstance(hook, functools.partial):
            hook = hook.func
        named = hook if hasattr(hook, "__qualname__") else type(hook)
        if not str(named.__module__).startswith(f"{__name__.partition('.')[0]}."):
            return named.__qualname__
    return None
