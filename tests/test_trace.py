"""Traces: their figures, their pictures, and the files they are written to."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.pipeline.schedule import gpipe, interleaved, one_f_one_b
from hybridpar.trace.chrome import chrome
from hybridpar.trace.report import predict, simulate
from hybridpar.trace.spans import Span, Trace, duration, join
from hybridpar.trace.svg import svg
from hybridpar.trace.text import gantt

UNEVEN = Trace(
    (
        Span(0, "F", 0, 0, 5.000, 5.011),
        Span(1, "F", 1, 0, 5.012, 5.024),
        Span(1, "B", 1, 0, 5.024, 5.051),
        Span(0, "B", 0, 0, 5.053, 5.074),
        Span(1, "R", 1, None, 5.051, 5.071),
        Span(0, "R", 0, None, 5.074, 5.080),
    ),
    "measured",
)


def test_a_trace_knows_its_figures():
    assert UNEVEN.makespan == pytest.approx(0.080)
    assert UNEVEN.busy(0) == pytest.approx(0.032) and UNEVEN.busy(1) == pytest.approx(0.039)
    assert UNEVEN.bubble() == pytest.approx(1 - 0.0355 / 0.080)
    assert UNEVEN.ideal == pytest.approx(UNEVEN.makespan * (1 - UNEVEN.bubble()))
    assert UNEVEN.ranks == (0, 1) and UNEVEN.microbatches == 1
    assert Trace(()).makespan == Trace(()).bubble() == 0.0


def test_a_measured_trace_is_drawn_with_rounded_ends_from_its_first_start():
    assert gantt(UNEVEN, width=50).splitlines() == [
        "measured: 80 ms, idle 55.6 %, work 35.5 ms per rank",
        "rank 0 |0-----                     0==========   |",
        "reduce |                                      ~~~|",
        "rank 1 |      0-----0=============               |",
        "reduce |                          ~~~~~~~~~~     |",
        "0- forward of microbatch 0, 0= its backward, ~ reduction of gradients",
    ]


def test_two_traces_are_drawn_at_the_same_scale():
    short, long = predict(one_f_one_b(2, 2)), predict(one_f_one_b(2, 4))
    lines = gantt(short, long, width=80).splitlines()
    assert lines[1] == "rank 0 |0---1---        0=======    1=======|"
    assert lines[5] == "rank 0 |0---1---        0=======2---1=======3---2=======    3=======|"


def test_a_crowded_picture_shows_last_digits_and_letters_for_later_stages():
    lines = gantt(predict(interleaved(4, 8, 2)), width=70).splitlines()
    assert lines[1] == "rank 0 |0123abcd456   a=7b= ec=fd=g0=h1=2= 3= e= f= g= h=4=5=6=7=|"
    assert "a is 0 in the rank's second stage" in lines[-1]
    lines = gantt(predict(gpipe(2, 12)), width=50).splitlines()
    assert lines[2] == "rank 1 | 0123456789010=1=2=3=4=5=6=7=8=9=0=1=  |"


@pytest.mark.parametrize("microbatches", [1, 7, 40, 300])
@pytest.mark.parametrize("width", [80, 120])
def test_no_picture_is_wider_than_asked(microbatches: int, width: int):
    for trace in (predict(one_f_one_b(4, microbatches)), predict(one_f_one_b(4, microbatches), transfer=0.123)):
        rows = [line for line in gantt(trace, width=width).splitlines() if "|" in line]
        assert len({len(row) for row in rows}) == 1 and len(rows[0]) <= width


def test_colour_comes_only_if_asked_for():
    trace = predict(gpipe(2, 2))
    assert "\x1b" not in gantt(trace)
    assert re.sub(r"\x1b\[[0-9;]*m", "", gantt(trace, colour=True)) == gantt(trace)


def test_a_trace_survives_json():
    assert Trace.from_json(UNEVEN.to_json()) == UNEVEN
    for text in ("", "[]", '{"name": "x"}', '{"name": "x", "spans": [{"rank": 0}]}'):
        with pytest.raises(ValueError, match="this is not a trace as Trace.to_json writes it"):
            Trace.from_json(text)


def test_the_spans_of_ranks_are_joined_by_start():
    halves = [Trace(tuple(span for span in UNEVEN.spans if span.rank == rank)) for rank in (0, 1)]
    joined = join(halves, "measured")
    assert sorted(joined.spans, key=lambda s: s.start) == list(joined.spans)
    assert set(joined.spans) == set(UNEVEN.spans)


def test_durations_are_written_in_their_unit():
    assert [duration(s) for s in (0.0, 4e-5, 0.0123, 1.0, 33.25)] == ["0 s", "40 us", "12.3 ms", "1 s", "33.25 s"]


def test_a_chrome_trace_has_a_process_for_each_trace_and_threads_for_each_rank():
    events = json.loads(chrome(UNEVEN, replace(UNEVEN, name="again")))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[0, 0] == "rank 0" and names[1, 3] == "rank 1 reduce" and len(names) == 8
    first = next(e for e in events if e["ph"] == "X")
    assert (first["name"], first["cat"], first["ts"]) == ("0F0", "forward", 0.0)
    assert first["dur"] == pytest.approx(11_000)


def cells(text: str) -> list[ElementTree.Element]:
    """The rectangles of spans: those that say something when pointed at."""
    name = "{http://www.w3.org/2000/svg}"
    return [r for r in ElementTree.fromstring(text).iter(f"{name}rect") if r.find(f"{name}title") is not None]


def test_an_svg_is_well_formed_and_has_a_cell_for_each_span_inside_the_picture():
    for traces in ((UNEVEN,), (predict(interleaved(4, 8, 3)), predict(gpipe(4, 50)))):
        text = svg(*traces, title="<a & b>")
        root, found = ElementTree.fromstring(text), cells(text)
        assert len(found) == sum(span.seconds > 0 for trace in traces for span in trace.spans)
        for cell in found:
            x, y, width = (float(cell.get(key)) for key in ("x", "y", "width"))
            assert 0 <= x <= x + width <= float(root.get("width"))
            assert 0 < y < float(root.get("height"))
        assert "&lt;a &amp; b&gt;" in text
        assert all(f">{trace.name}</text>" in text for trace in traces)


def test_svg_panels_share_one_scale():
    short, long = predict(gpipe(2, 2)), predict(gpipe(2, 8))
    widths = [float(cell.get("width")) for cell in cells(svg(short, long))]
    assert widths[0] == pytest.approx(widths[-2] / 2, rel=0.1)


def test_an_empty_trace_can_be_drawn():
    assert "0 s" in gantt(Trace((), "empty"))
    ElementTree.fromstring(svg(Trace((), "empty")))


def test_a_simulated_report_has_the_picture_the_figures_and_the_files(tmp_path):
    files = {kind: tmp_path / f"trace.{kind}" for kind in ("svg", "chrome", "csv")}
    text = simulate("interleaved", pipeline=2, microbatches=4, chunks=2, **files)
    assert text.splitlines()[0] == "interleaved: 13.5 s, idle 11.1 %, work 12 s per rank"
    assert text.splitlines()[-1] == "activations held at most: 5 on rank 0, 3 on rank 1"
    assert files["csv"].read_text() == interleaved(2, 4, 2).to_csv()
    assert json.loads(files["chrome"].read_text())["displayTimeUnit"] == "ms"
    assert "4 microbatches on 2 ranks, 4 stages" in files["svg"].read_text()
    again = simulate(str(files["csv"]))
    assert again.splitlines()[1:] == text.splitlines()[1:]


def test_a_report_that_cannot_be_written_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="a.svg cannot be written: No such file or directory; name a file in a folder"):
        simulate(svg=tmp_path / "no-folder" / "a.svg")


def test_the_page_on_schedules_shows_what_its_commands_print(tmp_path, monkeypatch):
    runner = pytest.importorskip("click.testing").CliRunner()
    from hybridpar.cli import main

    page = (Path(__file__).parent.parent / "docs" / "schedules.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"`(\w+\.csv)`:\n\n```csv\n(.*?)```", page, re.DOTALL):
        Path(name).write_text(text)
    commands = re.findall(r"```console\n\$ hybridpar (.*?)\n(.*?)```", page, re.DOTALL)
    assert len(commands) == 7
    for command, shown in commands:
        assert runner.invoke(main, shlex.split(command)).output == shown
    assert all(Path(f"schedule.{kind}").exists() for kind in ("svg", "json", "csv"))
    examples = doctest.DocTestParser().get_doctest(page, {}, "docs/schedules.md", None, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0
