"""The models whose memory is measured: how each is built, its batch, and its loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.models.bert import BERT
from hybridpar.models.gpt import GPT
from hybridpar.models.resnet import ResNet
from hybridpar.models.unet import UNet


@dataclass(frozen=True)
class Family:
    """`build(small)` makes the model, tiny for a warm-up or big; `batch()` gives inputs and targets."""

    name: str
    build: Callable[[bool], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    loss: Callable[[], Any]
    needs: str | None = None

    @property
    def available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


class Reader(nn.Module):
    """Tokens through LSTMs one upon another, and a logit for each token that could follow."""

    tensor_plan = {"embed": "vocabulary", "layers.*": "recurrent", "head": "column"}

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [b, l] -> [b, l, v]
        x = self.embed(ids)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


def _gpt(small: bool) -> nn.Module:
    return GPT(256, 16, 4, 4, 32) if small else GPT(4096, 512, 8, 8, 32)


def _bert(small: bool) -> nn.Module:
    return BERT(256, 16, 4, 4, 32) if small else BERT(4096, 512, 8, 8, 32)


def _unet(small: bool) -> nn.Module:
    return UNet(1, 1, (8, 8, 16)) if small else UNet(1, 1, (64, 128, 256))


def _resnet(small: bool) -> nn.Module:
    return ResNet(3, 10, (8, 16), 2, "group") if small else ResNet(3, 10, (256, 512), 2, "group")


def _lstm(small: bool) -> nn.Module:
    return Reader(256, 16, 4) if small else Reader(2048, 640, 6)


def _llama(small: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 32 if small else 512
    config = LlamaConfig(
        vocab_size=256 if small else 4096, hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _tokens() -> tuple[Any, Any]:
    ids = torch.arange(4 * 33).view(4, 33) % 256
    return ids[:, :-1], ids[:, 1:]


def _images() -> tuple[Any, Any]:
    return torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8), torch.arange(4)


def _volumes() -> tuple[Any, Any]:
    voxels = torch.linspace(-1, 1, 4 * 8**3).view(4, 1, 8, 8, 8)
    return voxels, (voxels > 0).float()


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("GPT", _gpt, _tokens, hp.CrossEntropy),
        Family("BERT", _bert, _tokens, hp.CrossEntropy),
        Family("ResNet", _resnet, _images, lambda: F.cross_entropy),
        Family("U-Net", _unet, _volumes, lambda: F.binary_cross_entropy_with_logits),
        Family("LSTM", _lstm, _tokens, hp.CrossEntropy),
        Family("Llama", _llama, _tokens, hp.CrossEntropy, needs="transformers"),
    )
}
