"""Who writes what: every tensor has one writer, and the bytes are spread over all ranks that can write them.

    data 0  pipeline 0   tensor 0 1      a tensor of stage 0 is held by ranks 0, 1, 4 and 5, whole or in shards:
            pipeline 1   tensor 2 3      one of them writes it, and its tensor peers send it theirs
    data 1  pipeline 0   tensor 4 5
            pipeline 1   tensor 6 7

A buffer that replicas have each from their own samples is written by a rank of that replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from hybridpar.checkpoint.manifest import Stored
from hybridpar.mesh import Mesh

# Bytes of an element by the name that safetensors give a dtype.
WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A whole tensor that is to be written: which kind, under which name there, and who holds it.

    `replica` is None where all replicas have the same.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    pipeline: int
    replica: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * WIDTHS[self.dtype]

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name


def assign(items: Iterable[Item], mesh: Mesh) -> dict[tuple[str, str], int]:
    """The writer of each item: the largest first, each to the rank that has least so far.

    Example:
        >>> items = [Item("model", name, (8,), "F32", pipeline=0) for name in "abc"]
        >>> sorted(assign(items, Mesh(data=3)).values())
        [0, 1, 2]
    """
    loads = dict.fromkeys(range(mesh.size), 0)
    writers = {}
    for item in sorted(items, key=lambda i: (-i.nbytes, i.key)):
        replicas = range(mesh.data) if item.replica is None else (item.replica,)
        able = [mesh.rank(d, item.pipeline, t) for d in replicas for t in range(mesh.tensor)]
        writer = min(able, key=lambda rank: (loads[rank], rank))
        loads[writer] += item.nbytes
        writers[item.key] = writer
    return writers


def in_order(items: Iterable[Item]) -> list[Item]:
    """The order in which all ranks go through them: file by file, wide elements first so that each lies aligned."""
    return sorted(items, key=lambda i: (i.kind, -WIDTHS[i.dtype], i.name))


def files(items: Sequence[Item], writers: Mapping[tuple[str, str], int]) -> dict[tuple[str, int], str]:
    """The name of each file, by kind and writer, numbered as Hugging Face numbers them.

    Example:
        >>> one = Item("model", "w", (8,), "F32", pipeline=0)
        >>> files([one], {one.key: 3})
        {('model', 3): 'model-00001-of-00001.safetensors'}
    """
    found = {}
    for kind in dict.fromkeys(item.kind for item in items):
        ranks = sorted({writers[item.key] for item in items if item.kind == kind})
        for number, rank in enumerate(ranks, 1):
            found[kind, rank] = f"{kind}-{number:05d}-of-{len(ranks):05d}.safetensors"
    return found


def stored(items: Iterable[Item], writers: Mapping[tuple[str, str], int]) -> dict[str, dict[str, Stored]]:
    """What the manifest says of each tensor."""
    items = list(items)
    names, found = files(items, writers), {}
    for item in items:
        file = names[item.kind, writers[item.key]]
        found.setdefault(item.kind, {})[item.name] = Stored(file, item.name, item.shape, item.dtype)
    return found
