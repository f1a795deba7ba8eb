"""Schedules as data: their order drawn out, what every one of them keeps, and how broken ones are refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridpar.pipeline.schedule import (
    Action,
    Kind,
    Schedule,
    build,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    read,
)

RANKS, MICROS, CHUNKS = st.integers(1, 6), st.integers(1, 12), st.integers(1, 4)


def every(ranks: int, microbatches: int, chunks: int) -> list[Schedule]:
    return [gpipe(ranks, microbatches), one_f_one_b(ranks, microbatches), interleaved(ranks, microbatches, chunks)]


def table(text: str) -> str:
    """A drawn table as CSV."""
    return "\n".join(",".join(line.split()) for line in text.strip().splitlines()) + "\n"


def test_1f1b_of_8_microbatches_on_4_ranks_is_the_picture():
    assert one_f_one_b(4, 8).to_csv() == table("""
        0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7 0R
        1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7 1R
        2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7 2R
        3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7 3R
    """)


def test_gpipe_does_all_forwards_and_then_all_backwards():
    assert gpipe(2, 3).to_csv() == table("""
        0F0 0F1 0F2 0B0 0B1 0B2 0R
        1F0 1F1 1F2 1B0 1B1 1B2 1R
    """)


def test_interleaved_goes_in_rounds_through_the_stages_of_a_rank():
    assert interleaved(2, 4, chunks=2).to_csv() == table("""
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 2R 0B2 0B3 0R
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 3R 1B2 1B3 1R
    """)


def test_an_odd_number_of_microbatches_makes_one_longer_round():
    assert interleaved(2, 3, chunks=2).to_csv() == table("""
        0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 2R 0B0 0B1 0B2 0R
        1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 3R 1B0 1B1 1B2 1R
    """)


def test_a_schedule_for_evaluation_has_the_forwards_only():
    schedule = forward_only(2, 2, chunks=2)
    assert schedule.forward_only and not gpipe(2, 2).forward_only
    assert schedule.to_csv() == table("""
        0F0 0F1 2F0 2F1
        1F0 1F1 3F0 3F1
    """)


def test_a_schedule_says_who_holds_what():
    schedule = interleaved(2, 4, chunks=3)
    assert (schedule.ranks, schedule.stages, schedule.stage_ranks) == (2, 6, (0, 1, 0, 1, 0, 1))
    assert schedule.stages_of(1) == (1, 3, 5)
    assert str(schedule).splitlines()[0] == "interleaved: 2 ranks, 6 stages, 4 microbatches"


@settings(deadline=None, max_examples=60)
@given(RANKS, MICROS, CHUNKS)
def test_every_schedule_is_valid_and_so_is_its_evaluation(ranks: int, microbatches: int, chunks: int):
    for schedule in every(ranks, microbatches, chunks):
        assert schedule.validate() is schedule
        evaluation = schedule.evaluation().validate()
        assert evaluation.forward_only and evaluation.stage_ranks == schedule.stage_ranks
        forwards = [[a for a in row if a.kind is Kind.FORWARD] for row in schedule.actions]
        assert [list(row) for row in evaluation.actions] == forwards


@settings(deadline=None, max_examples=60)
@given(RANKS, MICROS, CHUNKS)
def test_a_schedule_survives_csv_with_and_without_its_reductions(ranks: int, microbatches: int, chunks: int):
    for schedule in every(ranks, microbatches, chunks):
        assert Schedule.from_csv(schedule.to_csv(), schedule.name) == schedule
        without = re.sub(r",\d+R", "", schedule.to_csv())
        assert "R" not in without
        assert Schedule.from_csv(without, schedule.name) == schedule
        evaluation = schedule.evaluation()
        assert Schedule.from_csv(evaluation.to_csv(), evaluation.name) == evaluation


def test_empty_cells_and_spaces_in_a_csv_are_passed_over():
    text = "0F0,,,0B0\n, 1F0 ,1B0,\n"
    assert Schedule.from_csv(text, "1f1b") == one_f_one_b(2, 1)


def test_a_stage_may_live_on_any_rank():
    schedule = Schedule.from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n")
    assert schedule.stage_ranks == (0, 1, 1, 0)


def test_build_knows_the_names_and_files(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(one_f_one_b(2, 4).to_csv())
    assert build("gpipe", 2, 4) == gpipe(2, 4)
    assert build("1f1b", 2, 4) == one_f_one_b(2, 4)
    assert build("interleaved", 2, 4, chunks=2) == interleaved(2, 4, 2)
    assert build(str(file), 2, 4).actions == read(str(file)).actions == one_f_one_b(2, 4).actions
    with pytest.raises(ValueError, match="is for 2 ranks and 4 microbatches, and 2 ranks with 8 microbatches were"):
        build(str(file), 2, 8)
    with pytest.raises(ValueError, match="missing.csv cannot be read: .*No such file"):
        build(str(tmp_path / "missing.csv"), 2, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zb-h1", 2, 4), "no schedule is called 'zb-h1'; take gpipe, 1f1b, interleaved or a file"),
        (("1f1b", 2, 4, 2), "1f1b has 1 stage per rank and chunks=2 was asked for; use interleaved"),
        (("gpipe", 0, 4), "gpipe with ranks=0: there must be 1 or more"),
        (("interleaved", 2, 0, 2), "interleaved with microbatches=0: there must be 1 or more"),
        (("interleaved", 2, 4, 0), "interleaved with chunks=0: there must be 1 or more"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(arguments: tuple, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        build(*arguments)


BROKEN = {
    "an unknown cell": ("0F0 0B0\n1F0 1X0", "row 2, column 2: '1X0' is not an action"),
    "torch's split backward": ("0F0 0I0 0W0\n1F0 1B0", "row 1, column 2: '0I0' is not an action"),
    "a reduction with a microbatch": ("0F0 0B0 0R0", "row 1, column 3: '0R0' is not an action"),
    "a doubled forward": ("0F0 0F0 0B0\n1F0 1B0", "rank 0, position 1, 0F0: it was done already at position 0"),
    "a missing forward": ("0F0 0F1 0B0 0B1\n1F0 1B0 1B1", "rank 1, position 2, 1B1: its forward 1F1 does not come"),
    "a missing backward": ("0F0 0F1 0B0 0B1\n1F0 1F1 1B0", "rank 1: 1B1 is missing from its row"),
    "a backward before its forward": ("0F0 0B0\n1B0 1F0", "rank 1, position 0, 1B0: its forward 1F0 does not come"),
    "a stage on two ranks": ("0F0 0B0\n1F0 1B0 0F1", "rank 1, position 3, 0F1: stage 0 is held by rank 0"),
    "an early reduction": ("0F0 0F1 0B0 0R 0B1", "rank 0, position 3, 0R: the backward 0B1 does not come before it"),
    "a missing reduction": ("0F0 0B0 0R\n1F0 1B0", "rank 1: 1R is missing from its row"),
    "a doubled reduction": ("0F0 0B0 0R 0R", "rank 0, position 3, 0R: it was done already at position 2"),
    "a missing stage": ("0F0 0B0\n2F0 2B0", "no rank does stage 1, and the last stage is 2"),
    "a rank without stages": ("0F0 0B0\n,\n1F0 1B0", "rank 1 holds no stage; give it one or use fewer ranks"),
    "an empty file": ("", "0 stages and 0 microbatches"),
    "ranks that wait in a circle": (
        "0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1",
        "deadlock: rank 0 at position 1 (0B0) waits for 1B0, which rank 1 does later; "
        "rank 1 at position 0 (1F1) waits for 0F1, which rank 0 does later",
    ),
    "a rank that waits for itself": (
        "1F0 0F0 1B0 0B0",
        "deadlock: rank 0 at position 0 (1F0) waits for 0F0, which rank 0 does later",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_schedule_is_refused_with_its_place(what: str):
    text, words = BROKEN[what]
    with pytest.raises(ValueError, match="schedule mine.*" + re.escape(words)):
        Schedule.from_csv(table(text) if text else text, "mine")


def test_numbers_outside_the_schedule_are_refused():
    good = gpipe(1, 1)
    for row, words in (
        ((Action(Kind.FORWARD, 7, 0),), "rank 0, position 0, 7F0: there are stages 0 to 0 only"),
        ((Action(Kind.FORWARD, 0, 1),), "rank 0, position 0, 0F1: there are microbatches 0 to 0 only"),
        ((Action(Kind.FORWARD, 0),), "rank 0, position 0, 0F: there are microbatches 0 to 0 only"),
        ((*good.actions[0][:2], Action(Kind.REDUCE, 0, 0)), "0R0: a reduction is of a whole stage, write 0R"),
    ):
        with pytest.raises(ValueError, match=words):
            Schedule("mine", 1, (0,), (row,)).validate()
    with pytest.raises(ValueError, match="stage 1 is held by rank 3, and the ranks are 0 to 0"):
        Schedule("mine", 1, (0, 3), good.actions).validate()
