"""The benchmark's harness: its arithmetic, and a run of a few tiny steps. Nothing is said about speed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import report, verdict
from benchmarks.candidates import BARS, CANDIDATES, LIMIT, Bar, Candidate
from benchmarks.compare import compare, main
from benchmarks.work import Work

TINY = Work(width=32, depth=3, heads=4, tokens=16, vocabulary=64, batch=8, microbatches=4)
TINY_OPTIONS = [part for name, value in asdict(TINY).items() for part in (f"--{name}", str(value))]


def test_a_ratio_is_taken_within_each_round() -> None:
    assert verdict.ratios([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == verdict.Spread(median=1.0, low=0.5, high=2.0)


def test_the_bubble_of_two_stages_adds_one_slot() -> None:
    assert verdict.bubble(8, stages=2) == 9 / 8
    assert verdict.bubble(1, stages=4) == 4


def test_a_bar_on_the_limit_of_a_pipeline_counts_its_bubble() -> None:
    bar = Bar("pipeline", LIMIT, 1.0, bubble=True)
    (outcome,) = verdict.judge([bar], {"pipeline": [9.0], LIMIT: [8.0]}, microbatches=8)
    assert outcome.passed and outcome.ratio.median == 1.0


def test_a_bar_without_both_sides_is_not_judged() -> None:
    assert verdict.judge(BARS, {"data": [1.0]}, microbatches=8) == []


def test_every_bar_names_candidates_that_exist() -> None:
    names = {candidate.name for candidate in CANDIDATES}
    assert {name for bar in BARS for name in (bar.ours, bar.rival)} <= names


@pytest.mark.parametrize("seen", [[2.0, 1.5], [math.nan, 1.0], [2.0, math.nan]])
def test_losses_that_differ_are_told_with_their_numbers(seen: list[float]) -> None:
    pair = (Candidate("right", "", ""), Candidate("wrong", "", ""))
    told = verdict.disagreement(pair, {"right": [2.0, 1.0], "wrong": seen})
    assert told and "wrong at step" in told and "do not do the same work" in told


def test_of_ranks_that_never_meet_only_the_first_loss_counts() -> None:
    pair = (Candidate("limit", "", "", learns_alone=True), Candidate("right", "", ""))
    assert verdict.disagreement(pair, {"limit": [2.0, 1.5], "right": [2.0, 1.0]}) is None
    assert verdict.disagreement(pair, {"limit": [2.1, 1.0], "right": [2.0, 1.0]})


def test_the_cut_in_two_stages_weighs_the_head() -> None:
    assert Work().cut(2) == (0, 6, 10)  # the embedding and 5 blocks: the head of 6144 words weighs about two blocks
    assert Work(vocabulary=64).cut(2) == (0, 5, 10)


def test_the_work_survives_the_way_to_the_ranks() -> None:
    assert Work.from_json(TINY.to_json()) == TINY


def test_microbatches_that_two_replicas_cannot_share_are_refused() -> None:
    refused = CliRunner().invoke(main, ["--microbatches", "3", "--batch", "9"])
    assert refused.exit_code == 2 and "must be even and divide the batch" in refused.output


def test_an_unknown_candidate_is_refused_with_the_known_ones() -> None:
    refused = CliRunner().invoke(main, ["--only", "ddp,warp"])
    assert refused.exit_code == 2 and "warp: the candidates are limit" in refused.output


@pytest.mark.timeout(400)
def test_all_kinds_of_candidates_train_alike(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    names = ["limit", "data", "ddp", "zero3", "fsdp2", "tensor", "dtensor", "pipeline", "interleaved", "torch-1f1b"]
    options = ["--rounds", "1", "--steps", "2", "--patience", "0", "--json", str(path), "--markdown"]
    ran = CliRunner().invoke(main, [*TINY_OPTIONS, *options, "--only", ",".join(names)], catch_exceptions=False)
    told = json.loads(path.read_text())
    assert ran.exit_code == 0, ran.output
    assert not told["failures"] and told["disagreement"] is None
    assert all(len(told["losses"][name]) == 6 for name in names)  # 2 rounds, the first not counted, 1 + 2 steps
    assert len(told["bars"]) == len(BARS)
    assert ran.output.count("\n|") == len(names) + len(BARS) + 4  # two tables, each with a header and a rule


@pytest.mark.timeout(400)
def test_a_candidate_that_fails_is_named_with_its_log_and_the_others_go_on() -> None:
    broken = Candidate("broken", "raises", "torch_sides:no_such_side")
    whole = CANDIDATES[1]
    result = compare(TINY, (broken, whole), rounds=1, steps=1, warmup=0, patience=0, tell=lambda what: None)
    assert "no_such_side" in result.failures["broken"]
    assert len(result.turns[whole.name]) == 1 and not result.passed
    assert report.speeds(result)[1][0][2] == "failed"
