"""The multi-rank harness, proved with a pytest of its own over tests that fail in each way.

Every kind of failure is followed by a test that passes: the ranks were launched anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ranks
from tests.ranks.launch import CHECKOUT, environment, shown_stack

SCENARIO = '''
import os, signal
import numpy as np
import pytest
from mpi4py import MPI
from tests.ranks import ranks

world = MPI.COMM_WORLD


@pytest.fixture(params=["ham", "eggs"])
def food(request):
    return request.param


@ranks(2)
def test_a_sum_over_ranks(rank_count, tmp_path, food):
    total = np.array([world.rank + 1])
    world.Allreduce(MPI.IN_PLACE, total)
    assert total[0] == 3 == rank_count + 1
    (tmp_path / f"{food}-{world.rank}").touch()
    world.Barrier()
    assert sorted(os.listdir(tmp_path)) == [f"{food}-0", f"{food}-1"]


def test_an_ordinary_one():
    assert "OMPI_COMM_WORLD_SIZE" not in os.environ


@ranks(2)
def test_a_failure_on_one_rank():
    ours = {"rank": world.rank}
    print("printed by", world.rank)
    assert ours == {"rank": 0}


@ranks(2)
def test_after_the_failure():
    world.Barrier()


@ranks(2, timeout=3)
def test_a_hang():
    if world.rank == 0:
        wait_for_what_never_comes(source=1)
    else:
        world.Recv(np.zeros(1), source=0)  # never sent


def wait_for_what_never_comes(source):
    world.Recv(np.zeros(1), source=source)


@ranks(2)
def test_after_the_hang():
    world.Barrier()


@ranks(2)
def test_a_kill():
    if world.rank == 1:
        print("the last words")
        os.kill(os.getpid(), signal.SIGKILL)
    world.Barrier()


@ranks(2)
def test_after_the_kill():
    world.Barrier()


@ranks(2)
def test_an_abort():
    if world.rank == 0:
        os.write(2, b"out of sorts")
        world.Abort(7)
    world.Barrier()


@ranks(2)
def test_after_the_abort():
    world.Barrier()


@ranks(2)
def test_an_exception_while_the_other_receives():
    if world.rank == 1:
        raise LookupError("rank 1 lost its way")
    world.Recv(np.zeros(1), source=1)


@ranks(2)
def test_after_the_exception():
    world.Barrier()


@ranks(2)
def test_a_skip_everywhere():
    pytest.skip("not today")


@ranks(2)
def test_a_failure_everywhere(capsys):
    print("captured")
    assert capsys.readouterr().out == "lost"


@ranks(2)
@pytest.mark.xfail(reason="a known fault", strict=True)
def test_a_known_fault():
    assert world.size == 3


@ranks(2)
def test_a_skip_on_one_rank():
    if world.rank:
        pytest.skip("not today")
'''

UNIMPORTABLE = '''
import os
from tests.ranks import ranks

if "OMPI_COMM_WORLD_SIZE" in os.environ:
    raise ImportError("only among ranks")


@ranks(3)
def test_it():
    assert True
'''


def run_pytest(folder: Path, *arguments: str) -> str:
    """What a pytest of its own prints."""
    (folder / "conftest.py").write_text('pytest_plugins = ["tests.ranks.plugin"]\n')
    (folder / "test_scenario.py").write_text(SCENARIO)
    (folder / "test_unimportable.py").write_text(UNIMPORTABLE)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    done = subprocess.run(
        [*command, "-c", str(CHECKOUT / "pyproject.toml"), *arguments],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.stdout + done.stderr


def outcomes(output: str) -> dict[str, str]:
    """Test -> PASSED, FAILED, ... without the files' names."""
    return {name: outcome for outcome, name in re.findall(r"^([A-Z]+) test_\w+\.py::(\S+)", output, re.M)}


def failure(output: str, test: str) -> str:
    """The section of one failed test."""
    found = re.search(rf"^_+ {re.escape(test)} _+$(.*?)^(?:_{{5,}}|={{5,}}) ", output, re.M | re.S)
    assert found, output
    return found[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_pytest(tmp_path_factory.mktemp("scenario"), "test_scenario.py")


@pytest.mark.timeout(600)
def test_tests_run_on_many_ranks_after_the_ordinary_ones(output: str) -> None:
    seen = outcomes(output)
    assert seen["test_an_ordinary_one"] == "PASSED"
    assert seen["test_a_sum_over_ranks[ham-2ranks]"] == seen["test_a_sum_over_ranks[eggs-2ranks]"] == "PASSED"
    assert list(seen)[0] == "test_an_ordinary_one"


def test_after_each_kind_of_failure_the_next_test_passes(output: str) -> None:
    after = {name: outcome for name, outcome in outcomes(output).items() if name.startswith("test_after")}
    assert after == {
        f"test_after_the_{what}[2ranks]": "PASSED" for what in ("failure", "hang", "kill", "abort", "exception")
    }


def test_the_failing_ranks_traceback_is_shown_once(output: str) -> None:
    text = failure(output, "test_a_failure_on_one_rank[2ranks]")
    assert output.count("E       AssertionError: assert {'rank': 1} == {'rank': 0}") == 1
    assert "rank 1 of 2 failed first" in text and "rank 0 passed" in text
    assert "printed by 1" in text and "printed by 0" not in text
    assert "Differing items" in text  # pytest rewrote the assertion


def test_a_hang_is_told_with_the_line_where_each_rank_waits(output: str) -> None:
    text = failure(output, "test_a_hang[2ranks]")
    assert "Not done after 3 s, 2 of 2 ranks wait" in text
    zero, one = text.split("rank 0 was at")[1].split("rank 1 was at")
    assert "in wait_for_what_never_comes\n        world.Recv(np.zeros(1), source=source)" in zero
    assert "in test_a_hang\n        wait_for_what_never_comes(source=1)" in zero
    assert "in test_a_hang\n        world.Recv(np.zeros(1), source=0)  # never sent" in one
    assert "pluggy" not in text


def test_a_killed_rank_is_told_with_its_last_words(output: str) -> None:
    text = failure(output, "test_a_kill[2ranks]")
    assert "mpirun ended with code 137" in text and "exited on signal 9" in text
    assert "rank 1 had printed\n    the last words" in text


def test_an_abort_is_told_with_its_code_and_words(output: str) -> None:
    text = failure(output, "test_an_abort[2ranks]")
    assert "mpirun ended with code 7" in text and "out of sorts" in text


def test_an_exception_is_told_while_the_other_rank_waits_for_a_message(output: str) -> None:
    text = failure(output, "test_an_exception_while_the_other_receives[2ranks]")
    assert text.count("E           LookupError: rank 1 lost its way") == 1
    assert "rank 0 was at" in text and "world.Recv(np.zeros(1), source=1)" in text


def test_a_failure_of_all_ranks_is_shown_once(output: str) -> None:
    text = failure(output, "test_a_failure_everywhere[2ranks]")
    assert output.count("assert 'captured\\n' == 'lost'") == 2  # in the traceback and in the summary
    assert re.search(r"rank (0 of 2 failed first\s+rank 1|1 of 2 failed first\s+rank 0) failed", text)


def test_skips_and_known_faults_are_told_as_such(output: str) -> None:
    assert outcomes(output)["test_a_known_fault[2ranks]"] == "XFAIL"
    assert re.search(r"SKIPPED \[1\] test_scenario.py:\d+: not today", output)
    assert "A test skips on all of its 2 ranks or on none" in failure(output, "test_a_skip_on_one_rank[2ranks]")
    assert " 7 failed, 8 passed, 1 skipped, 1 xfailed in " in output


@pytest.mark.timeout(600)
def test_single_tests_and_the_first_failure_can_be_asked_for(tmp_path: Path) -> None:
    chosen = ["test_after_the_hang[2ranks]", "test_a_failure_on_one_rank", "test_after_the_failure"]
    output = run_pytest(tmp_path, "-x", "test_unimportable.py", *(f"test_scenario.py::{name}" for name in chosen))
    assert outcomes(output) == {
        "test_after_the_hang[2ranks]": "PASSED",
        "test_a_failure_on_one_rank[2ranks]": "FAILED",
    }
    assert "stopping after 1 failures" in output


@pytest.mark.timeout(600)
def test_ranks_that_cannot_import_the_tests_say_why(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, "test_unimportable.py")
    assert outcomes(output) == {"test_it[3ranks]": "FAILED"}
    assert "of 3 cannot run tests" in output and "ImportError: only among ranks" in output


def test_the_shown_stack_is_the_main_threads_and_ends_at_pytest() -> None:
    dump = (
        "Thread 0x00000000000000ff (most recent call first):\n"
        '  File "/lib/threading.py", line 1 in wait\n'
        "\n"
        "Current thread 0x00000000000000aa (most recent call first):\n"
        '  File "/gone/test_x.py", line 3 in helper\n'
        '  File "/gone/test_x.py", line 9 in test_x\n'
        '  File "/lib/_pytest/python.py", line 5 in pytest_pyfunc_call\n'
    )
    frames = [line for line in shown_stack(dump, 0xAA).splitlines() if line.strip()]
    assert frames == ["/gone/test_x.py:3 in helper", "/gone/test_x.py:9 in test_x"]


@pytest.mark.parametrize("counts", [(), (0,), ("2",)])
def test_the_decorator_refuses_what_is_no_rank_count(counts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="name at least one number of ranks"):
        ranks(*counts)
