"""Parallel models of all kinds of modules against the plain module: steps, outputs, states, traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.pipeline.action import Kind
from tests.models import IGNORED, gpt, layers, mine, numbers, tokens
from tests.ranks import ranks

# fp64: the same terms in another order; see test_equality.py.
CLOSE = {"rtol": 0.0, "atol": 1e-10}

Make = Callable[[], nn.Module]
Loss = Callable[[Any, Any], Tensor]


def double(make: Make) -> nn.Module:
    """The module in fp64, with the same weights at each call."""
    torch.manual_seed(5)
    return make().double()


def squares(output: Tensor, targets: Tensor) -> Tensor:
    """A loss of the user's own: the mean over the samples."""
    return (output - targets).square().sum(tuple(range(1, output.dim()))).mean()


def same(found: Tensor | None, wanted: Tensor | None, what: str) -> None:
    assert (found is None) == (wanted is None), f"{what} is {found}, and in one process {wanted}"
    if found is not None:
        torch.testing.assert_close(found, wanted, **CLOSE, msg=f"{what}: {found} {wanted}")


def trained(
    make: Make,
    mesh: Any,
    inputs: Sequence[Any],
    targets: Sequence[Tensor],
    microbatches: int = 3,
    loss: Loss = squares,
    **options: Any,
) -> Any:
    """Train on one batch after the other, in one process and on `mesh`, and compare; returns the parallel model."""
    plain, model = double(make), hp.parallelize(double(make), mesh, loss=loss, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    stepper = hp.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.05, momentum=0.9), model) if parameters else None
    plain_stepper = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for x, y in zip(inputs, targets):
        several = x if isinstance(x, tuple) else (x,)
        value = loss(plain(*several), y)
        value.backward()
        parts = tuple(mine(t, mesh.data) if isinstance(t, Tensor) else t for t in several)
        found = model.train_step((parts if isinstance(x, tuple) else parts[0], mine(y, mesh.data)), microbatches)
        same(torch.tensor(found, dtype=torch.float64), value.detach(), "loss")
        grads = model.full_gradients()
        for name, p in plain.named_parameters():
            same(grads[name], p.grad, f"gradient of {name}")
        if stepper is not None:
            stepper.step()
            stepper.zero_grad()
        plain_stepper.step()
        plain_stepper.zero_grad()
    state = model.full_state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, p in plain.named_parameters():
        same(state[name], p.detach(), name)
    plain.load_state_dict(state)
    return model


def batches(rows: int, wide: int, narrow: int, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    seeds = range(steps)
    return [numbers(rows, wide, seed=s) for s in seeds], [numbers(rows, narrow, seed=9 + s) for s in seeds]


# ---- steps


@ranks(4)
@pytest.mark.parametrize("degrees", [(1, 2, 2), (2, 2, 1), (2, 1, 2), (1, 1, 4)], ids=str)
def test_predict_gives_every_rank_of_a_replica_the_plain_modules_output(degrees: tuple[int, int, int]) -> None:
    mesh = hp.init(**dict(zip(("data", "pipeline", "tensor"), degrees)))
    plain = gpt(dropout=0.1).eval()
    model = hp.parallelize(gpt(dropout=0.1), mesh, loss=hp.CrossEntropy())
    ids = mine(tokens(0)[0], mesh.data)
    for microbatches in (1, 3):
        found = model.predict(ids, microbatches)
        same(found, plain(ids).detach(), "output")
        assert not found.requires_grad
    same(model.predict(ids[:2, :3], microbatches=2), plain(ids[:2, :3]).detach(), "a shorter text")
    assert model.training
    mesh.close()


@ranks(2)
def test_a_short_last_batch_has_fewer_samples_than_microbatches() -> None:
    mesh = hp.init(pipeline=2)
    x, y = numbers(8, 4), numbers(8, 2, seed=1)
    trained(lambda: layers(4, 5, 2), mesh, [x, x[:3], x[:1], x], [y, y[:3], y[:1], y], microbatches=4)
    model = hp.parallelize(layers(4, 5, 2), mesh, loss=squares)
    with pytest.raises(ValueError, match="microbatches=4 is more than the 3 samples of this replica's batch: use 3 or"):
        model.train_step((x[:3], y[:3]), microbatches=4)
    mesh.close()


@ranks(4)
def test_replicas_may_cut_a_batch_into_different_numbers_of_microbatches() -> None:
    mesh = hp.init(pipeline=2, data=2)
    x, y = numbers(11, 4), numbers(11, 2, seed=1)
    trained(lambda: layers(4, 5, 2), mesh, [x, x], [y, y], microbatches=2 + mesh.data.index)
    mesh.close()


@ranks(2)
def test_evaluation_amid_training_changes_neither_mode_nor_gradients_nor_what_follows() -> None:
    mesh = hp.init(pipeline=2)
    losses = {}
    for evaluated in (False, True):
        model = hp.parallelize(gpt(dropout=0.1), mesh, loss=hp.CrossEntropy())
        stepper = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        losses[evaluated] = []
        for step in range(3):
            losses[evaluated].append(model.train_step(tokens(step), microbatches=2))
            if evaluated:
                before = [p.grad.clone() for p in model.parameters()]
                assert model.eval_step(tokens(7), microbatches=3) == model.eval_step(tokens(7), microbatches=3)
                model.predict(tokens(7)[0], microbatches=2)
                assert model.training and all(m.training for s in model._stages.values() for m in s.modules())
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))
            stepper.step()
            stepper.zero_grad()
    assert losses[True] == losses[False]
    assert model.eval().predict(tokens(0)[0]) is not None and not model.training, "who evaluates goes on evaluating"
    mesh.close()


@ranks(2)
def test_a_module_that_the_user_keeps_in_evaluation_mode_stays_there() -> None:
    mesh = hp.init(pipeline=2)
    module = double(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5)))
    model = hp.parallelize(module, mesh, loss=squares)
    for m in model._stages[mesh.pipeline.index].modules():
        m.training = type(m).__name__ != "Dropout"
    model.eval_step((numbers(3, 4), numbers(3, 4)))
    modes = {type(m).__name__: m.training for m in model._stages[mesh.pipeline.index].modules()}
    assert model.training and not modes.pop("Dropout") and all(modes.values()), modes
    mesh.close()


@ranks(4)
def test_a_loss_of_the_users_own_is_right_for_unequal_microbatches_and_replicas() -> None:
    mesh = hp.init(pipeline=2, data=2)
    trained(lambda: layers(4, 6, 5, 2), mesh, *batches(11, 4, 2), microbatches=4)  # 6 and 5 samples: 2 2 1 1, 2 1 1 1
    trained(lambda: layers(4, 6, 5, 2), mesh, *batches(11, 4, 2), microbatches=4, loss=nn.MSELoss())
    mesh.close()


@ranks(2)
def test_torchs_cross_entropy_counts_tokens_as_ours_does() -> None:
    mesh = hp.init(pipeline=2)
    plain = gpt()
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(ignore_index=IGNORED), hp.CrossEntropy()):
        ids, targets = tokens(0)
        model = hp.parallelize(gpt(), mesh, loss=loss)
        wanted = F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten()).detach()
        same(torch.tensor(model.eval_step((ids, targets), microbatches=4), dtype=torch.float64), wanted, "loss")
    mesh.close()


@ranks(2)
def test_a_batch_in_which_nothing_counts_has_a_loss_of_zero_and_no_gradient() -> None:
    mesh = hp.init(pipeline=2)
    model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
    ids, targets = tokens(0)
    assert model.train_step((ids, torch.full_like(targets, IGNORED)), microbatches=2) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in model.full_gradients().values())
    mesh.close()


# ---- what modules may be


class Exchange(nn.Module):
    """Two tensors and what is not one in, the same out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, places: Tensor, scale: float, name: None, y: Tensor) -> tuple[Any, ...]:
        return torch.tanh(self.a(x)) * scale, places.flip(0), scale, name, y + self.b(x)


class Begin(nn.Module):
    def forward(self, x: Tensor, scale: float) -> tuple[Any, ...]:
        return x * 2, torch.arange(x.shape[-1]), scale, None, x


class End(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, places: Tensor, scale: float, name: None, y: Tensor) -> Tensor:
        assert name is None and not places.is_floating_point()
        return self.out(x[:, places] + y)


class Tuples(nn.Module):
    """Units between which tuples pass: tensors with and without gradients, numbers, None."""

    chain = ("begin", "layers.*", "end")

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.begin, self.end = Begin(), End(width)
        self.layers = nn.ModuleList(Exchange(width) for _ in range(depth))

    def forward(self, x: Tensor, scale: float) -> Tensor:
        value = self.begin(x, scale)
        for layer in self.layers:
            value = layer(*value)
        return self.end(*value)


@ranks(2, 4)
def test_several_tensors_and_constants_pass_between_stages(rank_count: int) -> None:
    mesh = hp.init(pipeline=rank_count)
    x, y = batches(7, 4, 2)
    for schedule in ("1f1b", "gpipe"):
        trained(Tuples, mesh, [(one, 0.5) for one in x], y, schedule=schedule)
    mesh.close()


def residual() -> nn.Module:
    """Two skips that overlap, each over several stages; one joins by a product."""
    outer, inner = hp.Skip("outer"), hp.Skip("inner", join=torch.mul)
    return nn.Sequential(
        nn.Linear(4, 6), outer.stash, nn.Tanh(), nn.Linear(6, 6), inner.stash, nn.Tanh(),
        nn.Linear(6, 6), outer.pop, nn.Tanh(), nn.Linear(6, 6), inner.pop, nn.Linear(6, 2),
    )  # fmt: skip


@ranks(2, 4)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_skips_over_several_stages_carry_gradients_back(rank_count: int, schedule: str) -> None:
    mesh = hp.init(pipeline=rank_count)
    trained(residual, mesh, *batches(7, 4, 2), schedule=schedule)
    mesh.close()


class HeadFirst(nn.Module):
    """Registered in another order than called."""

    tensor_plan = {"head": "column", "up": "column", "down": "row"}
    chain = ("up", "down", "head")

    def __init__(self) -> None:
        super().__init__()
        self.head, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x)))


@ranks(2, 4)
def test_logits_are_known_by_what_is_called_last_and_not_by_what_is_registered_last(rank_count: int) -> None:
    mesh = hp.init(tensor=2, pipeline=rank_count // 2)
    x, y = numbers(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])  # all targets among the first rank's columns
    options = {"stages": [1, 2]} if rank_count == 4 else {}
    model = hp.parallelize(double(HeadFirst), mesh, loss=hp.CrossEntropy(), **options)
    plain = double(HeadFirst)(x)
    for _ in range(2):
        same(model.predict(x, microbatches=2), plain.detach(), "output")
        loss = torch.tensor(model.eval_step((x, y), microbatches=2), dtype=torch.float64)
        same(loss, F.cross_entropy(plain, y).detach(), "loss")
    mesh.close()


@ranks(2)
def test_a_chain_of_plain_layers_is_cut_where_the_user_says() -> None:
    mesh = hp.init(pipeline=2)
    make = lambda: layers(4, 6, 5, 2)  # noqa: E731
    cuts = {
        (1, 4): {"stages": [1, 4]},
        (4, 1): {"stages": [4, 1]},
        (2, 3): {"costs": [1, 1, 1, 0.5, 0.5]},
        (3, 2): {"costs": [1, 0.5, 1.5, 1, 2]},
    }
    for (first, _), options in cuts.items():
        model = trained(make, mesh, *batches(7, 4, 2), **options)
        assert f"stage 0 on pipeline index 0: 0 to {first - 1};" in model.report.replace("0: 0;", "0: 0 to 0;")
    trained(make, mesh, *batches(7, 4, 2), example=numbers(5, 4))
    with pytest.raises(ValueError, match=r"stages=\[2, 2\] must be 2 numbers of at least 1 that add up to the 5 parts"):
        hp.parallelize(make(), mesh, loss=squares, stages=[2, 2])
    with pytest.raises(ValueError, match="costs has 2 numbers and there are 5 parts"):
        hp.parallelize(make(), mesh, loss=squares, costs=[1, 2])
    mesh.close()


class AddsOne(nn.Module):
    """In place, without a word of it in its attributes."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x


@ranks(2)
def test_a_stage_may_begin_with_a_layer_that_works_in_place_and_a_module_may_be_called_twice() -> None:
    mesh = hp.init(pipeline=2)

    def make() -> nn.Module:
        relu = nn.ReLU(inplace=True)
        return nn.Sequential(nn.Linear(4, 6), relu, nn.Linear(6, 6), AddsOne(), relu, nn.Linear(6, 2))

    for stages in ([1, 5], [3, 3]):
        model = trained(make, mesh, *batches(7, 4, 2), stages=stages)
    same(model.predict(numbers(3, 4)), loaded(make, model)(numbers(3, 4)).detach(), "output")
    for schedule in ("interleaved",):
        trained(make, mesh, *batches(7, 4, 2), schedule=schedule)
    mesh.close()


@ranks(1)
def test_steps_are_counted_and_can_be_set_for_a_resumed_run() -> None:
    mesh = hp.init()

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()

    batch = numbers(6, 4), numbers(6, 2)
    model, resumed = (hp.parallelize(make(), mesh, loss=nn.MSELoss()) for _ in range(2))
    losses = [model.train_step(batch) for _ in range(3)]
    assert model.steps == 3 and len(set(losses)) == 3, "each step has masks of its own"
    resumed.steps = 2
    assert resumed.train_step(batch) == losses[2]
    mesh.close()


def loaded(make: Make, model: Any) -> nn.Module:
    plain = double(make)
    plain.load_state_dict(model.full_state_dict())
    return plain


@ranks(2)
def test_frozen_parameters_and_those_that_nobody_uses_are_left_alone() -> None:
    mesh = hp.init(pipeline=2)

    def frozen(*names: str) -> Make:
        def make() -> nn.Module:
            model = layers(4, 6, 5, 2)
            for name in names:
                model.get_parameter(name).requires_grad_(False)
            model[2].register_parameter("unused", nn.Parameter(torch.ones(3)))
            return model

        return make

    for names in (["0.weight"], ["0.weight", "0.bias"], ["2.weight", "2.bias", "4.bias"], ["4.weight", "4.bias"]):
        model = trained(frozen(*names), mesh, *batches(7, 4, 2))
        state, begun = model.full_state_dict(), double(frozen()).state_dict()
        assert all(torch.equal(state[name], begun[name]) for name in [*names, "2.unused"])
    mesh.close()


@ranks(2)
def test_a_stage_may_have_no_parameters_at_all_and_another_only_frozen_ones() -> None:
    mesh = hp.init(pipeline=2)

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Softmax(-1))
        model[0].weight.requires_grad_(False)
        return model

    trained(make, mesh, *batches(7, 4, 2), stages=[1, 2])
    mesh.close()


class Bent(nn.Linear):
    """A layer with its activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Backwards(nn.Module):
    """Registers its last layer first; three layers share one weight, another has two names for its bias."""

    chain = ("first", "second", "third", "last")

    def __init__(self) -> None:
        super().__init__()
        self.last, self.third, self.second, self.first = (Bent(4, 4) for _ in range(4))
        self.first.weight = self.third.weight = self.last.weight
        self.second.register_parameter("also", self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(x))))


@ranks(2, 4)
def test_a_weight_that_several_stages_share_goes_by_its_name_in_the_plain_module(rank_count: int) -> None:
    mesh = hp.init(pipeline=rank_count)
    for schedule in ("1f1b", "gpipe", "interleaved")[: 3 if rank_count == 2 else 2]:
        model = trained(Backwards, mesh, *batches(7, 4, 4), schedule=schedule)
        names = mesh.pipeline.objects([name for name, _ in model.named_parameters()])
        wanted = [name for name, _ in Backwards().named_parameters()]
        assert sorted(sum(names, [])) == sorted(wanted), "each has one owner"
        assert "last.weight" in names[0], "the first stage that uses it"
    mesh.close()


@ranks(2)
def test_a_shared_weight_may_be_frozen_for_a_while() -> None:
    mesh = hp.init(pipeline=2)
    model, plain = hp.parallelize(double(Backwards), mesh, loss=squares), double(Backwards)
    x, y = numbers(7, 4), numbers(7, 4, seed=1)
    for trained_now in (True, False, True):
        for named in (dict(model.named_parameters()), dict(plain.named_parameters())):
            if "last.weight" in named:
                named["last.weight"].requires_grad_(trained_now)
        model.train_step((x, y), microbatches=3)
        squares(plain(x), y).backward()
        grads = model.full_gradients()
        for name, p in plain.named_parameters():
            same(grads[name], p.grad, f"gradient of {name}")
        model.zero_grad()
        plain.zero_grad()
    mesh.close()


@ranks(2)
def test_what_cannot_be_spread_is_refused_with_a_sentence() -> None:
    mesh = hp.init(pipeline=2)
    layer = nn.Linear(4, 4)
    for module, options, sentence in (
        (nn.Sequential(layer, nn.Tanh(), layer), {"stages": [1, 2]}, "both call the same Linear"),
        (nn.Linear(4, 4), {}, "Linear cannot be cut into pipeline stages: it has no nn.ModuleList"),
        (layers(4, 4), {}, "1 "),
        (layers(4, 4, 4), {"schedule": "zigzag"}, "no schedule is called 'zigzag'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            hp.parallelize(module, mesh, loss=squares, **options)
    model = hp.parallelize(layers(4, 4, 4), mesh)
    with pytest.raises(ValueError, match="parallelized without a loss: hp.parallelize"):
        model.train_step((numbers(3, 4), numbers(3, 4)))
    with pytest.raises(ValueError, match=r"must have the same number of samples along dim 0, not \[3, 4\]"):
        hp.parallelize(layers(4, 4, 4), mesh, loss=squares).train_step((numbers(3, 4), numbers(4, 4)))
    mesh.close()


class Wraps(nn.Module):
    """A tensor in, and `wrap` of one out."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@ranks(2)
def test_tensors_inside_what_is_no_tuple_are_refused_between_stages(tmp_path: Path) -> None:
    # Two stages on each of two replicas, so that both ranks come to the sentence.
    mesh, path = hp.init(), tmp_path / "two.csv"
    path.write_text("0F0,1F0,1B0,0B0\n")
    for wrap, kind in ((lambda x: {"x": x}, "dict"), (lambda x: [x, x], "list"), (lambda x: (x, (x,)), "tuple")):
        module = double(lambda wrap=wrap: nn.Sequential(Wraps(wrap), Wraps(wrap)))
        model = hp.parallelize(module, mesh, loss=squares, schedule=str(path))
        with pytest.raises(ValueError, match=f"0 ends stage 0 and returns tensors inside a {kind}: between stages let"):
            model.train_step((numbers(3, 4), numbers(3, 4)))
    module = double(lambda: nn.Sequential(nn.Linear(4, 4), Wraps(lambda x: {"x": x})))
    model = hp.parallelize(module, mesh, loss=lambda out, y: squares(out["x"], y), schedule=str(path))
    assert model.train_step((numbers(3, 4), numbers(3, 4))) > 0, "the last stage may return what the loss can read"
    mesh.close()


# ---- states


def with_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
    )  # fmt: skip


@ranks(2)
def test_running_statistics_are_in_the_full_state_and_are_loaded_from_it() -> None:
    mesh = hp.init(pipeline=2)
    model = trained(with_statistics, mesh, *batches(7, 4, 2), microbatches=1)  # the statistics are of a microbatch
    plain, x = loaded(with_statistics, model).eval(), numbers(5, 4)
    assert plain[1].num_batches_tracked == plain[4].num_batches_tracked == 3
    assert float(plain[4].running_mean.abs().max()) > 0.01
    same(model.predict(x, microbatches=2), plain(x).detach(), "output")
    again = hp.parallelize(double(with_statistics), mesh)
    again.load_full_state_dict(plain.state_dict())
    same(again.predict(x), plain(x).detach(), "output of what was loaded")
    mesh.close()


@ranks(2)
def test_running_statistics_are_the_first_replicas_on_every_rank() -> None:
    mesh = hp.init(data=2)
    model = hp.parallelize(double(with_statistics), mesh, loss=squares)
    model.train_step((numbers(5, 4, seed=mesh.data.index), numbers(5, 2)))
    told = mesh.everyone.objects([x.tolist() for x in model.full_state_dict().values()])
    assert told[0] == told[1]
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("tied", [True, False])
def test_a_state_moves_from_any_mesh_to_any_mesh_and_to_the_plain_module(tied: bool) -> None:
    plain, ids = gpt(tied=tied, depth=3, kv_heads=4), tokens(0)[0]
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(numbers(*p.shape, seed=p.numel()) * 0.1)
    state, wanted = plain.state_dict(), plain(ids).detach()
    for degrees in ({"tensor": 4}, {"pipeline": 2, "tensor": 2}, {"pipeline": 4}, {"pipeline": 2}):
        mesh = hp.init(**degrees)
        model = hp.parallelize(gpt(tied=tied, depth=3, kv_heads=4), mesh)
        model.load_full_state_dict(state)
        found = model.full_state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], x) for name, x in state.items())
        state = found
        same(model.predict(ids), wanted, "output")
        mesh.close()
    fresh = gpt(tied=tied, depth=3, kv_heads=4)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(ids), wanted)


@ranks(2)
def test_a_state_that_does_not_fit_is_refused_with_a_sentence() -> None:
    mesh = hp.init(pipeline=2)
    model = hp.parallelize(double(with_statistics), mesh)
    state = model.full_state_dict()
    name = ("0.weight", "4.running_mean")[mesh.pipeline.index]
    with pytest.raises(ValueError, match=rf"{name} is missing in what is loaded, which has \d+ tensors"):
        model.load_full_state_dict({key: x for key, x in state.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} has shape \[6.*\] in this model and \[2, 2\] in what is loaded"):
        model.load_full_state_dict(state | {name: torch.ones(2, 2)})
    mesh.close()


# ---- what a model tells


@ranks(4)
def test_the_report_tells_who_holds_what() -> None:
    mesh = hp.init(pipeline=2, tensor=2)
    lines = hp.parallelize(gpt(), mesh).report.splitlines()
    assert lines[0] == "data=1 x pipeline=2 x tensor=2: 2 stages"
    assert lines[1].startswith("  stage 0 on pipeline index 0: embed to blocks.0; ")
    assert lines[2].startswith("  stage 1 on pipeline index 1: blocks.1 to head; ")
    shares = [int(line.rsplit(" parameters per rank, ")[1].split("%")[0]) for line in lines[1:3]]
    assert sum(shares) in (99, 100, 101)
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_a_trace_shows_what_each_rank_did_in_the_schedules_order(schedule: str) -> None:
    mesh = hp.init(pipeline=4)
    model = hp.parallelize(gpt(depth=6), mesh, loss=hp.CrossEntropy(), schedule=schedule)
    model.train_step(tokens(0), microbatches=5)
    spans, planned = model.trace().spans, model.schedule(5)
    for rank, row in enumerate(planned.actions):
        did = sorted((s for s in spans if s.rank == rank), key=lambda s: s.start)
        assert [(s.kind, s.stage, s.micro) for s in did] == [(a.kind.value, a.stage, a.micro) for a in row]
        assert all(a.end <= b.start for a, b in zip(did, did[1:])), "one thing at a time"
    at = {(s.kind, s.stage, s.micro): s for s in spans}
    for (kind, stage, micro), span in at.items():
        if kind == Kind.BACKWARD.value:
            assert at["F", stage, micro].end <= span.start
        if kind == Kind.FORWARD.value and stage:
            assert at["F", stage - 1, micro].end <= span.start, "one host, one clock"
    model.eval_step(tokens(0), microbatches=2)
    assert {s.kind for s in model.trace().spans} == {"F"}
    mesh.close()


@ranks(2)
def test_a_models_face_is_that_of_a_module() -> None:
    mesh = hp.init(pipeline=2)
    model = hp.parallelize(double(with_statistics), mesh, loss=squares)
    named = dict(model.named_parameters())
    assert [id(p) for p in model.parameters()] == [id(p) for p in named.values()]
    assert model.state_dict().keys() == named.keys() == model.specs().keys()
    assert [name for chunk in model.chunks() for name, _ in chunk] == list(named)
    both = mesh.pipeline.objects(list(named))
    assert both[0] + both[1] == [name for name, _ in with_statistics().named_parameters()]
    model.train_step((numbers(5, 4), numbers(5, 2)))
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    mesh.close()
