"""GPT in plain PyTorch: nothing here knows about ranks.

    ids -> Embed -> Block x depth -> Head -> logits          pre-norm, learned positions (Radford et al. 2019)

`tensor_plan` says which parts can be cut over the tensor axis, and `chain` in which order the parts call each
other, so that the module can be cut into pipeline stages. Both are data, read by `hybridpar.parallelize`.

b batch, l tokens, d width, h query heads, g key-value heads, e = d / h, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embed(nn.Module):
    """Token and position embeddings, added."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:  # [b, l] -> [b, l, d]
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.dropout(self.token(ids) + self.position(places))


class Attention(nn.Module):
    """Causal self-attention, g key-value heads shared by h query heads (Ainslie et al. 2023); g = h is the usual one.

    `heads` and `kv_heads` are how many this module computes: all of them, or after sharding this rank's.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(heads * self.head_dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, d]
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, h + 2g, l, e]
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        if self.training and self.dropout.p:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # [b, h, l, l]
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            mixed = self.dropout(scores.masked_fill(future, -torch.inf).softmax(-1)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, d]
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, kv_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, d]
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Head(nn.Module):
    """The last norm and the projection to the vocabulary."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, d] -> [b, l, v]
        return self.project(self.norm(x))


class GPT(nn.Module):
    """A decoder-only language model.

    Example:
        >>> model = GPT(vocabulary=1000, width=64, depth=2, heads=4, context=32)
        >>> model(torch.zeros(2, 32, dtype=torch.long)).shape
        torch.Size([2, 32, 1000])
    """

    tensor_plan = {
        "embed.token": "vocabulary",
        "embed.position": "sequence",
        "embed.dropout": "dropout",
        "blocks.*.attention_norm": "norm",
        "blocks.*.attention": "attention",
        "blocks.*.mlp_norm": "norm",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "blocks.*.dropout": "dropout",
        "head.norm": "norm",
        "head.project": "column",
    }
    chain = ("embed", "blocks.*", "head")

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        context: int,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.context = context
        self.embed = Embed(vocabulary, context, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads or heads, dropout) for _ in range(depth))
        self.head = Head(width, vocabulary)
        self.reset_parameters()
        if tied:
            self.head.project.weight = self.embed.token.weight

    def reset_parameters(self) -> None:
        """Draw all weights anew, from a normal distribution."""
        self.apply(_small)
        for block in self.blocks:  # residual paths add up: each starts smaller (Radford et al. 2019, section 2.3)
            for last in (block.attention.out, block.mlp.down):
                nn.init.normal_(last.weight, std=0.02 * (2 * len(self.blocks)) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:  # [b, l] -> [b, l, v]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def generate(self, ids: Tensor, tokens: int, temperature: float = 1.0, top: int = 50) -> Tensor:
        """Continue `ids` [b, l] by sampling `tokens` more from the `top` likeliest of each step."""
        for _ in range(tokens):
            logits = self(ids[:, -self.context :])[:, -1] / temperature  # [b, v]
            kept, places = logits.topk(min(top, logits.shape[-1]))
            ids = torch.cat([ids, places.gather(-1, kept.softmax(-1).multinomial(1))], dim=1)
        return ids


def _small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
