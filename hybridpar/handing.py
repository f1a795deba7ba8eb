"""One rank's batches for all ranks of its replica: only the first one fetches, collates and has workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hybridpar.skeleton.freight import pack, unpack
from hybridpar.wires.axis import Axis


def handed(batches: Iterator[Any], axis: Axis) -> Iterator[Any]:
    """What `batches` gives on index 0 of `axis`, on all of its ranks; elsewhere `batches` is not asked.

    Each batch is a small note about its structure and then one broadcast for each tensor.

    Example:
        >>> from hybridpar.wires.axis import Alone
        >>> list(handed(iter([1, 2]), Alone("replica")))
        [1, 2]
    """
    if axis.size == 1:
        yield from batches
        return
    while True:
        structure, tensors, shapes = None, [], []
        if axis.index == 0:
            for batch in batches:
                structure, tensors = pack(batch)
                tensors = [t.detach().cpu().contiguous() for t in tensors]
                shapes = [(t.dtype, tuple(t.shape)) for t in tensors]
                break
        structure, shapes = axis.objects((structure, shapes))[0]
        if structure is None:
            return
        if axis.index:
            tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in shapes]
        for t in tensors:
            if t.numel():
                axis.broadcast(t, 0)
        yield unpack(structure, tensors)
