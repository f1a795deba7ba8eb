"""Collectives with their conjugates, and every layer against the plain one, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridpar.models.gpt import Attention
from hybridpar.seeds import Draw
from hybridpar.shard import Spec
from hybridpar.tensor import collectives
from hybridpar.tensor.attention import heads_held
from hybridpar.tensor.embedding import SequenceEmbedding, VocabularyEmbedding
from hybridpar.tensor.linear import ColumnLinear, RowLinear
from hybridpar.tensor.plan import apply
from hybridpar.tensor.sequence import Sequence
from hybridpar.wires.axis import Alone, Axis
from tests.against_one import CLOSE, compare, made, numbers, tensor_axis, whole
from tests.ranks import ranks

ALONE = Alone("tensor")
SHAPE = (3, 7, 5)


def adjoint(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """<f(x), y> and <x, f*(y)> on this rank, f* being what backward does."""
    x = x.requires_grad_()
    out = f(x)
    (grad,) = torch.autograd.grad(out, x, y)
    return (out.detach() * y).sum(), (x.detach() * grad).sum()


@ranks(2, 4)
def test_each_collective_and_its_backward_are_conjugate() -> None:
    """Over vectors of all ranks together. A tensor that is the same on all counts once: on each, 1/n of it."""
    axis = tensor_axis()
    mine = axis.index + 1
    start, stop = axis.piece(SHAPE[1])
    one, piece = 1 / axis.size, (3, stop - start, 5)
    same_x, same_y, own_x, own_y = (numbers(*SHAPE, seed=s) for s in (0, 50, mine, 50 + mine))
    piece_x, piece_y = numbers(*piece, seed=mine), numbers(*piece, seed=50 + mine)
    cases = {
        # name: function, x, y, weight of <f(x), y> per rank, weight of <x, f*(y)>
        "copy": (lambda x: collectives.copy(x, axis), same_x, own_y, 1, one),
        "sum_": (lambda x: collectives.sum_(x, axis), own_x, same_y, one, 1),
        "split": (lambda x: collectives.split(x, axis, 1), same_x, piece_y, 1, one),
        "gather": (lambda x: collectives.gather(x, axis, -2), piece_x, same_y, one, 1),
        "gather_sum": (lambda x: collectives.gather_sum(x, axis, 1), piece_x, own_y, 1, 1),
        "scatter_sum": (lambda x: collectives.scatter_sum(x, axis, -2), own_x, piece_y, 1, 1),
    }
    for name, (f, x, y, left, right) in cases.items():
        forward, backward = adjoint(f, x, y)
        forward, backward = axis.allreduce(forward * left), axis.allreduce(backward * right)
        torch.testing.assert_close(forward, backward, **CLOSE, msg=f"{name}: {forward} {backward}")


@ranks(2)
def test_collectives_take_any_strides_and_leave_their_input_alone() -> None:
    axis = tensor_axis()
    for name in ("copy", "sum_", "split", "gather", "gather_sum", "scatter_sum"):
        f = getattr(collectives, name)
        dims = () if name in ("copy", "sum_") else (1,)
        x = numbers(4, 6, 2, seed=axis.index).transpose(0, 2)
        before = x.clone()
        out = f(x.requires_grad_(), axis, *dims)
        grad = numbers(*out.shape[::-1]).permute(2, 1, 0)
        kept = grad.clone()
        out.backward(grad)
        torch.testing.assert_close(out, f(before, axis, *dims), rtol=0, atol=0)
        assert torch.equal(x, before) and torch.equal(grad, kept), name


@ranks(2)
def test_second_derivatives_pass_through_collectives() -> None:
    axis = tensor_axis()
    x = numbers(4, seed=1).requires_grad_()
    (first,) = torch.autograd.grad((collectives.copy(x, axis) ** 3 * (axis.index + 1)).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(collectives.copy(first, axis).sum() / axis.size, x)
    torch.testing.assert_close(first, 3 * 3 * x**2)
    torch.testing.assert_close(second, 3 * 6 * x)


def test_alone_collectives_return_their_input() -> None:
    x = numbers(2, 3)
    for name in ("copy", "sum_"):
        assert getattr(collectives, name)(x, ALONE) is x
    for name in ("split", "gather", "gather_sum", "scatter_sum"):
        assert getattr(collectives, name)(x, ALONE, 0) is x


class Pair(nn.Module):
    """A column layer that feeds a row layer."""

    def __init__(self, hidden: int, bias: bool = True, gated: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.gate = nn.Linear(6, hidden, bias) if gated else None
        self.up, self.down = nn.Linear(6, hidden, bias), nn.Linear(hidden, 6, bias)
        self.between, self.after = nn.Dropout(0.3), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:  # [b, l, 6] -> [b, l, 6]
        y = self.norm(x)
        y = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.after(self.down(self.between(y)))


PAIR = {"norm": "norm", "up": "column", "down": "row", "between": "hidden dropout", "after": "dropout"}


def run_on_tokens(x: Tensor, sequence: bool) -> Callable[[nn.Module, object, Axis], Tensor]:
    """Run a module on x [b, l, d], as pieces of the tokens where the plan was applied for that."""

    def run(model: nn.Module, applied: object, axis: Axis) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = model(collectives.split(leaf, axis, 1) if sequence else leaf)
        y = collectives.gather(y, axis, 1) if sequence else y
        weights = numbers(*x.shape, seed=3)
        (grad,) = torch.autograd.grad((y * weights).sum(), leaf, retain_graph=True)
        return (y * weights).sum() + (grad * weights).sum()  # so that the gradient of the input is compared too

    return run


@ranks(2, 4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    "hidden, bias, gated", [(8, True, False), (7, True, False), (9, False, False), (10, True, True)]
)
def test_column_and_row_layers_equal_plain_ones(hidden: int, bias: bool, gated: bool, sequence: bool) -> None:
    plan = {**PAIR, "gate": "column"} if gated else PAIR
    model = made(lambda: Pair(hidden, bias, gated))
    compare(model, plan, tensor_axis(), run_on_tokens(numbers(3, 7, 6), sequence), sequence)


@ranks(2)
def test_layers_keep_dtype_mode_and_frozen_weights() -> None:
    axis, linear = tensor_axis(), nn.Linear(4, 6).to(torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    for layer in (ColumnLinear(linear, axis), RowLinear(linear, axis)):
        assert layer.weight.dtype == torch.bfloat16 and not layer.training
        assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert linear.weight.shape == (6, 4)


def test_alone_a_layer_holds_the_very_parameters_of_the_plain_one() -> None:
    linear, embedding = nn.Linear(4, 6), nn.Embedding(5, 4)
    for layer in (ColumnLinear(linear, ALONE), RowLinear(linear, ALONE)):
        assert layer.weight is linear.weight and layer.bias is linear.bias
    assert VocabularyEmbedding(embedding, ALONE).weight is embedding.weight


@ranks(2)
def test_a_row_layer_says_that_its_input_is_not_cut() -> None:
    with pytest.raises(ValueError, match="blocks.0.down: 6 features come in and 3 of 6 are held here"):
        RowLinear(nn.Linear(6, 4), tensor_axis(), name="blocks.0.down")(torch.zeros(2, 6))


@ranks(4)
def test_what_is_too_small_for_the_axis_is_refused() -> None:
    axis = tensor_axis()
    with pytest.raises(ValueError, match="3 output features cannot be cut over tensor=4 at up; use tensor=3 or less"):
        ColumnLinear(nn.Linear(8, 3), axis, name="up")
    with pytest.raises(ValueError, match="a vocabulary of 2 cannot be cut over tensor=4 at token"):
        VocabularyEmbedding(nn.Embedding(2, 8), axis, name="token")


class Tokens(nn.Module):
    """Two embeddings, added."""

    def __init__(self, vocabulary: int, padding: int | None) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, 4, padding)
        self.position = nn.Embedding(16, 4, padding)

    def forward(self, ids: Tensor) -> Tensor:  # [b, l] -> [b, l, 4]
        return self.token(ids) + self.position(torch.arange(ids.shape[-1]))


@ranks(2, 4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("vocabulary, padding", [(12, None), (13, None), (13, 3)])
def test_embeddings_equal_plain_ones(vocabulary: int, padding: int | None, sequence: bool) -> None:
    ids = torch.randint(vocabulary, (3, 9), generator=torch.Generator().manual_seed(0))

    def run(model: nn.Module, applied: object, axis: Axis) -> Tensor:
        y = model(ids)
        y = collectives.gather(y, axis, 1) if sequence else y
        return (y * numbers(3, 9, 4)).sum()

    plan = {"token": "vocabulary", "position": "sequence"}
    compare(made(lambda: Tokens(vocabulary, padding)), plan, tensor_axis(), run, sequence)


def test_embeddings_refuse_what_would_be_wrong() -> None:
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        for layer in (lambda e: VocabularyEmbedding(e, ALONE), SequenceEmbedding):
            with pytest.raises(ValueError, match=f"embedding: {next(iter(option))}=.* does not go with style"):
                layer(nn.Embedding(5, 4, **option))
    with pytest.raises(ValueError, match="token: ids from 0 to 5 for a vocabulary of 5"):
        VocabularyEmbedding(nn.Embedding(5, 4), ALONE, name="token")(torch.tensor([0, 5]))


class Separate(nn.Module):
    """Attention with a layer for each of queries, keys and values."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, 2
        self.q, self.out = nn.Linear(6, heads * 2, bias=False), nn.Linear(heads * 2, 6)
        self.k, self.v = (nn.Linear(6, kv_heads * 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [b, l, 6] -> [b, l, 6]
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


@ranks(2, 4)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 6), (8, 4), (6, 3), (6, 2), (6, 1), (5, 1)])
def test_attention_by_heads_equals_plain_attention(heads: int, kv_heads: int, sequence: bool) -> None:
    axis = tensor_axis()
    fused = made(lambda: nn.ModuleDict({"attention": Attention(heads * 2, heads, kv_heads, 0.2)}))
    separate = made(lambda: nn.ModuleDict({"attention": Separate(heads, kv_heads)}))
    for model, width in ((fused, heads * 2), (separate, 6)):
        run = run_on_tokens(numbers(3, 5, width), sequence)
        compare(model, {"attention": "attention"}, axis, lambda m, *rest, run=run: run(m["attention"], *rest), sequence)


def test_heads_stay_with_the_key_values_they_use() -> None:
    assert heads_held(6, 6, 4) == (((0, 2), (0, 2)), ((2, 4), (2, 4)), ((4, 5), (4, 5)), ((5, 6), (5, 6)))
    assert heads_held(8, 2, 2) == (((0, 4), (0, 1)), ((4, 8), (1, 2)))
    assert heads_held(6, 2, 4) == (((0, 2), (0, 1)), ((2, 3), (0, 1)), ((3, 5), (1, 2)), ((5, 6), (1, 2)))
    for heads in range(1, 25):
        for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
            for degree in range(1, heads + 1):
                check_heads(heads, kv_heads, degree)


def check_heads(heads: int, kv_heads: int, degree: int) -> None:
    held = heads_held(heads, kv_heads, degree)
    assert [q for (a, b), _ in held for q in range(a, b)] == list(range(heads))
    for (q0, q1), (k0, k1) in held:
        local = (q1 - q0) // (k1 - k0)
        assert local * (k1 - k0) == q1 - q0
        assert all(k0 + (q - q0) // local == q // (heads // kv_heads) for q in range(q0, q1))


def test_attention_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="6 heads cannot be cut over tensor=8 at blocks.0.attention"):
        heads_held(6, 6, 8, "blocks.0.attention")
    with pytest.raises(ValueError, match="not a multiple of 4 key-value heads"):
        heads_held(6, 4, 2)


@ranks(2)
def test_specs_of_shared_key_value_heads_are_partial() -> None:
    axis = tensor_axis()
    for kv_heads, partial in ((2, False), (1, True)):
        layer = Separate(4, kv_heads)
        module, before = nn.ModuleDict({"a": layer}), deepcopy(layer)
        specs = apply(module, {"a": "attention"}, axis, Draw(0)).specs
        assert specs["a.k.weight"].partial is partial and not specs["a.q.weight"].partial
        assert whole(layer.q.weight.detach(), specs["a.q.weight"], axis).equal(before.q.weight)


@ranks(2, 4)
def test_a_stage_that_begins_with_a_mask_asks_how_long_the_sequence_is() -> None:
    axis = tensor_axis()
    draw = Draw(0, samples=torch.arange(2))
    sequence = Sequence(axis, draw)
    for length in (5, 4, 7, 6):
        draw.samples = torch.arange(2)
        start, stop = axis.piece(length)
        assert sequence.ranges(stop - start) == ((start, stop),)


def test_the_spec_of_a_row_bias_is_partial_under_sequence_parallelism() -> None:
    linear, sequence = nn.Linear(4, 6), Sequence(ALONE, Draw(0))
    assert RowLinear(linear, ALONE).specs()["bias"] == Spec("bias", (6,))
    assert RowLinear(linear, ALONE, sequence=sequence).specs()["bias"] == Spec("bias", (6,), partial=True)
