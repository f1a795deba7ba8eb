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
from hybridpar.wires.axis import Alone, Axis
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
        {"vocab_size": 61, "dim": 24, "n_layers": 2, "n_heads": 6, "hidden_dim": 30, "dropout": 0.0}
        | {"attention_dropout": 0.0},
    ),
    "t5": ("AutoModelForSeq2SeqLM", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "bart": ("AutoModelForSeq2SeqLM", "BartConfig", BART),
    "vit": ("AutoModelForImageClassification", "ViTConfig", {**BERT, "image_size": 16, "patch_size": 8}),
}
WHOLE = {"olmo2": ("self_attn",), "mixtral": ("experts",)}

DROPOUTS = {
    *("dropout", "attention_dropout", "dropout_rate", "attn_pdrop", "resid_pdrop", "embd_pdrop"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


class Double(TorchFunctionMode):
    """fp64 where a model's own code asks for fp32, whose rounding would hide what is compared here."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def made(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    auto, config, usual = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**(usual if options is None else options))
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


def compare(model: nn.Module, axis: Axis, run: Callable[[nn.Module], list[Tensor]] = ran) -> Any:
    """The derived plan cuts `model`; all outputs and gradients equal those of one process, masks included."""
    plain, cut = deepcopy(model), deepcopy(model)
    derived = derive(cut, axis.size)
    results = []
    for one, plan, along in ((plain, {}, Alone("tensor")), (cut, derived, axis)):
        draw = Draw(5)
        applied = apply(one, plan, along, draw)
        draw.samples = torch.tensor([11, 4])
        results.append(run(one))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, **CLOSE)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    assert set(applied.specs) == set(gradients) == {name for name, _ in cut.named_parameters()}
    for name, p in cut.named_parameters():
        if gradients[name] is None:
            assert p.grad is None, name
            continue
        told = f"gradient of {name}: {{}}".format
        torch.testing.assert_close(whole(p.grad, applied.specs[name], axis), gradients[name], **CLOSE, msg=told)
    return derived


# One start of the ranks and one import of transformers serve several models.
GROUPS = [list(MODELS)[i::5] for i in range(5)]


@ranks(2)
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_models_of_hugging_face_equal_one_process(names: list[str]) -> None:
    axis = tensor_axis()
    for name in names:
        derived = compare(made(name), axis)
        told = [pattern for pattern, _ in derived.reasons]
        for word in WHOLE.get(name, ()):
            assert any(word in pattern for pattern in told), derived
        styles = {*derived.values()}
        assert "heads" in styles or name == "olmo2", derived
        assert "row" in styles or name == "mixtral", derived


@ranks(3, 4)
@pytest.mark.parametrize("names", [["llama", "bert", "gpt2", "t5", "gpt neox", "falcon"]], ids=" ".join)
def test_heads_and_features_need_not_divide(names: list[str]) -> None:
    axis = tensor_axis()
    for name in names:  # 6 heads, 3 key-value heads, 30 features, 61 words
        compare(made(name), axis)


@ranks(2)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropouts_drawn_by_functions_do_not_depend_on_the_layout(attention: str) -> None:
    axis = tensor_axis()
    for name in ("bert", "gpt2", "t5", "bart", "opt"):
        auto, config, options = MODELS[name]
        known = getattr(transformers, config)()
        options = {**options, **{key: 0.2 for key in DROPOUTS if hasattr(known, key)}}
        model = made(name, options)
        model.set_attn_implementation(attention)
        compare(model, axis)
        plain = deepcopy(model).eval()
        with torch.no_grad(), Double():
            still, moved = (m(**inputs(m))[0] for m in (plain, model))
        assert not torch.equal(still, moved), name


@ranks(2)
def test_more_ranks_than_heads_leave_an_attention_whole() -> None:
    axis = tensor_axis()
    options = {**MODELS["llama"][2], "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 24}
    derived = compare(made("llama", options), axis)
    assert ("model.layers.*.self_attn", "1 heads cannot be cut over tensor=2") in derived.reasons


def test_a_plan_is_derived_on_the_meta_device_and_changes_nothing() -> None:
    config = transformers.LlamaConfig(**LLAMA)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    before = str(model)
    derived = derive(model, 2)
    assert str(model) == before
    assert {pattern: style for pattern, style in derived.items() if style != "whole"} == {
        "model.embed_tokens": "vocabulary",
        "lm_head": "gathered",
        "model.layers.*.self_attn": "heads",
        "model.layers.*.mlp.gate_proj": "column",
        "model.layers.*.mlp.up_proj": "column",
        "model.layers.*.mlp.down_proj": "row",
    }
    assert derive(model, 2, logits="column")["lm_head"] == "column"
    assert apply(model, derived, Alone("tensor"), Draw(0)).replicated == ()


class Mixed(nn.Module):
    """`between` stands between two layers whose sizes fit."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 7), nn.Linear(7, 4), between
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.between(self.up(x)))
        return x + self.down(y)


@pytest.mark.parametrize(
    "between, cut",
    [(nn.GELU(), True), (nn.Tanh(), True), (torch.relu, True), (nn.Softmax(-1), False), (nn.LayerNorm(7), False)],
)
def test_only_elementwise_work_may_stand_between_two_layers(between: Any, cut: bool) -> None:
    derived = derive(Mixed(between), 2)
    assert (derived["up"] == "column") is cut
    assert ("what self.between does with the features is not known" in dict(derived.reasons).values()) is not cut


class Folded(nn.Module):
    """Reads a weight itself, takes its features apart, or decides by them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(4, 8), nn.Linear(8, 4), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.way == "weight":
            y = y @ self.up.weight
        elif self.way == "slice":
            y = y[..., :4].repeat(1, 2)
        elif self.way == "sum":
            y = y / y.sum(-1, keepdim=True)
        elif self.way == "decides" and y.max() > 0:
            y = -y
        return self.down(y)


@pytest.mark.parametrize("way", ["weight", "slice", "sum", "decides"])
def test_code_that_is_not_understood_leaves_its_layers_whole(way: str) -> None:
    assert set(derive(Folded(way), 2).values()) == {"whole"}
    assert derive(Folded("none"), 2)["up"] == "column"  # branches that are never taken do not count


def noise(*_: object) -> None:
    """A user's hook."""


@pytest.mark.parametrize(
    "where, hook",
    [
        ("up", lambda one: one.register_forward_hook(noise)),
        ("between", lambda one: one.register_forward_pre_hook(noise)),
        ("down", lambda one: one.weight.register_hook(noise)),
        ("dropout", lambda one: one.register_full_backward_hook(noise)),
    ],
)
def test_layers_with_a_hook_between_them_stay_whole(where: str, hook: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(Mixed(nn.GELU()), Mixed(nn.GELU()))
    hook(model[1].get_submodule(where))
    derived = derive(model, 2)
    assert derived["0.up"] == "column" and derived["1.up"] == derived["1.down"] == "whole"
    assert f"{where}: it has a " in dict(derived.reasons)["*"] and "(noise)" in dict(derived.reasons)["*"]


def test_other_modules_with_hooks_stay_whole_too_and_hooks_around_them_do_not_count() -> None:
    model = made("bert")
    model.bert.encoder.layer[0].attention.register_forward_hook(noise)
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(noise)
    model.bert.encoder.layer[1].attention.register_forward_hook(noise)
    model.bert.encoder.layer[1].intermediate.register_forward_hook(noise)
    model.get_input_embeddings().register_forward_hook(noise)
    derived = derive(model, 2)
    assert "bert.encoder.layer.0.attention" not in derived
    assert derived["bert.encoder.layer.1.attention"] == "heads"
    assert derived["bert.encoder.layer.0.intermediate.dense"] == "column"
    assert derived["bert.encoder.layer.1.intermediate.dense"] == "whole"
    assert derived["bert.embeddings.word_embeddings"] == derived["cls.predictions.decoder"] == "whole"
    recurrent = nn.ModuleDict({"rnn": nn.LSTM(4, 4)})
    recurrent["rnn"].weight_hh_l0.register_hook(noise)
    assert derive(recurrent, 2)["rnn"] == "whole"


class Around(nn.Module):
    """Takes weights of what is inside its blocks."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks, self.way = nn.ModuleList(Mixed(nn.GELU()) for _ in range(2)), way

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.way == "loop":
            x = x + sum(block.up.weight.norm() for block in self.blocks)
        elif self.way == "index":
            x = x + self.blocks[0].down.bias.norm()
        elif self.way == "all":
            x = x + sum(p.square().sum() for p in self.parameters())
        elif self.way == "method":
            x = x + self.penalty()
        elif self.way == "type":
            x = x.to(next(self.parameters()).dtype).to(self.blocks[0].up.weight.dtype)
        return x

    def penalty(self) -> Tensor:
        return sum(p.norm() for name, p in self.blocks.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(
    "way, what", [("loop", "weight"), ("index", "bias"), ("all", "parameters"), ("method", "named_parameters")]
)
def test_what_a_forward_around_takes_itself_stays_whole(way: str, what: str) -> None:
    derived = derive(Around(way), 2)
    assert set(derived.values()) == {"whole", "dropout"}
    assert f"the forward of Around takes its {what}" in dict(derived.reasons)["blocks.*"]


def test_a_forward_that_asks_for_the_type_of_weights_takes_none() -> None:
    assert derive(Around("type"), 2)["blocks.*.up"] == derive(Around("none"), 2)["blocks.*.up"] == "column"


def test_the_reasons_say_what_a_module_is() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.zeros(1, 5, 4))

    model = nn.ModuleDict({"up": nn.ConvTranspose2d(2, 2, 2), "stem": nn.Conv2d(2, 2, 3), "tokens": Tokens()})
    reasons = dict(derive(model, 2).reasons)
    assert '"conv column" and "conv row", or "space"' in reasons["up"] and reasons["up"] == reasons["stem"]
    assert reasons["tokens"] == "what Tokens does with its places is not known"


@ranks(2)
def test_plain_modules_are_cut_without_a_plan() -> None:
    axis = tensor_axis()
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(model: nn.Module) -> list[Tensor]:
        y = model(x)
        y.square().sum().backward()
        return [y]

    chain = [nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)]
    torch.manual_seed(0)
    for model in (Mixed(nn.GELU(), dropout=0.3), nn.Sequential(*chain), nn.Sequential(nn.Linear(4, 4), nn.ReLU())):
        derived = compare(model.double(), axis, run)
    assert dict(derived) == {"0": "whole"}


@ranks(2)
def test_an_attention_that_is_not_understood_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match='0.self_attn: Olmo2Attention cannot be cut .* q_norm .* sees all heads'):
        apply(made("olmo2"), {"model.layers.*.self_attn": "heads"}, tensor_axis(), Draw(0))
