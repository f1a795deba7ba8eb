"""A batch, cut into microbatches along dim 0.

A batch is a tensor, or tuples, lists and dicts of them; whatever is not a tensor is given to every microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridpar.shard import balanced


class Elsewhere:
    """What a rank is given in the place of a batch, or of its inputs or targets, that its stages would not look at.

    `samples` are known when a step was made with it.

    Example:
        >>> inputs, targets = Elsewhere()
    """

    samples = 0

    def __iter__(self) -> Iterator[Elsewhere]:
        return iter((self, self))

    def __getitem__(self, _: object) -> Elsewhere:
        return self


def split_batch(batch: Any, microbatches: int, largest: int = 0) -> list[tuple[Any, int]]:
    """(part, its number of samples) for each microbatch; sizes differ by at most one.

    A batch shorter than `microbatches` is refused, unless a batch of `largest` samples came before: then it is the
    short last one of an epoch, and is cut into single samples.
    """
    lengths = {t.shape[0] for t in tensors(batch) if t.dim()}
    if len(lengths) != 1:
        found = sorted(lengths)
        raise ValueError(f"the tensors of a batch must have the same number of samples along dim 0, not {found}")
    (samples,) = lengths
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}: there must be 1 or more")
    if microbatches > samples and largest < microbatches:
        raise ValueError(
            f"microbatches={microbatches} is more than the {samples} samples of this replica's batch: "
            f"use {samples} or fewer, or a larger batch"
        )
    pieces = balanced(samples, min(microbatches, samples))
    return [(mapped(batch, lambda t, a=a, b=b: t[a:b] if t.dim() else t), b - a) for a, b in pieces]


def fingerprint(batch: Any) -> int:
    """A number below 2**52 that tells different batches apart, from a thousand elements of each tensor at most.

    Whole numbers are added, so that it is the same on every kind of processor.
    """
    total = 0
    for place, t in enumerate(tensors(batch), start=1):
        flat = (torch.view_as_real(t) if t.is_complex() else t).detach().reshape(-1)
        words = flat[:: max(1, len(flat) // 1000)].double().view(torch.int64)
        words = words ^ (words >> 32)  # small whole numbers differ in their high bits only
        total += place * int((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())  # wraps around
    return total % 2**52


def call(module: Callable[..., Any], inputs: Any) -> Any:
    """`module` on `inputs`: a dict is keyword arguments, a tuple positional ones."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`; lists become tuples."""
    return mapped(batch, lambda t: t.to(device, non_blocking=True))


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`batch` with `function` applied to each tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(mapped(value, function) for value in batch)
    return batch


def tensors(batch: Any) -> list[Tensor]:
    """All tensors in `batch`."""
    found: list[Tensor] = []
    mapped(batch, lambda t: found.append(t) or t)
    return found
