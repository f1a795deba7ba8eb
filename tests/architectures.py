"""Hugging Face architectures, tiny and with random weights: how each is built, and a batch for it.

Dropout is off, since the reference is plain PyTorch; attention masks hide the end of one sample, so that masks matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, WORDS, CLASSES = 4, 8, 96, 2
_TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_KV = {"num_key_value_heads": 2, "pad_token_id": 0}
_OLD = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 64}
_PAIR = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
_SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2}
_MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}

# name of the configuration -> (kind of model, what differs from the kind's defaults)
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _KV,
    "mistral": _KV,
    "qwen2": _KV,
    "qwen3": {**_KV, "head_dim": 4},
    "gemma": {**_KV, "head_dim": 4},
    "gemma2": {**_KV, "head_dim": 4},
    "phi": {},
    "phi3": _KV,
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {},
    "olmo": {},
    "olmo2": _KV,
    "starcoder2": _KV,
    "cohere": {"pad_token_id": 0},
    "granite": _KV,
    "glm": {**_KV, "head_dim": 4},
    "smollm3": _KV,
    "biogpt": {},
    "mamba": {},
    "gpt2": _OLD,
    "gptj": {**_OLD, "rotary_dim": 4},
    "codegen": {**_OLD, "rotary_dim": 4},
    "gpt_bigcode": _OLD,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 0},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 16, "n_layers": 4, "n_heads": 4, "hidden_dim": 32},
    "albert": {"embedding_size": 16},
    "deberta-v2": {},
    "mpnet": {},
}
PAIRS: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "bart": {**_PAIR, "max_position_embeddings": 64},
    "whisper": {**_PAIR, **_MARKS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": _VISION,
    "swin": _SWIN,
    "convnext": {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
}
NAMES = [*DECODERS, *ENCODERS, *PAIRS, *IMAGES]
KINDS = {
    **dict.fromkeys(DECODERS, "decoder"),
    **dict.fromkeys(ENCODERS, "encoder"),
    **dict.fromkeys(PAIRS, "encoder-decoder"),
    **dict.fromkeys(IMAGES, "images"),
}


def build(name: str) -> nn.Module:
    """The model in fp64, with the same weights on every call."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    text = name in DECODERS or name in ENCODERS
    settings = {**DECODERS, **ENCODERS, **PAIRS, **IMAGES}[name]
    config = hf.AutoConfig.for_model(name, **({**_TEXT, **settings} if text else settings))
    for setting, value in list(vars(config).items()):
        if "drop" in setting and isinstance(value, float):
            setattr(config, setting, 0.0)
    if name in IMAGES:
        config.num_labels = CLASSES
    family = _family(hf, name)
    torch.manual_seed(0)
    return family.from_config(config).double()


def _family(hf: Any, name: str) -> Any:
    if name in DECODERS:
        return hf.AutoModelForCausalLM
    if name in ENCODERS:
        return hf.AutoModelForMaskedLM
    if name == "whisper":
        return hf.AutoModelForSpeechSeq2Seq
    return hf.AutoModelForSeq2SeqLM if name in PAIRS else hf.AutoModelForImageClassification


def batch(name: str, samples: int = BATCH) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs by name, targets)."""
    draw = torch.Generator().manual_seed(1)

    def words(count: int) -> Tensor:
        return torch.randint(3, WORDS, (samples, count), generator=draw)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=draw, dtype=torch.float64)

    if name in IMAGES:
        side = 16 if name in ("vit", "swin") else 32
        return {"pixel_values": numbers(3, side, side)}, torch.randint(0, CLASSES, (samples,), generator=draw)
    if name == "whisper":
        return {"input_features": numbers(8, 40), "decoder_input_ids": words(6)}, words(6)
    seen = torch.ones(samples, TOKENS, dtype=torch.long)
    seen[1::2, 5:] = 0
    inputs = {"input_ids": words(TOKENS), "attention_mask": seen}
    if name in PAIRS:
        return {**inputs, "decoder_input_ids": words(6)}, words(6)
    return inputs, words(TOKENS)

