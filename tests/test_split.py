"""Cutting a module into units and stages, what units cost, and who owns what is shared: no ranks needed."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from hybridpar.assemble import _tie
from hybridpar.models.gpt import GPT
from hybridpar.pipeline.skip import Skip
from hybridpar.split import Stage, estimated_costs, measured_costs, units


def names(module: nn.Module, chain: tuple[str, ...] | None = None) -> list[str]:
    return [name for name, _ in units(module, chain)]


def gpt(tied: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=11, width=8, depth=3, heads=2, context=6, tied=tied)


# ---- units


def test_a_chain_names_units_in_the_order_in_which_they_call_one_another() -> None:
    assert names(gpt()) == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]


def test_a_chain_that_is_given_overrules_the_modules_own() -> None:
    assert names(gpt(), ("embed", "blocks.0", "blocks.1", "blocks.2", "head.norm", "head.project"))[-2:] == [
        "head.norm",
        "head.project",
    ]


def test_an_nn_sequential_is_a_chain_by_itself() -> None:
    assert names(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))) == ["0", "1", "2"]


def test_a_module_that_a_sequential_calls_twice_is_two_units() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 3), relu, nn.Linear(3, 3), relu)
    assert names(model) == ["0", "1", "2", "3"]
    named = nn.Module()
    named.layers = nn.ModuleList([relu, nn.Linear(3, 3), relu])
    assert names(named, ("layers.*",)) == ["layers.0", "layers.1", "layers.2"]


def test_units_called_in_order_are_the_module() -> None:
    model, value = gpt(), torch.randint(11, (2, 6))
    wanted = model(value)
    for _, unit in units(model):
        value = unit(value)
    assert torch.equal(value, wanted)


class Chainless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.c = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("chain", "sentence"),
    [
        (None, r'Chainless cannot be cut into pipeline stages: .*; give chain=\("embed", .*or set pipeline=1'),
        (("a", "d"), "chain names 'd', and Chainless has a, b"),
        (("a", "d.*"), r"chain names 'd\.\*', and Chainless has a, b"),
        (("a",), r"c \(and 2 more\) is in no part of chain=\('a',\): every parameter must be in a part"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_in_one_sentence(chain: tuple[str, ...] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        units(Chainless(), chain)


# ---- stages


def test_a_stage_calls_its_units_in_order_and_names_parameters_as_the_module_does() -> None:
    model, ids = gpt(), torch.randint(11, (2, 6))
    parts = units(model)
    first, second = Stage(0, parts[:2]), Stage(1, parts[2:])
    value, skips = first((ids,), {})
    assert skips == {}
    value, _ = second((value,), {})
    assert torch.equal(value, model(ids))
    found = [name for stage in (first, second) for name, _, _ in stage.named()]
    assert found == [name for name, _ in model.named_parameters(remove_duplicate=False)]


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x - y


def test_a_unit_gets_the_several_tensors_that_the_one_before_returned() -> None:
    x, y = torch.tensor(3.0), torch.tensor(1.0)
    assert Stage(0, [("a", Two()), ("b", Two())])((x, y), {})[0] == (torch.tensor(6.0), torch.tensor(2.0))


def test_a_stage_hands_on_the_skips_that_others_want_and_uses_its_own() -> None:
    outer, inner = Skip("outer"), Skip("inner")
    model = nn.Sequential(outer.stash, inner.stash, nn.Tanh(), inner.pop, nn.Tanh(), outer.pop)
    parts, x = units(model), torch.randn(3)
    stages = [Stage(0, parts[:3]), Stage(1, parts[3:4]), Stage(2, parts[4:5]), Stage(3, parts[5:])]
    value, skips, travelling = x, {}, []
    for stage in stages:
        value, skips = stage((value,), skips)
        travelling.append(sorted(skips))
    assert travelling == [["inner", "outer"], ["outer"], ["outer"], []]
    assert torch.equal(value, model(x))



def test_what_a_stage_keeps_beside_parameters_is_in_the_modules_state_dict() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[2].register_buffer("passing", torch.ones(1), persistent=False)
    kept = dict(Stage(0, units(model)).kept())
    assert kept.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert kept["1.running_mean"] is model[1].running_mean
    whole = Stage(0, [("", model)])
    assert dict(whole.kept()).keys() == kept.keys()


# ---- ties


def tied(model: nn.Module, cuts: list[int], homes: list[int], here: int) -> tuple[list[Stage], list[object]]:
    parts, bounds = units(model), [0, *cuts]
    ends = [*cuts, len(parts)]
    stages = [Stage(s, parts[a:b]) for s, (a, b) in enumerate(zip(bounds, ends))]
    return stages, _tie(stages, homes, here, {})[1]


def test_a_parameter_of_two_stages_belongs_to_the_first_and_the_other_rank_holds_a_copy() -> None:
    model = gpt()
    weight = model.embed.token.weight
    _, (tie,) = tied(model, [2], [0, 1], here=1)
    assert (tie.owner_name, tie.owner_stage, tie.copy_stage) == ("embed.token.weight", 0, 1)
    assert tie.owned is None and tie.copied is model.head.project.weight
    assert tie.copied is not weight and torch.equal(tie.copied, weight)
    _, (tie,) = tied(model := gpt(), [2], [0, 1], here=0)
    assert tie.owned is model.embed.token.weight and tie.copied is None


def test_within_a_stage_a_shared_parameter_stays_one() -> None:
    assert tied(gpt(), [], [0], here=0)[1] == []
    assert tied(gpt(tied=False), [2], [0, 1], here=0)[1] == []


def test_two_stages_of_one_rank_have_a_parameter_and_a_copy() -> None:
    model = gpt()
    _, (tie,) = tied(model, [1, 2, 4], [0, 1, 1, 0], here=0)
    assert tie.owned is model.embed.token.weight and tie.copied is model.head.project.weight
    assert tie.owned is not tie.copied


def test_each_later_stage_has_a_tie_to_the_first() -> None:
    layers = [nn.Linear(3, 3, bias=False) for _ in range(4)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    _, ties = tied(nn.Sequential(*layers), [1, 3], [0, 1, 2], here=1)
    assert [(t.tag, t.owner_name, t.owner_stage, t.copy_stage) for t in ties] == [
        (0, "0.weight", 0, 1),
        (1, "0.weight", 0, 2),
    ]
    assert layers[1].weight is layers[2].weight is ties[0].copied, "both layers of the stage read the one copy"


def test_one_module_with_weights_in_two_stages_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="stages 0 and 1 both call the same Linear: share its parameters"):
        tied(nn.Sequential(layer, nn.ReLU(), layer), [1], [0, 1], here=1)


# ---- costs


def test_estimated_costs_are_the_multiplications_of_the_weights() -> None:
    model = gpt(tied=False)
    block = 8 * 24 + 8 * 8 + 2 * 8 * 32
    assert estimated_costs(units(model)) == [1.0, block, block, block, 11 * 8]
    assert estimated_costs([("a", nn.ReLU())]) == [1.0], "nothing is free"


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.layer = seconds, nn.Linear(4, 4)

    def forward(self, x: Tensor, *rest: object) -> tuple[object, ...]:
        time.sleep(self.seconds)
        return self.layer(x), 5, *rest[1:]


def test_measured_costs_are_seconds_and_leave_no_gradients() -> None:
    model = nn.Sequential(Slow(0.0), Slow(0.05), Slow(0.0))
    costs = measured_costs(units(model), torch.randn(2, 4), repeats=2)
    assert costs[1] >= 0.05 and len(costs) == 3
    assert all(p.grad is None for p in model.parameters())


def test_measuring_takes_whole_numbers_skips_and_in_place_units() -> None:
    assert len(measured_costs(units(gpt()), torch.randint(11, (2, 6)), repeats=1)) == 5
    skip = Skip("skip")
    skipping = nn.Sequential(nn.Sequential(nn.Linear(4, 4), skip.stash, nn.Tanh()), nn.Linear(4, 4), skip.pop)
    assert len(measured_costs(units(skipping), torch.randn(3, 4), repeats=2)) == 3
    inplace = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    assert len(measured_costs(units(inplace), torch.randn(3, 4), repeats=1)) == 3


def test_measuring_changes_neither_mode_nor_running_statistics_nor_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    measured_costs(units(model), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), repeats=1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
