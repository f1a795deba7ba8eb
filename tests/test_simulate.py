"""The simulated time of schedules: pictures, formulas, memory, and what a cost must be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridpar.pipeline.action import Action, Kind
from hybridpar.pipeline.schedule import Schedule, gpipe, interleaved, one_f_one_b
from hybridpar.pipeline.simulate import Cost, held, simulate
from hybridpar.trace.spans import Span, Trace
from hybridpar.trace.text import gantt

RANKS, MICROS, CHUNKS = st.integers(1, 6), st.integers(1, 12), st.integers(1, 4)


def even(schedule: Schedule, **seconds: float) -> Trace:
    return simulate(schedule, Cost.even(schedule.stages, schedule.ranks, **seconds))


def drawn(trace: Trace, width: int = 80) -> str:
    return "\n".join(line for line in gantt(trace, width=width).splitlines() if "|" in line)


def picture(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_1f1b_of_8_microbatches_on_4_ranks_takes_the_time_of_the_picture():
    assert drawn(even(one_f_one_b(4, 8))) == picture("""
        rank 0 |0-1-2-3-            0===4-1===5-2===6-3===7-4===  5===  6===  7===|
        rank 1 |  0-1-2-        0===3-1===4-2===5-3===6-4===7-5===  6===  7===    |
        rank 2 |    0-1-    0===2-1===3-2===4-3===5-4===6-5===7-6===  7===        |
        rank 3 |      0-0===1-1===2-2===3-3===4-4===5-5===6-6===7-7===            |
    """)


def test_gpipe_of_8_microbatches_on_4_ranks_takes_the_time_of_the_picture():
    assert drawn(even(gpipe(4, 8))) == picture("""
        rank 0 |0-1-2-3-4-5-6-7-                  0===1===2===3===4===5===6===7===|
        rank 1 |  0-1-2-3-4-5-6-7-            0===1===2===3===4===5===6===7===    |
        rank 2 |    0-1-2-3-4-5-6-7-      0===1===2===3===4===5===6===7===        |
        rank 3 |      0-1-2-3-4-5-6-7-0===1===2===3===4===5===6===7===            |
    """)


def test_interleaved_2_by_2_takes_the_time_of_the_picture():
    assert drawn(even(interleaved(2, 4, chunks=2))) == picture("""
        rank 0 |0a1a0b1b2a  0b==3a1b==2b0a==3b1a==  2b==  3b==2a==3a==|
        rank 1 |  0a1a0b0b==1b1b==2a0a==3a1a==2b2b==3b3b==2a==3a==    |
    """)


def test_an_evaluation_is_a_staircase():
    assert drawn(even(one_f_one_b(3, 3).evaluation())) == picture("""
        rank 0 |0---1---2---        |
        rank 1 |    0---1---2---    |
        rank 2 |        0---1---2---|
    """)


@settings(deadline=None, max_examples=60)
@given(RANKS, MICROS, CHUNKS)
def test_the_idle_share_is_what_the_papers_say(ranks: int, microbatches: int, chunks: int):
    wait = ranks - 1
    for schedule in (gpipe(ranks, microbatches), one_f_one_b(ranks, microbatches)):
        assert even(schedule).bubble() == pytest.approx(wait / (microbatches + wait))
    if microbatches >= ranks:  # the paper has it for multiples of `ranks`; equal rounds keep it for the others too
        work = chunks * microbatches
        assert even(interleaved(ranks, microbatches, chunks)).bubble() == pytest.approx(wait / (work + wait))


@settings(deadline=None, max_examples=60)
@given(RANKS, MICROS, CHUNKS)
def test_rank_p_holds_at_most_so_many_activations(ranks: int, microbatches: int, chunks: int):
    assert held(gpipe(ranks, microbatches)) == (microbatches,) * ranks
    assert held(one_f_one_b(ranks, microbatches)) == tuple(min(microbatches, ranks - p) for p in range(ranks))
    longest = -(-microbatches // max(1, microbatches // ranks))
    for p, count in enumerate(held(interleaved(ranks, microbatches, chunks))):
        assert count <= 2 * (ranks - 1 - p) + (chunks - 1) * longest + 1


times = st.floats(0.1, 3.0)


@settings(deadline=None, max_examples=60)
@given(st.data(), RANKS, MICROS, CHUNKS)
def test_a_trace_keeps_every_dependency_under_any_cost(data, ranks: int, microbatches: int, chunks: int):
    schedule = interleaved(ranks, microbatches, chunks)

    def draw(n: int) -> tuple[float, ...]:
        return tuple(data.draw(st.lists(times, min_size=n, max_size=n)))

    S = schedule.stages
    cost = Cost(draw(S), draw(S), tuple(draw(ranks) for _ in range(ranks)), draw(S))
    trace = simulate(schedule, cost)
    spans = {Action(Kind(s.kind), s.stage, s.micro): s for s in trace.spans}
    assert len(spans) == len(trace.spans) == S * (2 * microbatches + 1)
    for action, span in spans.items():
        assert span.seconds == pytest.approx(cost.seconds(action))
        for need in action.needs(S, microbatches):
            before = spans[need]
            assert span.start >= before.end + cost.transfer[before.rank][span.rank] - 1e-9
    for rank in range(ranks):
        work = [s for s in trace.spans if s.rank == rank and s.kind != "R"]
        assert all(a.end <= b.start for a, b in zip(work, work[1:]))
    assert trace.makespan >= max(map(trace.busy, trace.ranks)) >= trace.ideal - 1e-9


def test_a_message_takes_its_time_and_does_not_hold_its_sender():
    trace = even(gpipe(2, 2).evaluation(), forward=1.0, transfer=0.5)
    assert [(s.rank, s.start) for s in trace.spans] == [(0, 0.0), (0, 1.0), (1, 1.5), (1, 2.5)]


def test_a_reduction_goes_on_beside_the_backwards_of_other_stages():
    trace = even(interleaved(1, 1, chunks=2), forward=1.0, backward=2.0, reduce=3.0)
    assert [(f"{s.stage}{s.kind}", s.start, s.end) for s in trace.spans] == [
        ("0F", 0.0, 1.0),
        ("1F", 1.0, 2.0),
        ("1B", 2.0, 4.0),
        ("0B", 4.0, 6.0),
        ("1R", 4.0, 7.0),
        ("0R", 7.0, 10.0),  # one after another
    ]


def test_a_measured_trace_gives_the_cost_to_simulate_it():
    schedule = one_f_one_b(2, 3)
    cost = Cost((1.0, 1.5), (2.0, 2.5), Cost.even(2, 2, transfer=0.25).transfer, (0.5, 0.75))
    measured = simulate(schedule, cost)
    assert Cost.measured(measured, ranks=2, transfer=0.25) == cost
    assert simulate(schedule, Cost.measured(measured, ranks=2, transfer=0.25)) == measured


def test_a_deadlock_is_named_also_without_validation():
    rows = Schedule.from_csv("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n").actions
    crossed = Schedule("crossed", 2, (0, 1), (rows[0][:1] + rows[0][2:3] + rows[0][1:2] + rows[0][3:], rows[1]))
    with pytest.raises(ValueError, match=r"rank 0 at position 1 \(0B0\) waits for 1B0, which rank 1 does later; "):
        even(crossed)


def test_a_cost_for_other_numbers_is_refused():
    with pytest.raises(ValueError, match="the cost has 3 forward times and schedule gpipe has 2 stages"):
        simulate(gpipe(2, 2), Cost.even(stages=3, ranks=2))
    with pytest.raises(ValueError, match="transfer is not a table of 2 x 2 ranks"):
        simulate(gpipe(2, 2), Cost.even(stages=2, ranks=3))
    with pytest.raises(ValueError, match=r"backward\[0\] takes -1.0 seconds"):
        Cost.even(1, 1, backward=-1.0)


def test_a_span_lasts_from_its_start_to_its_end():
    assert Span(0, "F", 0, 0, 1.0, 3.5).seconds == 2.5
