"""Plans: whole models cut by them equal plain ones; what they cannot say right is refused. And dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridpar.models.gpt import GPT
from hybridpar.seeds import Draw
from hybridpar.tensor.dropout import Dropout
from hybridpar.tensor.loss import CrossEntropy
from hybridpar.tensor.plan import Applied, apply
from hybridpar.wires.axis import Alone, Axis
from tests.against_one import compare, made, tensor_axis
from tests.ranks import ranks

ALONE = Alone("tensor")


def gpt(**options: object) -> GPT:
    return made(lambda: GPT(**{"vocabulary": 53, "width": 24, "depth": 2, "heads": 6, "context": 16, **options}))


def run_gpt(model: nn.Module, applied: Applied, axis: Axis) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ids, targets = (torch.randint(53, (3, 11), generator=generator) for _ in range(2))
    targets[1, :5] = -100
    return CrossEntropy().cut(axis, applied.logits.parts)(model(ids), targets)


@ranks(2, 4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads, dropout", [(6, 0.0), (6, 0.2), (3, 0.2), (1, 0.2)])
def test_a_gpt_equals_one_process(kv_heads: int, dropout: float, tied: bool, sequence: bool) -> None:
    model = gpt(kv_heads=kv_heads, dropout=dropout, tied=tied)
    compare(model, GPT.tensor_plan, tensor_axis(), run_gpt, sequence)


@ranks(2)
def test_a_cut_model_evaluates_as_the_plain_one() -> None:
    axis, model, plain = tensor_axis(), gpt(dropout=0.2).eval(), gpt(dropout=0.2).eval()
    applied = apply(model, GPT.tensor_plan, axis, Draw(0))
    ids = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        logits = axis.allgather(model(ids), -1)
    torch.testing.assert_close(logits, plain(ids).detach(), rtol=1e-10, atol=1e-12)
    assert applied.logits.parts == (((0, 27),), ((27, 53),))


@ranks(2)
def test_tied_weights_are_one_local_parameter() -> None:
    model = gpt()
    applied = apply(model, GPT.tensor_plan, tensor_axis(), Draw(0))
    assert model.head.project.weight is model.embed.token.weight
    assert applied.tied == {"head.project.weight": "embed.token.weight"}
    assert set(applied.specs) == {name for name, _ in model.named_parameters()}
    assert not applied.replicated


@ranks(2)
def test_tied_weights_that_are_cut_differently_are_refused() -> None:
    with pytest.raises(ValueError, match="embed.token.weight and head.project.weight are one parameter"):
        apply(gpt(), {"embed.token": "vocabulary"}, tensor_axis(), Draw(0))


@ranks(2)
def test_a_module_used_in_two_places_is_cut_once() -> None:
    linear = nn.Linear(4, 6)
    model = nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})
    applied = apply(model, {"*.0": "column"}, tensor_axis(), Draw(0))
    assert model["a"][0] is model["b"][0] and model["a"][0].weight.shape == (3, 4)
    assert applied.tied == {"b.0.weight": "a.0.weight", "b.0.bias": "a.0.bias"}


def test_a_part_of_a_model_goes_by_the_models_names() -> None:
    stage = nn.ModuleList([gpt(dropout=0.1).blocks[1], gpt().head])
    plan = GPT.tensor_plan
    applied = apply(stage, plan, ALONE, Draw(0), names={"0": "blocks.1", "1": "head"})
    assert "blocks.1.attention.qkv.weight" in applied.specs and "head.norm.bias" in applied.specs
    assert (
        stage[0].dropout.site == "blocks.1.dropout" and stage[0].attention.dropout.site == "blocks.1.attention.dropout"
    )
    assert applied.logits.name == "head.project.weight"


def test_a_pattern_that_matches_nothing_names_the_nearest_modules() -> None:
    with pytest.raises(ValueError, match='"blocks.*.mlp.upp" matches no module; the nearest are .*blocks.0.mlp.up'):
        apply(gpt(), {"blocks.*.mlp.upp": "column"}, ALONE, Draw(0))
    with pytest.raises(ValueError, match="matches no module"):
        apply(gpt(), {"*.up": "column"}, ALONE, Draw(0))  # a star is one component


def test_unknown_styles_and_wrong_modules_are_refused() -> None:
    for plan, words in (
        ({"head.project": "columns"}, 'the style "columns"; the styles are column, row'),
        ({"head.norm": "column"}, 'head.norm is a LayerNorm and style "column" cuts nn.Linear only'),
        ({"head.norm": "dropout"}, "head.norm is a LayerNorm"),
        ({"blocks.*.mlp": "attention"}, "blocks.0.mlp: MLP has no heads, kv_heads, head_dim, q, k, v, out"),
    ):
        with pytest.raises(ValueError, match=words):
            apply(gpt(), plan, ALONE, Draw(0))


@ranks(4)
def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads cannot be cut over tensor=4 at blocks.0.attention; use tensor=3"):
        apply(gpt(heads=3), {"blocks.*.attention": "attention"}, tensor_axis(), Draw(0))


class Hidden(nn.Module):
    """A PReLU and a dropout between a column and a row layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 4)
        self.act, self.dropout = nn.PReLU(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.up(x))))


@ranks(2)
def test_what_stands_between_column_and_row_layers_must_be_planned() -> None:
    plan, axis = {"up": "column", "down": "row"}, tensor_axis()
    with pytest.raises(ValueError, match='act has no entry .* it is "partial" if'):
        apply(Hidden(), plan, axis, Draw(0))
    with pytest.raises(ValueError, match='dropout has no entry .* it is "hidden dropout" if'):
        apply(Hidden(), plan | {"act": "partial"}, axis, Draw(0))
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan |= {"act": "partial", "dropout": "hidden dropout"}
    compare(made(Hidden), plan, axis, lambda model, *_: model(x).square().sum())


def test_sequence_parallelism_asks_for_an_entry_for_every_module_with_weights() -> None:
    plan = {name: style for name, style in GPT.tensor_plan.items() if name != "head.norm"}
    with pytest.raises(ValueError, match="head.norm has no entry in the tensor plan, which under sequence"):
        apply(gpt(), plan, ALONE, Draw(0), sequence=True)
    apply(gpt(), plan | {"head.norm": "whole"}, ALONE, Draw(0), sequence=True)
    with pytest.raises(ValueError, match="BatchNorm1d mixes tokens"):
        apply(nn.Sequential(nn.BatchNorm1d(4)), {"0": "norm"}, ALONE, Draw(0), sequence=True)


def test_weights_inside_an_attention_must_be_planned() -> None:
    model = gpt(depth=1)
    model.blocks[0].attention.scale = nn.LayerNorm(4)
    with pytest.raises(ValueError, match='blocks.0.attention.scale is inside an attention .* "partial"'):
        apply(model, GPT.tensor_plan, ALONE, Draw(0))
    applied = apply(model, GPT.tensor_plan | {"blocks.*.attention.scale": "partial"}, ALONE, Draw(0))
    assert applied.specs["blocks.0.attention.scale.weight"].partial


def test_modules_without_an_entry_stay_and_are_reported() -> None:
    drawing = nn.LSTM(4, 4, num_layers=2, dropout=0.1)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), drawing, nn.Dropout(0.1), nn.MultiheadAttention(4, 2))
    linear = model[0]
    applied = apply(model, {}, ALONE, Draw(0))
    assert model[0] is linear and isinstance(model[3], Dropout) and applied.logits is None
    assert applied.replicated[0] == ("0", "no entry in the tensor plan")
    assert "draws from torch's generator" in dict(applied.replicated)["2"]
    assert dict(applied.replicated)["4"] == "no entry in the tensor plan"  # without dropout it draws nothing
    model.scale = nn.Parameter(torch.ones(4))
    assert apply(model, {}, ALONE, Draw(0)).replicated[0] == ("the model itself", "no entry in the tensor plan")


def shout(*_: object) -> None:
    """A user's hook."""


HOOKS = {
    "a forward pre-hook": lambda layer: layer.register_forward_pre_hook(shout),
    "a forward hook": lambda layer: layer.register_forward_hook(shout),
    "a backward hook": lambda layer: layer.register_full_backward_hook(shout),
    "a backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(shout),
    "a hook on its bias": lambda layer: layer.bias.register_hook(shout),
    "a hook on its weight": lambda layer: layer.weight.register_post_accumulate_grad_hook(shout),
}


@ranks(2)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_what_would_be_cut_is_refused_by_name_and_one_around_it_is_not(kind: str) -> None:
    model, plan = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), {"0": "column", "2": "row"}
    model.register_forward_hook(shout)
    HOOKS[kind](model[2])
    with pytest.raises(ValueError, match=rf'2 has {kind} \(shout\), and style "row" .* the style "whole"'):
        apply(model, plan, tensor_axis(), Draw(0))
    apply(model, {"0": "whole", "2": "whole"}, tensor_axis(), Draw(0))
    attention = gpt()
    HOOKS[kind](attention.blocks[0].attention.out)
    with pytest.raises(ValueError, match=rf"blocks.0.attention has {kind} \(shout\) at its out"):
        apply(attention, GPT.tensor_plan, tensor_axis(), Draw(0))


def test_on_one_index_a_module_with_a_hook_and_a_dropout_with_one_keep_them() -> None:
    called = []
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, 4))
    for name in ("0", "1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    applied = apply(model, {"0": "column", "2": "row"}, ALONE, Draw(0))
    model(torch.ones(2, 4))
    assert called == ["0", "1"] and isinstance(model[1], Dropout)
    assert applied.specs["0.weight"].dim is None


@ranks(2)
def test_a_norm_between_convolutions_without_an_entry_is_refused_when_it_sees_some_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    apply(model, {"0": "conv column", "2": "conv row"}, tensor_axis(), Draw(0))
    with pytest.raises(ValueError, match='1 has no entry .* 3 of its 6 channels come in: it is "conv norm" if'):
        model(torch.ones(2, 3, 4, 4))


def dropout(p: float = 0.5, **options: object) -> Dropout:
    return Dropout(p, "site", Draw(0, samples=torch.arange(64)), **options)


def test_dropout_scales_what_it_keeps_and_is_the_identity_in_eval() -> None:
    x = torch.ones(64, 300)
    y = dropout(0.2)(x)
    assert set(y.unique().tolist()) == {0.0, 1.25} and abs(float(y.mean()) - 1) < 0.02
    assert dropout().eval()(x) is x and dropout(0.0)(x) is x
    assert not dropout(1.0)(x).any()
    with pytest.raises(ValueError, match="site: p=1.5 is not a probability"):
        dropout(1.5)


def test_dropout_of_channels_drops_whole_ones() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5))
    draw = Draw(0, samples=torch.arange(64))
    apply(model, {}, ALONE, draw)
    y = model(torch.ones(64, 8, 3, 3)).flatten(2)
    assert torch.equal(y.amin(-1), y.amax(-1)) and 0 < float((y == 0).double().mean()) < 1


def test_a_second_call_draws_another_mask_and_a_recomputed_forward_the_same() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(300))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            masks.append(self.dropout(x * self.weight))
            masks.append(self.dropout(x * self.weight))
            return masks[-1] * masks[-2]

    model, masks = nn.ModuleDict({"twice": Twice()}), []
    draw = Draw(0)
    apply(model, {}, ALONE, draw)
    draw.samples = torch.arange(4)
    checkpoint(model["twice"], torch.ones(4, 300), use_reentrant=False).sum().backward()
    first, second, again, second_again = masks
    assert not torch.equal(first, second)
    assert torch.equal(first, again) and torch.equal(second, second_again)
    draw.step += 1
    model["twice"](torch.ones(4, 300))
    assert not torch.equal(masks[-2], first)


def test_dropout_of_something_without_a_row_per_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"site:0: a mask of shape \[3, 8\] has one row per sample"):
        dropout()(torch.ones(3, 8))
