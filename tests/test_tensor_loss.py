"""Cross entropy over a cut vocabulary equals torch's over a whole one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybridpar.shard import balanced
from hybridpar.tensor.loss import CrossEntropy
from hybridpar.wires.axis import Axis
from tests.against_one import CLOSE, numbers, tensor_axis
from tests.ranks import ranks

IGNORED = -100


def data(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits [3, 5, v], far from zero, and targets [3, 5], some of them ignored."""
    targets = torch.randint(vocabulary, (3, 5), generator=torch.Generator().manual_seed(1))
    targets[0, :2] = targets[2, 4] = IGNORED
    return numbers(3, 5, vocabulary) * 5 + 1000, targets


def balanced_parts(vocabulary: int, axis: Axis) -> list[list[tuple[int, int]]]:
    return [[piece] for piece in balanced(vocabulary, axis.size)]


def torch_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(
        leaf.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    return loss.detach(), torch.autograd.grad(loss * 0.25, leaf)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sum_and_its_gradient_are_those_of_torch(smoothing: float) -> None:
    logits, targets = data(11)
    expected, gradient = torch_loss(logits, targets, smoothing)
    loss = CrossEntropy(label_smoothing=smoothing)
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, targets)
    (value * 0.25).backward()
    torch.testing.assert_close(value.detach(), expected, **CLOSE)
    torch.testing.assert_close(leaf.grad, gradient, **CLOSE)
    assert loss.weight(targets) == 12.0 and isinstance(loss.weight(targets), float)


@ranks(2, 4)
@pytest.mark.parametrize("vocabulary", [12, 13, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_cut_vocabulary_gives_the_same_loss_on_every_index(vocabulary: int, smoothing: float) -> None:
    axis = tensor_axis()
    logits, targets = data(vocabulary)
    expected, gradient = torch_loss(logits, targets, smoothing)
    start, stop = axis.piece(vocabulary)
    leaf = logits[..., start:stop].clone().requires_grad_()
    loss = CrossEntropy(label_smoothing=smoothing).cut(axis, balanced_parts(vocabulary, axis))
    value = loss(leaf, targets)
    (value * 0.25).backward()
    torch.testing.assert_close(value.detach(), expected, **CLOSE)
    torch.testing.assert_close(leaf.grad, gradient[..., start:stop], **CLOSE)


@ranks(2)
def test_an_index_may_hold_several_ranges_of_the_vocabulary() -> None:
    axis = tensor_axis()
    parts = [[(6, 9), (0, 2)], [(2, 6), (9, 13)]]
    logits, targets = data(13)
    columns = torch.cat([torch.arange(a, b) for a, b in parts[axis.index]])
    leaf = logits[..., columns].requires_grad_()
    value = CrossEntropy().cut(axis, parts)(leaf, targets)
    (value * 0.25).backward()
    expected, gradient = torch_loss(logits, targets)
    torch.testing.assert_close(value.detach(), expected, **CLOSE)
    torch.testing.assert_close(leaf.grad, gradient[..., columns], **CLOSE)


@ranks(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_floats_have_statistics_in_single_precision(dtype: torch.dtype) -> None:
    """The logits' rounding is all that is lost: against fp64 on the rounded logits the loss is right to fp32."""
    axis = tensor_axis()
    logits, targets = numbers(3, 5, 400).to(dtype), data(400)[1]
    expected, gradient = torch_loss(logits.double(), targets)
    start, stop = axis.piece(400)
    leaf = logits[..., start:stop].clone().requires_grad_()
    value = CrossEntropy().cut(axis, balanced_parts(400, axis))(leaf, targets)
    (value * 0.25).backward()
    assert value.dtype == torch.float32 and leaf.grad.dtype == dtype
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double(), gradient[..., start:stop], rtol=2**-8, atol=1e-6)


def test_many_rows_are_worked_on_in_blocks() -> None:
    logits, targets = numbers(2, 300, 1000), torch.arange(600).view(2, 300)
    leaf = logits.clone().requires_grad_()
    value = CrossEntropy()(leaf, targets)
    (value * 0.25).backward()
    expected, gradient = torch_loss(logits, targets)
    torch.testing.assert_close(value.detach(), expected, **CLOSE)
    torch.testing.assert_close(leaf.grad, gradient, **CLOSE)


def test_ignored_tokens_alone_give_zero_and_no_gradient() -> None:
    leaf = numbers(2, 3, 4).requires_grad_()
    value = CrossEntropy()(leaf, torch.full((2, 3), IGNORED))
    value.backward()
    assert float(value.detach()) == 0 and not leaf.grad.any()


def test_the_logits_are_left_as_they_were() -> None:
    logits, targets = data(11)
    leaf = logits.clone().requires_grad_()
    CrossEntropy()(leaf, targets).backward()
    assert torch.equal(leaf.detach(), logits)


def test_wrong_targets_are_refused() -> None:
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="target 4 is outside the vocabulary of 4 and not ignore_index=-100"):
        CrossEntropy()(logits, torch.tensor([[0, 1, 2], [3, 4, 0]]))
    with pytest.raises(ValueError, match=r"whole numbers of shape \[2, 3\]"):
        CrossEntropy()(logits, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="torch.float32"):
        CrossEntropy()(logits, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="label_smoothing=2 is not between 0 and 1"):
        CrossEntropy(label_smoothing=2)
