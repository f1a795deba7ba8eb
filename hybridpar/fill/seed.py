"""One leaf made real by its own initialisers, from random numbers that depend on the seed and its name alone.

    leaf          own tensors real on the CPU, all others of the skeleton still on the meta device
    1. upwards    reset_parameters() (or _reset_parameters()) of the leaf, its parent, .., the root, where they have one
    2. upwards    _init_weights(module), of the nearest module at or above that has one, as Hugging Face models do
    3.            init(name, leaf), if the user gave one

What a parent's initialiser writes to other leaves goes to the meta device, that is nowhere. So a parent may treat its
children as it likes (Transformer's Xavier, GPT's smaller residual layers), and still one leaf is whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor, nn

from hybridpar.fill.recipe import Leaf

Init = Callable[[str, nn.Module], None]  # (global name of the leaf, the leaf with its tensors real)


def make(leaf: Leaf, seed: int, init: Init | None = None, parameters: bool = True) -> dict[str, Tensor]:
    """The leaf's own tensors by local name, whole, on the CPU; without `parameters` its buffers only.

    What no initialiser has written is left out. Torch's generator is afterwards where it was.
    Raises ValueError where an initialiser fails.
    """
    with _real(leaf.module, parameters), torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(_number(seed, leaf.name))
        before = _own(leaf.module)
        for what, initialise in _initialisers(leaf):
            try:
                initialise()
            except (NotImplementedError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{what} fails where only {leaf.name or 'the root'} is real and the rest of the model is on the "
                    f"meta device ({error}): let it set its own tensors only, or load weights instead of a seed"
                ) from error
        if init is not None:
            init(leaf.name, leaf.module)
        found = _own(leaf.module)
        return {name: x for name, x in found.items() if not x.is_meta and _written(x, before.get(name))}


def sources(leaf: Leaf) -> str:
    """The initialisers of `leaf`, in words."""
    return " and ".join(dict.fromkeys(what for what, _ in _initialisers(leaf))) or "nothing"


def _initialisers(leaf: Leaf) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is called, the call), in order."""
    for _, module in leaf.path:
        for method in ("reset_parameters", "_reset_parameters"):
            if callable(getattr(module, method, None)):
                yield f"{type(module).__name__}.{method}", getattr(module, method)
                break
    for i, (_, module) in enumerate(leaf.path):
        ruler = next((m for _, m in leaf.path[i:] if callable(getattr(m, "_init_weights", None))), None)
        if ruler is not None:
            yield f"{type(ruler).__name__}._init_weights", lambda r=ruler, m=module: r._init_weights(m)


@contextmanager
def _real(module: nn.Module, parameters: bool) -> Iterator[None]:
    """Within it, the module's own tensors are real; afterwards they are on the meta device again."""
    kept = {kind: module.__dict__[kind] for kind in ("_parameters", "_buffers")}
    try:
        for kind, own in kept.items():
            if kind == "_buffers" or parameters:
                module.__dict__[kind] = {name: None if x is None else _unwritten(x) for name, x in own.items()}
        yield
    finally:
        module.__dict__.update(kept)


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for kind in (module._parameters, module._buffers) for name, x in kind.items() if x is not None}


def _unwritten(x: Tensor) -> Tensor:
    """A real tensor like `x` whose values tell whether somebody has set them."""
    if x.dtype.is_floating_point and x.dtype.itemsize > 1:
        real = torch.full(x.shape, torch.nan, dtype=x.dtype, device="cpu")
    else:
        real = torch.zeros(x.shape, dtype=x.dtype, device="cpu")
    return nn.Parameter(real, x.requires_grad) if isinstance(x, nn.Parameter) else real


def _written(x: Tensor, before: Tensor | None) -> bool:
    """Whether all of `x` has been set. Writes through `.data` count no version, but leave no NaN behind."""
    if not x.numel():
        return True
    if x.dtype.is_floating_point and x.dtype.itemsize > 1:
        return not x.min().isnan()
    return x is not before or x._version > 0 or bool(x.any())


def _number(seed: int, name: str) -> int:
    """64 bits that stand for the two; Python's own `hash` differs between processes."""
    return int.from_bytes(blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")
