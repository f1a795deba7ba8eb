"""Randomness is a function of what is drawn for: parts equal parts of the whole, and it looks random."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hybridpar.seeds import Draw, _gauss, _log, normal, uniform

SHAPE = (4, 12, 16, 40)
MASK = [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
NORMAL = [0.22210382254877328, -0.5480857483406875, 0.726848453530977]


def drawn(step: int = 0, samples: int = 4, seed: int = 0) -> Draw:
    return Draw(seed, step, torch.arange(samples))


def deviation(a: Tensor, b: Tensor) -> float:
    """The correlation of two balanced masks, in standard deviations of that of independent ones."""
    a, b = a.double().flatten() * 2 - 1, b.double().flatten() * 2 - 1
    return float((a * b).mean()) * math.sqrt(len(a))


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2])
def test_a_part_of_a_mask_is_that_part_of_the_whole_mask(dim: int) -> None:
    whole = drawn().keep("a", SHAPE, 0.3)
    shape = list(SHAPE)
    shape[dim] = 5
    part = drawn().keep("a", tuple(shape), 0.3, dim, ((7, 10), (1, 3)))
    assert torch.equal(part, whole.index_select(dim, torch.tensor([7, 8, 9, 1, 2])))


def test_rows_follow_their_samples_into_any_microbatch() -> None:
    whole = drawn().keep("a", SHAPE, 0.3)
    draw = Draw(0, 0, torch.tensor([3, 1]))
    assert torch.equal(draw.keep("a", (2, *SHAPE[1:]), 0.3), whole[[3, 1]])


def test_masks_do_not_change_from_release_to_release() -> None:
    assert drawn(samples=1).keep("a", (1, 16), 0.5).int().tolist() == [MASK]
    assert normal(0, "w", (3,), dtype=torch.float64).tolist() == NORMAL


def test_no_two_samples_steps_sites_or_seeds_share_a_mask() -> None:
    masks = [drawn(step, 64, seed).keep(site, (64, 64), 0.5) for step in (0, 1) for site in "ab" for seed in (0, 1)]
    assert len({tuple(row) for mask in masks for row in mask.int().tolist()}) == 64 * 8


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p: float) -> None:
    scores = []
    for seed in range(40):
        for shape in ((4, 32, 64), (4, 4096), (4, 300, 3), (4, 2, 3, 40, 8)):
            mask = drawn(seed=seed).keep("a", shape, p).double()
            scores.append((float(mask.mean()) - 1 + p) / math.sqrt(p * (1 - p) / mask.numel()))
    scores = torch.tensor(scores)
    assert abs(float(scores.mean())) < 4 / math.sqrt(len(scores))
    assert 0.8 < float(scores.std()) < 1.2
    assert float(scores.abs().max()) < 4.5


def test_p_of_zero_keeps_all_and_of_one_nothing() -> None:
    assert drawn().keep("a", SHAPE, 0.0).all() and not drawn().keep("a", SHAPE, 1.0).any()


def test_neighbours_samples_steps_and_sites_are_independent() -> None:
    draw = drawn(samples=32)
    mask = draw.keep("a", (32, 32, 32), 0.5)
    for lag in (1, 2, 3, 4, 8, 16):
        assert abs(deviation(mask[lag:], mask[:-lag])) < 4.5, f"samples {lag} apart"
        assert abs(deviation(mask[:, lag:], mask[:, :-lag])) < 4.5, f"rows {lag} apart"
        assert abs(deviation(mask[..., lag:], mask[..., :-lag])) < 4.5, f"columns {lag} apart"
    assert abs(deviation(mask, draw.keep("b", (32, 32, 32), 0.5))) < 4.5
    assert abs(deviation(mask, drawn(1, 32).keep("a", (32, 32, 32), 0.5))) < 4.5
    assert abs(deviation(mask, drawn(0, 32, 1).keep("a", (32, 32, 32), 0.5))) < 4.5


def test_long_rows_have_no_lag_that_repeats() -> None:
    masks = [Draw(seed, 0, torch.zeros(1, dtype=torch.int64)).keep("a", (1, 1 << 15), 0.5) for seed in range(24)]
    for lag in [1 << n for n in range(14)] + [3, 255, 257]:
        total = sum(deviation(mask[:, lag:], mask[:, :-lag]) for mask in masks)
        assert abs(total) / math.sqrt(len(masks)) < 4.5, f"lag {lag}"


def test_large_sample_ids_and_negative_ones_are_ids_like_others() -> None:
    draw = Draw(0, 0, torch.tensor([2**62, -1, 2**31, 0]))
    mask = draw.keep("a", (4, 256), 0.5)
    assert len({tuple(row) for row in mask.int().tolist()}) == 4


@pytest.mark.parametrize("draw, words", [(Draw(0), "no samples are known"), (drawn(samples=3), "3 samples are known")])
def test_rows_without_samples_are_refused(draw: Draw, words: str) -> None:
    with pytest.raises(ValueError, match=f"blocks.0.dropout: a mask of shape .*{words}"):
        draw.keep("blocks.0.dropout", (4, 8), 0.1)


def test_parts_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a: dim 1 of \[4, 8\] cannot be the 3 indices"):
        drawn().keep("a", (4, 8), 0.1, 1, ((0, 3),))


def test_a_turn_begins_with_new_samples() -> None:
    draw = drawn()
    before = draw.turn
    draw.samples = draw.samples
    assert draw.turn != before


@pytest.mark.parametrize("make", [normal, uniform])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_slice_of_initial_weights_is_that_slice_of_the_whole(make, dtype: torch.dtype) -> None:
    whole = make(3, "w", (301, 257), dtype=dtype)
    rows = make(3, "w", (301, 257), 0, ((250, 301), (3, 4)), dtype=dtype)
    columns = make(3, "w", (301, 257), 1, ((5, 108),), dtype=dtype)
    assert torch.equal(rows, torch.cat([whole[250:], whole[3:4]])) and torch.equal(columns, whole[:, 5:108])
    assert torch.equal(make(3, "b", (301,), 0, ((100, 200),), dtype=dtype), make(3, "b", (301,), dtype=dtype)[100:200])


def test_initial_weights_have_the_moments_of_their_distribution() -> None:
    x, n = normal(0, "w", (200, 160), dtype=torch.float64), 32_000
    assert abs(float(x.mean())) < 4.5 / math.sqrt(n)
    assert abs(float((x**2).mean()) - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 4.5 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 4.5 * math.sqrt(96 / n)
    u = uniform(0, "w", (200, 160), low=-1.0, high=3.0, dtype=torch.float64)
    assert abs(float(u.mean()) - 1) < 4.5 * math.sqrt(16 / 12 / n) and -1 <= float(u.min()) < float(u.max()) < 3


def test_the_exact_operations_agree_with_torch_to_rounding() -> None:
    u = torch.cat([uniform(0, "u", (30_000,), dtype=torch.float64) + 2.0**-53, torch.tensor([1.0, 2.0**-53])])
    torch.testing.assert_close(_log(u), u.log(), rtol=1e-14, atol=1e-15)
    assert _gauss(torch.tensor([-1])).isfinite().all() and _gauss(torch.tensor([0])).isfinite().all()


def test_mean_and_std_scale_initial_weights() -> None:
    x = normal(0, "w", (10, 10), dtype=torch.float64)
    torch.testing.assert_close(normal(0, "w", (10, 10), mean=2.0, std=0.5, dtype=torch.float64), x * 0.5 + 2)
