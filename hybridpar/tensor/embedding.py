"""Embeddings over the tensor axis: of tokens, rows cut over the vocabulary; of positions, whole.

    ids [.., l] -> rows held here, zeros for the others -> sum over the axis, or with sequence parallelism scatter

(Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.shard import Spec, balanced, cut
from hybridpar.tensor import collectives
from hybridpar.tensor.linear import check_plain, hold
from hybridpar.tensor.sequence import Sequence
from hybridpar.wires.axis import Axis


class VocabularyEmbedding(nn.Module):
    """The rows [start, stop) of an nn.Embedding, by `balanced`; other indices hold the others.

    Example:
        >>> layer = VocabularyEmbedding(nn.Embedding(10, 4), Alone("tensor"))
        >>> layer(torch.zeros(2, 3, dtype=torch.long)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self, embedding: nn.Embedding, axis: Axis, sequence: Sequence | None = None, name: str = "embedding"
    ) -> None:
        super().__init__()
        _check(embedding, "vocabulary", name, known=_scaled(embedding))
        if embedding.num_embeddings < axis.size:
            raise ValueError(
                f"a vocabulary of {embedding.num_embeddings} cannot be cut over tensor={axis.size} at {name}; "
                f"use tensor={embedding.num_embeddings} or less"
            )
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.axis, self.sequence, self._name = axis, sequence, name
        self.training = embedding.training
        scale = embedding.embed_scale if _scaled(embedding) else None
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale
        self.weight = hold(embedding.weight, self.specs()["weight"], axis.index)

    def specs(self) -> dict[str, Spec]:
        """What is held of the weight."""
        parts = tuple((piece,) for piece in balanced(self.num_embeddings, self.axis.size))
        return {"weight": cut("weight", (self.num_embeddings, self.embedding_dim), 0, parts)}

    def forward(self, ids: Tensor) -> Tensor:  # [.., l] -> [.., l, d] or with sequence [.., l_tp, d]
        least, most = (0, 0) if not ids.numel() else torch.stack(ids.aminmax()).tolist()
        if least < 0 or most >= self.num_embeddings:  # no index would hold such an id: it would silently become zero
            raise ValueError(f"{self._name}: ids from {least} to {most} for a vocabulary of {self.num_embeddings}")
        start, stop = self.axis.piece(self.num_embeddings)
        elsewhere = (ids < start) | (ids >= stop)
        padding = None if self.padding_idx is None or not start <= self.padding_idx < stop else self.padding_idx - start
        x = F.embedding((ids - start).masked_fill(elsewhere, 0), self.weight, padding)
        x = x.masked_fill(elsewhere.unsqueeze(-1), 0)
        x = collectives.sum_(x, self.axis, fresh=True) if self.sequence is None else self.sequence.scatter(x)
        if self.embed_scale is None:
            return x
        return x * (self.embed_scale.to(x.dtype) if isinstance(self.embed_scale, Tensor) else self.embed_scale)

    def extra_repr(self) -> str:
        return f"{len(self.weight)} of {self.num_embeddings}, {self.embedding_dim}"


class SequenceEmbedding(nn.Module):
    """A whole nn.Embedding, looked up for the tokens that this index holds; so its gradient is partial.

    For what is added to a scattered embedding, such as positions. Without `sequence` it is a plain embedding.

    Example:
        >>> layer = SequenceEmbedding(nn.Embedding(16, 4))
        >>> layer(torch.arange(3)).shape
        torch.Size([3, 4])
    """

    def __init__(self, embedding: nn.Embedding, sequence: Sequence | None = None, name: str = "embedding") -> None:
        super().__init__()
        _check(embedding, "sequence", name)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.sequence = embedding.padding_idx, sequence
        self.training = embedding.training
        self.weight = embedding.weight

    def specs(self) -> dict[str, Spec]:
        """What is held of the weight."""
        return {"weight": Spec("weight", tuple(self.weight.shape), partial=self.sequence is not None)}

    def forward(self, ids: Tensor) -> Tensor:  # [.., l] -> [.., l, d] or with sequence [.., l_tp, d]
        if self.sequence is not None:
            start, stop = self.sequence.piece(ids.shape[-1])
            ids = ids[..., start:stop]
        return F.embedding(ids, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, sequence={self.sequence is not None}"


def _scaled(embedding: nn.Module) -> bool:
    """Whether it is one of the embeddings of Hugging Face's transformers that multiply by their `embed_scale`."""
    kind = type(embedding)
    return kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ScaledWordEmbedding")


def _check(embedding: nn.Module, style: str, name: str, known: bool = False) -> None:
    if not known:
        check_plain(embedding, nn.Embedding, style, name)
    for option, why in (
        ("max_norm", "rows would be renormalised by whoever looks them up"),
        ("scale_grad_by_freq", "each index counts other ids"),
        ("sparse", "a sparse gradient cannot be summed over the axes"),
    ):
        if getattr(embedding, option):
            raise ValueError(f'{name}: {option}={getattr(embedding, option)} does not go with style "{style}": {why}')
