"""Derived plans: unmodified models of Hugging Face, and others, cut by what their code says equal plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybridpar.seeds import Draw
from hybridpar.tensor.derive import derive
from hybridpar.tensor.plan import apply
from hybridpar.wires.axis import Axis
from tests.against_one import CLOSE, tensor_axis, whole
from tests.ranks import ranks

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

IDS, PIXELS = "input_ids", "pixel_values"
TEXT = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**TEXT, "intermediate_size": 30, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**TEXT, "intermediate_size": 30, "num_key_value_heads": 3, "head_dim": 4}
BART = {
    **{"vocab_size": 61, "d_model": 24, "dropout": 0.0, "decoder_start_token_id": 2, "max_position_embeddings": 32},
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 30))},
    **{"encoder_attention_heads": 6, "decoder_attention_heads": 6},
    **TOKENS,
}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 4, "d_ff": 30, "num_layers": 2, "num_heads": 6, "dropout_rate": 0.0}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 6, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", "LlamaConfig", LLAMA),
    "llama tied": ("AutoModelForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("AutoModelForCausalLM", "MistralConfig", LLAMA),
    "qwen2": ("AutoModelForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("AutoModelForCausalLM", "Qwen3Config", LLAMA),
    "gemma": ("AutoModelForCausalLM", "GemmaConfig", LLAMA),
    "gemma3": ("AutoModelForCausalLM", "Gemma3TextConfig", {**LLAMA, "sliding_window": 4}),
    "phi": ("AutoModelForCausalLM", "PhiConfig", {**LLAMA, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": ("AutoModelForCausalLM", "Phi3Config", {**LLAMA, **TOKENS}),
    "olmo2": ("AutoModelForCausalLM", "Olmo2Config", LLAMA),
    "mixtral": ("AutoModelForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "gpt2": ("AutoModelForCausalLM", "GPT2Config", {**GPT2, "attn_pdrop": 0.0}),
    "gptj": ("AutoModelForCausalLM", "GPTJConfig", {**GPT2, "attn_pdrop": 0.0, "rotary_dim": 4}),
    "gpt neox": ("AutoModelForCausalLM", "GPTNeoXConfig", {**TEXT, "intermediate_size": 30}),
    "bloom": ("AutoModelForCausalLM", "BloomConfig", {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 6}),
    "falcon": ("AutoModelForCausalLM", "FalconConfig", TEXT),
    "opt": ("AutoModelForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 30, "dropout": 0.0, "word_embed_proj_dim": 24}),
    "bert": ("AutoModelForMaskedLM", "BertConfig", BERT),
    "roberta": ("AutoModelForMaskedLM", "RobertaConfig", {**BERT, "max_position_embeddings": 32}),
    "electra": ("AutoModelForMaskedLM", "ElectraConfig", {**BERT, "embedding_size": 12}),
    "albert": ("AutoModelForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 12}),
    "distilbert": (
        *("AutoModelForMaskedLM", "DistilBertConfig"),
        {"vocab_size": 61, "dim": 24, "n_layers": 2, "n_heads": 6, "hidden_dim": 30, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "t5": ("AutoModelForSeq2SeqLM", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "bart": ("AutoModelForSeq2SeqLM", "BartConfig", BART),
    "vit": ("AutoModelForImageClassification", "ViTConfig", {**BERT, "image_size": 16, "patch_size": 8}),
}
WHOLE = {"olmo2": ("self_attn",), "bart": ("shared",), "gemma3": ("embed_tokens",), "mixtral": ("experts",)}


class Double(TorchFunctionMode):
    """fp64 where a model's own code asks for fp32, whose rounding would hide what is compared here."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def made(name: str) -> nn.Module:
    auto, config, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options)
    config._experts_implementation = "eager"  # the default knows no fp64
    model = getattr(transformers, auto).from_config(config).double().train()
    for p in model.parameters():  # norms and biases begin as ones and zeros, which hide mistakes
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == PIXELS:
        return {PIXELS: torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)}
    ids = torch.randint(3, 61, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    both = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return {IDS: ids, "attention_mask": mask, **both}


def floats(output: Any) -> Iterator[Tensor]:
    """The differentiable tensors of an output."""
    for x in output.values() if isinstance(output, Mapping) else [output]:
        if isinstance(x, Tensor) and x.requires_grad:
            yield x


def ran(model: nn.Module) -> list[Tensor]:
    with Double():
        found = list(floats(model(**inputs(model))))
        generator = torch.Generator().manual_seed(3)
        sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in found).backward()
    return found


def compare(model: nn.Module, axis: Axis) -> Any:
    """The derived plan cuts `model`; all outputs and gradients equal those of the plain one."""
    plain, cut = deepcopy(model), deepcopy(model)
    derived = derive(cut, axis.size)
    applied = apply(cut, derived, axis, Draw(0))
    for one, other in zip(ran(cut), ran(plain), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    assert set(applied.specs) == set(gradients) == {name for name, _ in cut.named_parameters()}
    for name, p in cut.named_parameters():
        if gradients[name] is None:
            assert p.grad is None, name
            continue
        told = f"gradient of {name}: {{}}".format
        torch.testing.assert_close(whole(p.grad, applied.specs[name], axis), gradients[name], **CLOSE, msg=told)
    return derived


@ranks(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_hugging_face_equals_one_process(name: str) -> None:
    derived = compare(made(name), tensor_axis())
    told = [pattern for pattern, _ in derived.reasons]
    for word in WHOLE.get(name, ()):
        assert any(word in pattern for pattern in told), derived
    if name not in ("olmo2",):
        assert "heads" in derived.values(), derived
    if name not in ("mixtral",):
        assert {"column", "row"} <= {*derived.values()} or "packed column" in derived.values(), derived
