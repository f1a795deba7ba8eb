"""Recurrences cut by hidden units, and taken apart by layers, against torch's own in one process."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import hybridpar as hp
from hybridpar.models.speech import SpeechRecogniser
from hybridpar.seeds import Draw
from hybridpar.shard import balanced
from hybridpar.split import Stage
from hybridpar.tensor.gates import Options
from hybridpar.tensor.plan import apply
from hybridpar.tensor.ragged import Rows
from hybridpar.tensor.recurrent import Recurrent, unstack, unstacked
from hybridpar.wires.axis import Alone, Axis
from tests.against_one import CLOSE, compare, made, numbers, tensor_axis, whole
from tests.ranks import ranks
from tests.test_engine import trained

ALONE = Alone("tensor")
LENGTHS = [4, 6, 2, 6, 1]  # of five sequences, in no order
KINDS = {
    "lstm": lambda **options: nn.LSTM(5, 7, **options),
    "projected lstm": lambda **options: nn.LSTM(5, 7, proj_size=3, **options),
    "gru": lambda **options: nn.GRU(5, 7, **options),
    "tanh": lambda **options: nn.RNN(5, 7, **options),
    "relu": lambda **options: nn.RNN(5, 7, nonlinearity="relu", **options),
}
OPTIONS = {
    "one layer": {},
    "reversed too": {"bidirectional": True},
    "deep": {"num_layers": 3, "bias": False, "batch_first": True},
    "deep and reversed too": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def states(rnn: nn.Module, batch: int) -> Any:
    """Initial states of all layers, as leaves."""
    count = rnn.num_layers * (1 + rnn.bidirectional)
    h = numbers(count, batch, rnn.proj_size or rnn.hidden_size, seed=5).requires_grad_()
    return (h, numbers(count, batch, rnn.hidden_size, seed=6).requires_grad_()) if rnn.mode == "LSTM" else h


def flat(value: Any) -> list[Tensor]:
    """The tensors of outputs and states."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for one in value for t in flat(one)]


def packed(x: Tensor, rnn: nn.Module) -> PackedSequence:
    return pack_padded_sequence(x, LENGTHS, rnn.batch_first, enforce_sorted=False)


def outcome(rnn: nn.Module, form: str, started: bool) -> list[Tensor]:
    """Outputs, last states, and the gradients of input and initial states."""
    shape = (len(LENGTHS), 6, 5) if rnn.batch_first else (6, len(LENGTHS), 5)
    x = numbers(*(shape if form != "unbatched" else (6, 5)), seed=4).requires_grad_()
    hx = states(rnn, len(LENGTHS) if form != "unbatched" else 1) if started else None
    leaves = [x, *(flat(hx) if started else [])]
    if started and form == "unbatched":
        hx = tuple(t.squeeze(1) for t in hx) if isinstance(hx, tuple) else hx.squeeze(1)
    out = flat(rnn(packed(x, rnn) if form == "packed" else x, hx))
    loss = sum((t * numbers(*t.shape, seed=20 + i)).sum() for i, t in enumerate(out))
    loss.backward()
    return [*out, *(leaf.grad for leaf in leaves)]


def assert_equal(plain: nn.Module, axis: Axis, form: str, started: bool) -> None:
    cut = Recurrent(deepcopy(plain), axis, Draw(0))
    want, got = outcome(plain, form, started), outcome(cut, form, started)
    assert len(want) == len(got)
    for i, (a, b) in enumerate(zip(want, got)):
        torch.testing.assert_close(b, a, **CLOSE, msg=f"tensor {i}: {{}}".format)
    specs, parameters = cut.specs(), dict(cut.named_parameters())
    assert [*parameters] == [name for name, _ in plain.named_parameters()] == [*plain.state_dict()]
    for name, p in plain.named_parameters():
        assert tuple(parameters[name].shape) == specs[name].local_shape(axis.index)
        told = f"gradient of {name}: {{}}".format
        torch.testing.assert_close(whole(parameters[name].grad, specs[name], axis), p.grad, **CLOSE, msg=told)


@ranks(1, 2, 3, 4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_cut_recurrence_equals_torchs_own(kind: str, options: str) -> None:
    """7 units do not divide by 2, 3 or 4; the hand-written backward must agree with torch's on every leaf."""
    axis, plain = tensor_axis(), made(lambda: KINDS[kind](**OPTIONS[options]))
    for form, started in (("padded", False), ("padded", True), ("packed", False), ("packed", True)):
        assert_equal(plain, axis, form, started)
        plain.zero_grad()


@ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_without_a_batch_is_taken_as_torch_takes_it(kind: str) -> None:
    plain = made(lambda: KINDS[kind](num_layers=2, bidirectional=True))
    for started in (False, True):
        assert_equal(plain, tensor_axis(), "unbatched", started)
        plain.zero_grad()


@ranks(2)
def test_evaluation_equals_torchs_own_and_keeps_nothing() -> None:
    axis = tensor_axis()
    for kind in KINDS:
        plain = made(lambda kind=kind: KINDS[kind](num_layers=2, dropout=0.5, bidirectional=True)).eval()
        cut = Recurrent(deepcopy(plain), axis, Draw(0))
        x = numbers(4, 3, 5)
        with torch.no_grad():
            for a, b in zip(flat(plain(x)), flat(cut(x))):
                torch.testing.assert_close(b, a, **CLOSE)
                assert b.grad_fn is None


@ranks(2)
def test_a_packed_sequence_comes_back_in_the_users_order() -> None:
    axis, plain = tensor_axis(), made(lambda: nn.LSTM(5, 7, bidirectional=True))
    cut, x = Recurrent(deepcopy(plain), axis, Draw(0)), numbers(6, 5, 5)
    for started in (packed(x, plain), pack_sequence([x[:n, i] for i, n in enumerate((6, 4, 4, 1))])):
        (want, (h, c)), (got, (cut_h, cut_c)) = plain(started), cut(started)
        assert isinstance(got, PackedSequence) and torch.equal(got.batch_sizes, want.batch_sizes)
        assert got.unsorted_indices is started.unsorted_indices and got.sorted_indices is started.sorted_indices
        for a, b in zip(pad_packed_sequence(want), pad_packed_sequence(got)):
            torch.testing.assert_close(b, a, **CLOSE)
        for a, b in ((h, cut_h), (c, cut_c)):
            torch.testing.assert_close(b, a, **CLOSE)


class Recogniser(nn.Module):
    """Two calls of one recurrence with dropout between its layers, the second from where the first has ended."""

    def __init__(self, kind: str, form: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(14, 3)
        self.rnn = KINDS[kind](num_layers=3, dropout=0.4, bidirectional=True, batch_first=True)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:  # [3, l, 4] -> [3, 3]
        x = self.up(x)
        if self.form == "packed":
            x = pack_padded_sequence(x, [2, 6, 5], batch_first=True, enforce_sorted=False)
        _, hx = self.rnn(x)
        y, hx = self.rnn(x, hx)
        y = pad_packed_sequence(y, batch_first=True)[0] if self.form == "packed" else y
        return self.down(y.sum(1)) + flat(hx)[-1].sum()


PLAN = {"up": "whole", "down": "whole", "rnn": "recurrent"}


@ranks(1, 2, 3, 4)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_masks_between_layers_are_those_of_one_process(kind: str, form: str) -> None:
    model, x = made(lambda: Recogniser(kind, form)), numbers(3, 6, 4)
    compare(model, PLAN, tensor_axis(), lambda one, *_: one(x).square().sum())


def test_masks_depend_on_the_sample_and_the_call_and_not_on_the_padding() -> None:
    model = made(lambda: nn.ModuleDict({"rnn": nn.GRU(5, 7, num_layers=2, dropout=0.5, batch_first=True)}))
    draw, x = Draw(0, samples=torch.tensor([8, 3])), numbers(2, 4, 5)
    apply(model, {"rnn": "recurrent"}, ALONE, draw)
    rnn = model["rnn"]
    padded = rnn(torch.cat([x, x], 1))[0][:, :4]
    draw.samples = torch.tensor([8, 3])
    pieces = pad_packed_sequence(rnn(pack_padded_sequence(x, [3, 4], True, False))[0], batch_first=True)[0]
    torch.testing.assert_close(pieces[0, :3], padded[0, :3], **CLOSE)
    torch.testing.assert_close(pieces[1], padded[1], **CLOSE)
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    draw.samples = torch.tensor([3])
    torch.testing.assert_close(rnn(x[1:])[0][0], padded[1], **CLOSE)


@ranks(2)
def test_a_recurrence_keeps_dtype_mode_options_and_frozen_weights() -> None:
    axis, plain = tensor_axis(), nn.LSTM(4, 6, num_layers=2, dropout=0.1, batch_first=True).to(torch.bfloat16).eval()
    plain.weight_hh_l1.requires_grad_(False)
    cut = Recurrent(plain, axis, Draw(0))
    cut.flatten_parameters()
    y, (h, c) = cut(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert {t.dtype for t in (y, h, c)} == {torch.bfloat16}
    y.sum().backward()
    assert cut.weight_hh_l1.grad is None and cut.weight_hh_l0.grad is not None
    assert not cut.training and not cut.masks["1"].training and cut.train().masks["1"].training
    assert (cut.num_layers, cut.hidden_size, cut.bidirectional, cut.batch_first) == (2, 6, False, True)
    start, stop = axis.piece(6)
    told = f"LSTM, 4, 6, num_layers=2, batch_first=True, dropout=0.1, units {start} to {stop}"
    assert told in repr(cut)


@ranks(2)
def test_under_autocast_a_recurrence_computes_in_the_type_that_torch_would() -> None:
    for kind in (nn.LSTM, nn.GRU):
        plain, x = made(lambda kind=kind: kind(5, 8)).float(), numbers(4, 3, 5).float()
        cut = Recurrent(deepcopy(plain), tensor_axis(), Draw(0))
        with torch.autocast("cpu", torch.bfloat16):
            want, got = plain(x)[0], cut(x)[0]
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.02)  # bfloat16 has 8 bits
        got.sum().backward()
        assert cut.weight_hh_l0.grad.dtype == torch.float32


def test_alone_a_recurrence_without_dropout_stays_and_one_with_it_keeps_its_parameters() -> None:
    model = nn.ModuleDict({"still": nn.GRU(3, 4, 2), "masked": nn.GRU(3, 4, 2, dropout=0.1)})
    still, masked = model["still"], model["masked"]
    applied = apply(model, {"still": "recurrent", "masked": "recurrent"}, ALONE, Draw(0))
    assert model["still"] is still and isinstance(model["masked"], Recurrent)
    assert all(p is getattr(masked, name) for name, p in model["masked"].named_parameters())
    assert set(applied.specs) == {name for name, _ in model.named_parameters()}


def test_a_recurrence_without_a_style_stays_whole_and_is_reported() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2)})
    rnn = model["rnn"]
    applied = apply(model, {}, ALONE, Draw(0))
    assert model["rnn"] is rnn and applied.specs["rnn.weight_hh_l1"].dim is None
    assert [name for name, _ in applied.replicated] == ["rnn"]


class Own(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return x


@ranks(4)
def test_what_cannot_be_cut_is_refused() -> None:
    axis = tensor_axis()
    for rnn, words in (
        (nn.LSTM(4, 3), "3 hidden units cannot be cut over tensor=4 at net.rnn; use tensor=3 or less"),
        (nn.LSTMCell(4, 8), "net.rnn is a LSTMCell and style"),
        (Own(4, 8), "net.rnn is a Own and style"),
        (weight_norm(nn.LSTM(4, 8), "weight_hh_l0"), "net.rnn is a parametrized"),
    ):
        with pytest.raises(ValueError, match=words):
            Recurrent(rnn, axis, Draw(0), "net.rnn")


def test_wrong_inputs_are_told_what_is_expected() -> None:
    rnn = Recurrent(nn.LSTM(4, 6), ALONE, Draw(0), "rnn")
    h = torch.zeros(1, 3, 6)
    for started, words in (
        ((torch.zeros(5, 3, 7),), "rnn: sequences of 7 features come in and 4 are expected"),
        ((torch.zeros(1, 5, 3, 4),), r"shape \[1, 5, 3, 4\] is neither"),
        ((torch.zeros(0, 3, 4),), "needs one step and one sequence at least"),
        ((torch.zeros(5, 3, 4), h), r"an LSTM's initial states are a pair \(h, c\), not a Tensor"),
        ((torch.zeros(5, 2, 4), (h, h)), r"has shape \[1, 3, 6\] and should have \[1, 2, 6\]"),
    ):
        with pytest.raises(ValueError, match=words):
            rnn(*started)


@ranks(2, 4)
def test_a_recogniser_of_packed_speech_trains_as_in_one_process(rank_count: int) -> None:
    mesh = hp.init(tensor=2, pipeline=rank_count // 2)
    inputs = [(numbers(6, 5, 4, seed=s), torch.tensor([5, 2, 3, 5, 1, 4]).roll(s)) for s in range(2)]
    targets = [torch.arange(6).roll(s) % 3 for s in range(2)]
    plan = {"layers.*.lstm": "recurrent"}
    trained(
        lambda: SpeechRecogniser(4, 3, 10, depth=3), mesh, inputs, targets, loss=nn.functional.cross_entropy, plan=plan
    )
    mesh.close()


# ---- layers over the pipeline


@ranks(1, 2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("started", [False, True])
def test_layers_that_call_one_another_equal_the_whole(kind: str, started: bool) -> None:
    axis, plain = tensor_axis(), made(lambda: KINDS[kind](num_layers=3, bidirectional=True, batch_first=True))
    cut = Recurrent(deepcopy(plain), axis, Draw(0))
    layers = unstack(cut, Draw(0))
    assert [name for layer in layers for name, _ in layer.named_parameters()] == [*plain.state_dict()]
    assert all(p is getattr(cut, name) for layer in layers for name, p in layer.named_parameters())
    assert [spec for layer in layers for spec in layer.specs().items()] == [*cut.specs().items()]

    class Chain(nn.Module):
        num_layers, bidirectional, batch_first, mode = 3, True, True, plain.mode
        proj_size, hidden_size = plain.proj_size, plain.hidden_size

        def forward(self, x: Tensor, hx: Any) -> Any:
            value = (x, hx) if started else (x,)
            for layer in layers:
                assert all(t is None or isinstance(t, Tensor) for t in value) or layer is layers[0]
                value = layer(*value)
            return value

    for a, b in zip(outcome(plain, "padded", started), outcome(Chain(), "padded", started)):
        torch.testing.assert_close(b, a, **CLOSE)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(whole(getattr(cut, name).grad, cut.specs()[name], axis), p.grad, **CLOSE)


def test_layers_draw_the_masks_of_the_whole() -> None:
    def rnn() -> nn.Module:
        return made(lambda: nn.LSTM(5, 7, num_layers=3, dropout=0.5))

    x, draw = numbers(4, 2, 5), Draw(0, samples=torch.tensor([4, 9]))
    y = Recurrent(rnn(), ALONE, draw, "net.rnn")(x)[0]
    draw.samples = torch.tensor([4, 9])
    value: Any = (x,)
    for layer in unstack(rnn(), draw, "net.rnn"):
        value = layer(*value)
    torch.testing.assert_close(value[0], y, **CLOSE)


def test_the_units_of_a_chain_have_the_layers_of_its_recurrences_among_them() -> None:
    front, rnn, one = nn.Linear(3, 3), nn.GRU(3, 4, num_layers=3), nn.GRU(4, 4)
    units = unstacked([("front", front), ("rnn", rnn), ("one", one)], Draw(0))
    assert [name for name, _ in units] == ["front", "rnn", "rnn", "rnn", "one"]
    assert units[0][1] is front and units[4][1] is one
    names = [f"{unit}.{name}" for unit, module in units for name, _ in module.named_parameters()]
    plain = nn.ModuleDict({"front": front, "rnn": rnn, "one": one})
    assert names == [name for name, _ in plain.named_parameters()]
    stages, x = (Stage(0, units[:2]), Stage(1, units[2:4])), torch.randn(5, 2, 3)
    value: Any = (x,)
    for stage in stages:
        value, _ = stage(value, {})
    torch.testing.assert_close(flat(value), flat(rnn(front(x))))
    assert names[2:] == [name for stage in stages for name, *_ in stage.named()][2:] + names[14:]
    with pytest.raises(ValueError, match="rnn, layer 1: .* takes a padded batch of 3 dims"):
        units[2][1](torch.zeros(5, 4))


# ---- pure parts


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_rows_reverse_every_sequence_in_its_own_length(lengths: list[int], random: Any) -> None:
    random.shuffle(lengths)
    sequences = [torch.tensor([[i, t] for t in range(n)]) for i, n in enumerate(lengths)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    rows = Rows.of(tuple(packed.batch_sizes.tolist()), packed.sorted_indices)
    reversed_ = pack_sequence([sequence.flip(0) for sequence in sequences], enforce_sorted=False)
    assert torch.equal(packed.data[rows.backwards], reversed_.data)
    last = packed.data[rows.last][packed.unsorted_indices]
    assert last.tolist() == [[i, n - 1] for i, n in enumerate(lengths)]
    longest = max(lengths)
    assert rows.places.tolist() == [i * longest + t for i, t in packed.data.tolist()]
    noted: list[Tensor] = []
    same = rows.by_sample(lambda batch: noted.append(batch) or batch, packed.data)
    assert torch.equal(same, packed.data) and noted[0].shape == (len(lengths), longest, 2)


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    units=st.integers(2, 9),
    degree=st.integers(1, 4),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    both=st.booleans(),
    projected=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_specs_hold_every_gate_of_a_unit_together(
    kind: type[nn.Module], units: int, degree: int, layers: int, bias: bool, both: bool, projected: bool
) -> None:
    more = {"proj_size": units - 1} if projected and kind is nn.LSTM else {}
    rnn = kind(3, units, layers, bias=bias, bidirectional=both, **more)
    options, degree = Options.of(rnn), min(degree, units)
    specs = {name: spec for k in range(layers) for name, spec in options.specs(k, degree).items()}
    assert [(name, spec.shape) for name, spec in specs.items()] == [
        (name, tuple(p.shape)) for name, p in rnn.named_parameters()
    ]
    for name, spec in specs.items():
        assert not spec.overlaps and not spec.partial
        gates = spec.shape[spec.dim] // units
        for i, (start, stop) in enumerate(balanced(units, degree)):
            rows = [row for a, b in spec.held(i) for row in range(a, b)]
            assert rows == [gate * units + unit for gate in range(gates) for unit in range(start, stop)], name
