"""BERT's encoder and its masked language model, in plain PyTorch: nothing here knows about ranks.

    ids -> Embed -> Block x depth -> Head -> logits          post-norm (Devlin et al. 2019), or pre-norm

The next-sentence task and segments are left out, as in RoBERTa (Liu et al. 2019). `tensor_plan` and `chain` are data,
read by `hybridpar.parallelize`.

b batch, l tokens, d width, h heads, e = d / h, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.models.gpt import MLP


class Embed(nn.Module):
    """Token and position embeddings, added and normalised."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:  # [b, l] -> [b, l, d]
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.dropout(self.norm(self.token(ids) + self.position(places)))


class Attention(nn.Module):
    """Self-attention in which every token sees every other.

    `heads` are those that this module computes: all of them, or after sharding this rank's.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = self.kv_heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, d]
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, 3h, l, e]
        q, k, v = qkv.chunk(3, dim=1)
        if self.training and self.dropout.p:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # [b, h, l, l]
            mixed = self.dropout(scores.softmax(-1)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each added to what came in; the norm after the sum, or before the part (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.mlp_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, d]
        for part, norm in ((self.attention, self.attention_norm), (self.mlp, self.mlp_norm)):
            if self.pre_norm:
                x = x + self.dropout(part(norm(x)))
            else:
                x = norm(x + self.dropout(part(x)))
        return x


class Head(nn.Module):
    """Each token's logits: a layer of its own, then the embedding's transpose and a bias for each word."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.decode = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, v]
        return self.decode(self.norm(F.gelu(self.transform(x), approximate="tanh")))


class BERT(nn.Module):
    """A masked language model: for each token, logits of what stood there before it was masked.

    Example:
        >>> model = BERT(vocabulary=1000, width=64, depth=2, heads=4, context=32)
        >>> model(torch.zeros(2, 32, dtype=torch.long)).shape
        torch.Size([2, 32, 1000])
    """

    tensor_plan = {
        "embed.token": "vocabulary",
        "embed.position": "sequence",
        "embed.norm": "norm",
        "embed.dropout": "dropout",
        "blocks.*.attention": "attention",
        "blocks.*.attention_norm": "norm",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "blocks.*.mlp_norm": "norm",
        "blocks.*.dropout": "dropout",
        "head.transform": "norm",  # whole on each rank, and works on each token alone, as norms do
        "head.norm": "norm",
        "head.decode": "column",
    }
    chain = ("embed", "blocks.*", "head")

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        context: int,
        dropout: float = 0.0,
        pre_norm: bool = False,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.embed = Embed(vocabulary, context, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, pre_norm) for _ in range(depth))
        self.head = Head(width, vocabulary)
        self.reset_parameters()
        if tied:
            self.head.decode.weight = self.embed.token.weight

    def reset_parameters(self) -> None:
        """Draw all weights anew, from a normal distribution."""
        self.apply(_small)

    def forward(self, ids: Tensor) -> Tensor:  # [b, l] -> [b, l, v]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
