"""Dropouts drawn by function calls, made independent of the layout: `F.dropout` and that inside fused attention.

A module's forward that calls them runs under a `TorchFunctionMode`, which draws their masks as `Dropout` does: from
(seed, module's name and number of the call, step, sample, global element). Fused attention with dropout is computed
from its definition, since its kernels make their own masks.

    inside an attention cut by heads    [b, h_tp, l, l]    cut along the heads
    anywhere else                       [b, ...]           whole
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hybridpar.seeds import Draw
from hybridpar.shard import Range
from hybridpar.tensor import heads
from hybridpar.tensor.derive.functional import dropping
from hybridpar.wires.axis import Axis


def mask_calls(modules: Mapping[str, nn.Module], styles: Mapping[str, str], axis: Axis, draw: Draw) -> None:
    """Make the dropouts that the code of `modules` draws by function calls independent of the layout.

    To be called before anything is cut by `styles`.
    """
    masks, done = Masks(draw), set()
    cut: dict[str, Range] = {}
    for name, child in modules.items():
        if styles.get(name) == "heads":
            held = heads.held(child, axis, name)
            cut |= {f"{name}.{path}" if path else name: span for path, span in held.items()}
        if id(child) not in done and dropping(child):
            masks.watch(child, name, cut.get(name))
        done.add(id(child))


class Masks:
    """The function calls of one model: which module is running, and the masks of what it drops.

    Example:
        >>> Masks(Draw(seed=0)).watch(layer, "layers.0")                      # doctest: +SKIP
    """

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._running: list[_Site] = []
        self._mode: _Mode | None = None

    def watch(self, module: nn.Module, name: str, held: Range | None = None) -> None:
        """Draw for `module` from now on; `held` are the heads that it has, where it is an attention cut by them."""
        module.register_forward_pre_hook(lambda *_: self._enter(_Site(name, held)))
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, site: _Site) -> None:
        if not self._running:
            self._mode = _Mode(self)
            self._mode.__enter__()
        self._running.append(site)

    def _leave(self) -> None:
        self._running.pop()
        if not self._running:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def drop(self, x: Tensor, p: float) -> Tensor:
        """`x` [b, ...] with elements dropped and the rest scaled, for the module that runs now."""
        samples = self._draw.samples
        if x.dim() == 2 and samples is not None and len(x) != len(samples) and len(x) % len(samples) == 0:
            return self.drop(x.unflatten(0, (len(samples), -1)), p).flatten(0, 1)  # OPT folds tokens into samples
        site = self._running[-1]
        name = f"{site.name}:call {site.calls}"
        site.calls += 1
        cut = site.heads is not None and x.dim() == 4 and x.shape[1] == site.heads[1] - site.heads[0]
        keep = self._draw.keep(name, x.shape, p, 1 if cut else None, (site.heads,) if cut else (), x.device)
        return x * keep * (0.0 if p == 1 else 1 / (1 - p))


class _Site:
    """A module that is running, and how often it has drawn."""

    def __init__(self, name: str, heads: Range | None) -> None:
        self.name, self.heads, self.calls = name, heads, 0


class _Mode(TorchFunctionMode):
    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self._masks = masks

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:
            return self._dropout(*args, **kwargs)
        if function is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or (args[4:5] or (0.0,))[0]):
            return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return self._masks.drop(x, p) if training and p > 0 else x

    def _attention(
        self,
        query: Tensor,  # [b, h, l, d]
        key: Tensor,  # [b, h_kv, m, d]
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The definition that torch's documentation of scaled_dot_product_attention gives."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._masks.drop(scores.softmax(-1), dropout_p) @ value
