"""The work that every candidate does: one model, one stream of batches, one optimizer.

b batch, l tokens, V vocabulary. A microbatch has the same size for all candidates: two replicas take half of the
microbatches each, stages and tensor shards take all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.models.gpt import GPT
from hybridpar.pipeline.partition import partition


@dataclass(frozen=True)
class Work:
    """Sizes of the model and of a global batch.

    Example:
        >>> Work(batch=32, microbatches=8).samples
        4
    """

    width: int = 256
    depth: int = 8
    heads: int = 8
    tokens: int = 128
    vocabulary: int = 6144
    batch: int = 32
    microbatches: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.microbatches or self.microbatches % 2:
            raise ValueError(
                f"batch={self.batch} in microbatches={self.microbatches}: two replicas share the microbatches, "
                f"so their number must be even and divide the batch"
            )

    @property
    def samples(self) -> int:
        """Samples in one microbatch."""
        return self.batch // self.microbatches

    def cut(self, stages: int) -> tuple[int, ...]:
        """Where each stage begins among embedding, blocks and head, and the end: the largest stage is the least.

        Multiplications per token: a block has 12 d d in its matrices, the head V d, an embedding none.
        """
        return partition([1, *[12 * self.width**2] * self.depth, self.vocabulary * self.width], stages)

    def model(self) -> GPT:
        """The whole model, with the same initial weights on every call."""
        torch.manual_seed(self.seed)
        return GPT(self.vocabulary, self.width, self.depth, self.heads, self.tokens, tied=False)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless global batches (ids, targets), both [b, l]. Frequent and rare tokens, so that the loss falls."""
        draw = torch.Generator().manual_seed(self.seed)
        shares = 1 / torch.arange(1, self.vocabulary + 1)  # Zipf's law
        while True:
            text = torch.multinomial(shares, self.batch * (self.tokens + 1), replacement=True, generator=draw)
            text = text.view(self.batch, self.tokens + 1)
            yield text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        return cls(**json.loads(text))


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of all candidates; fused, so that none pays for small operations that the others avoid.

    One group for each class of data: the fused operation does not take DTensors and plain tensors together.
    """
    groups: dict[type, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(type(parameter.data), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=3e-4, fused=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:  # [b, l, V], [b, l] -> []
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
