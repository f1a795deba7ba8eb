"""The min-max cut against all cuts there are."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridpar.pipeline.partition import level, partition


def seconds(costs: list[int], cut: tuple[int, ...], speeds: list[int]) -> list[float]:
    return [sum(costs[a:b]) / speed for a, b, speed in zip(cut, cut[1:], speeds)]


@settings(deadline=None, max_examples=300)
@given(st.data(), st.lists(st.integers(0, 20), min_size=1, max_size=9))
def test_no_cut_has_a_smaller_slowest_stage_nor_among_equals_is_more_even(data, costs: list[int]):
    stages = data.draw(st.integers(1, len(costs)))
    speeds = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=stages, max_size=stages))  # exact divisions
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]

    def badness(cut: tuple[int, ...]) -> tuple[float, float]:
        taken = seconds(costs, cut, speeds)
        return max(taken), pytest.approx(sum(s * s for s in taken))

    found = partition(costs, stages, speeds)
    assert found in cuts
    slowest = min(max(seconds(costs, cut, speeds)) for cut in cuts)
    assert max(seconds(costs, found, speeds)) == slowest
    evenest = min(sum(s * s for s in t) for cut in cuts if max(t := seconds(costs, cut, speeds)) == slowest)
    assert badness(found) == (slowest, evenest)


def test_equal_layers_are_cut_evenly():
    assert partition([1.0] * 8, 4) == (0, 2, 4, 6, 8)
    assert partition([1.0] * 8, 8) == tuple(range(9))
    assert partition([0.0] * 4, 2) in [(0, 1, 4), (0, 2, 4), (0, 3, 4)]


def test_a_heavy_head_gets_a_stage_of_its_own_and_the_rest_is_even():
    assert partition([1, 1, 1, 1, 10], 3) == (0, 2, 4, 5)
    assert partition([10, 1, 1, 1, 1], 3) == (0, 1, 3, 5)


def test_a_rank_of_twice_the_speed_gets_twice_the_layers():
    assert partition([1] * 9, 2, speeds=[2, 1]) == (0, 6, 9)
    assert partition([1] * 9, 2, speeds=[1, 2]) == (0, 3, 9)


def test_a_slow_rank_gets_one_layer_even_where_more_before_it_costs_less():
    assert partition([1, 100, 1], 2, speeds=[100, 0.01]) == (0, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 1, 1], 5), "5 stages cannot be cut from 3 layers, each stage needs one at least; use a pipeline of 3"),
        (([1, 1, 1], 0), "0 stages cannot be cut"),
        (([1, -1, 1], 2), "layer 1 costs -1; costs are finite and not negative"),
        (([1, float("nan")], 2), "layer 1 costs nan"),
        (([1, 1], 2, [1.0]), "1 speeds were given for 2 stages"),
        (([1, 1], 2, [1.0, 0.0]), "stage 1 has speed 0.0; speeds are finite and above 0"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_sentence(arguments: tuple, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        partition(*arguments)


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=14), st.integers(2, 3), st.integers(1, 2))
def test_leveling_never_makes_the_busiest_rank_busier(costs: list[float], ranks: int, chunks: int) -> None:
    homes = list(range(ranks)) * chunks
    cut = partition(costs, len(homes))
    leveled = level(costs, cut, homes)
    assert [leveled[0], leveled[-1]] == [0, len(costs)] and all(a < b for a, b in zip(leveled, leveled[1:]))

    def busiest(cut: tuple[int, ...]) -> float:
        stages = [sum(costs[a:b]) for a, b in zip(cut, cut[1:])]
        return max(sum(s for s, h in zip(stages, homes) if h == home) for home in homes)

    assert busiest(leveled) <= busiest(cut) * (1 + 1e-12)


def test_a_head_that_weighs_two_blocks_is_not_put_on_the_busier_rank() -> None:
    costs = [0.0, *[1.0] * 8, 1.9]
    leveled = level(costs, partition(costs, 6), [0, 1] * 3)
    assert sum(costs[leveled[4] : leveled[5]] + costs[leveled[2] : leveled[3]] + costs[leveled[0] : leveled[1]]) == 5
