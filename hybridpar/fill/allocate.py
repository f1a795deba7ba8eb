"""Memory for what was on the meta device, with every reference to it left intact.

The parameter objects stay the same and only their contents are exchanged, so tied parameters, optimizers' and ties'
references, and whoever else holds one of them, see the new memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def allocate(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move `modules` to `device`; their tensors on the meta device become memory there, of no particular values.

    Raises ValueError for a plain tensor on the meta device, which nobody can fill: it is no parameter and no buffer.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.Linear(4, 2)
        >>> weight = layer.weight
        >>> allocate([layer], torch.device("cpu"))
        >>> weight is layer.weight, weight.device
        (True, device(type='cpu'))
    """
    for module in modules:
        for name, child in module.named_modules():
            _refuse_plain(name, child)
            if isinstance(child, nn.RNNBase):
                child._flat_weight_refs.clear()  # weak references forbid the exchange; copies share the list
            for x in (*child._parameters.values(), *child._buffers.values()):
                if x is not None and x.is_meta:
                    _exchange(x, device)
            if isinstance(child, nn.RNNBase):
                child._init_flat_weights()
        module.to(device)


def _exchange(x: Tensor, device: torch.device) -> None:
    real: Tensor = torch.empty_like(x, device=device)
    if isinstance(x, nn.Parameter):
        real = nn.Parameter(real, x.requires_grad)
    real.__dict__.update(x.__dict__)
    torch.utils.swap_tensors(x, real)


def _refuse_plain(name: str, module: nn.Module) -> None:
    for attribute, value in vars(module).items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{f'{name}.' if name else ''}{attribute} is a tensor on the meta device and neither a parameter nor a "
                'buffer, so nobody can fill it: make it with device="cpu", or register it as a buffer'
            )
