"""Small models and data that several tests train, in plain PyTorch and spread over a mesh."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridpar.models.gpt import GPT

VOCABULARY = 37  # no degree divides it
TOKENS = 10  # nor 4 and 8 this
SAMPLES = 19  # nor any degree this: replicas and microbatches are unequal
IGNORED = -100


def gpt(
    depth: int = 2,
    tied: bool = True,
    kv_heads: int = 12,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> GPT:
    """A GPT with 12 heads (8 ranks hold 2 or 1 of them), the same weights at each call."""
    torch.manual_seed(1)
    return GPT(VOCABULARY, 24, depth, 12, TOKENS, kv_heads, dropout, tied).to(dtype)


def layers(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear layers with Tanh between, the same weights at each call."""
    torch.manual_seed(1)
    made: list[nn.Module] = []
    for wide, narrow in zip(sizes, sizes[1:]):
        made += [nn.Linear(wide, narrow), nn.Tanh()]
    return nn.Sequential(*made[:-1]).to(dtype)


def tokens(step: int) -> tuple[Tensor, Tensor]:
    """(ids, targets) int64 [b, l] of one step; a tenth of the targets is ignored, and all of samples 0 to 4.

    Those are a whole microbatch, and on 4 or more replicas all that one replica has.
    """
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(VOCABULARY, (SAMPLES, TOKENS + 1), generator=generator)
    ids, targets = text[:, :-1], text[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = IGNORED
    targets[:5] = IGNORED
    return ids, targets


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mine(x: Tensor, axis: object) -> Tensor:
    """This replica's rows of `x`; `axis` is the data axis."""
    start, stop = axis.piece(len(x))
    return x[start:stop]
