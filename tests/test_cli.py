"""The `hybridpar` command: its codes, its help, and real jobs that it starts and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from hybridpar.cli import _environment, main
from hybridpar.install.probe import prefix, scripts
from hybridpar.launch.job import plan
from hybridpar.launch.wishes import Wishes
from hybridpar.mesh import Mesh

ROOT = Path(__file__).parents[1]
HYBRIDPAR = [sys.executable, "-m", "hybridpar.cli"]


def said(*arguments: str) -> tuple[int, str]:
    """Exit code and output of `hybridpar` with these arguments."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("print('hello')\n")
    return path


def test_every_command_has_help_with_examples() -> None:
    code, list_of_commands = said("--help")
    assert code == 0
    for command in ("run", "doctor", "trace", "install"):
        assert command in list_of_commands
        code, text = said(command, "--help")
        assert code == 0
        assert "xamples:" in text


def test_a_job_is_planned_for_its_mesh(script: Path) -> None:
    job = plan(
        8, [str(script), "--steps", "3"], {"PATH": "/usr/bin", "OMPI_MCA_mpi_yield_when_idle": "0"},
        scripts(), prefix(), cores=16, tensor=2, pipeline=2, carrier="gloo",
    )  # fmt: skip
    assert job.mesh == Mesh(data=2, pipeline=2, tensor=2)
    assert job.command[:3] == (str(scripts() / "mpirun"), "-np", "8")
    assert job.command[-6:] == ("hybridpar.launch.rank", "plain", "", str(script), "--steps", "3")
    assert job.environment["HYBRIDPAR_TENSOR"] == "2"
    assert job.environment["HYBRIDPAR_PIPELINE"] == "2"
    assert job.environment["HYBRIDPAR_CARRIER"] == "gloo"
    assert "HYBRIDPAR_DATA" not in job.environment
    assert job.environment["OMP_NUM_THREADS"] == "2"
    assert job.environment["OMPI_MCA_mpi_yield_when_idle"] == "0"
    assert "OMPI_MCA_rmaps_base_oversubscribe" not in job.environment


def test_more_ranks_than_cores_share_them(script: Path) -> None:
    job = plan(4, [str(script)], {"OMP_NUM_THREADS": "3"}, scripts(), prefix(), cores=2)
    assert job.environment["OMPI_MCA_rmaps_base_oversubscribe"] == "1"
    assert job.environment["OMP_NUM_THREADS"] == "3"
    assert plan(4, [str(script)], {}, scripts(), prefix(), cores=2).environment["OMP_NUM_THREADS"] == "1"


def test_a_dry_run_prints_the_command_and_starts_nothing(script: Path) -> None:
    code, text = said("run", "-np", "4", "--tensor", "2", "--dry-run", str(script), "--tensor", "7")
    assert code == 0
    assert "# data=2 x pipeline=1 x tensor=2" in text
    assert "HYBRIDPAR_TENSOR=2" in text
    assert text.rstrip().endswith(f"{script} --tensor 7")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-np", "8", "--tensor", "3"), "3 does not divide 8"),
        (("-np", "8", "--tensor", "2", "--data", "3"), "needs 6 ranks and 8 were started"),
        (("-np", "0"), "at least 1 rank"),
    ],
)
def test_degrees_that_do_not_fit_are_wrong_use(script: Path, arguments: tuple[str, ...], sentence: str) -> None:
    code, text = said("run", *arguments, str(script))
    assert code == 2
    assert sentence in text


def test_a_script_that_is_not_there_is_wrong_use() -> None:
    for arguments in (("-np", "2"), ()):
        code, text = said("run", *arguments, "nowhere.py")
        assert code == 2
        assert "there is no script 'nowhere.py'" in text


@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_mistyped_option_is_no_script(script: Path, command: str) -> None:
    code, text = said(command, "--tensr", "2", str(script))
    assert code == 2
    assert "No such option" in text and "--tensr" in text and "--tensor" in text


def test_without_horovod_the_way_out_is_named(script: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mpirun is missing.*hybridpar install"):
        plan(2, [str(script)], {"PATH": str(tmp_path)}, tmp_path, tmp_path, cores=2)


def test_a_schedule_is_drawn_and_written(tmp_path: Path) -> None:
    code, text = said(
        "trace", "--simulate", "--pipeline", "2", "--microbatches", "4", "--svg", str(tmp_path / "s.svg"),
        "--csv", str(tmp_path / "s.csv"),
    )  # fmt: skip
    assert code == 0
    assert "rank 1" in text
    assert (tmp_path / "s.svg").exists()
    code, again = said("trace", "--simulate", "--schedule", str(tmp_path / "s.csv"))
    assert code == 0
    assert again.splitlines()[1:3] == text.splitlines()[1:3]


def test_an_unknown_schedule_is_wrong_use() -> None:
    assert said("trace", "--simulate", "--schedule", "zigzag")[0] == 2
    assert said("trace")[0] == 2


def test_a_job_s_output_and_code_are_passed_on(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys\nprint('degree', os.environ['HYBRIDPAR_TENSOR'], sys.argv[1:])\nsys.stdout.flush()\n"
        "sys.exit(7 if os.environ['OMPI_COMM_WORLD_RANK'] == '0' else 0)\n"
    )
    done = subprocess.run(
        [*HYBRIDPAR, "run", "-np", "2", "--tensor", "2", str(script), "-x"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 7
    assert "degree 2 ['-x']" in done.stdout.splitlines()
    assert "<stdout>" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_rank_running(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "sleep.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\nPath(sys.argv[1], f'{os.getpid()}.pid').touch()\n"
        "time.sleep(300)\n"
    )
    process = subprocess.Popen(
        [*HYBRIDPAR, "run", "-np", "2", str(script), str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(pids := [int(p.stem) for p in tmp_path.glob("*.pid")]) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.1)
        os.kill(process.pid, number)
        assert process.wait(60) == 128 + number
        assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("wishes", [Wishes(), Wishes(tag_output=True), Wishes(output_dir="logs")])
def test_ranks_are_told_of_the_terminal_where_what_they_print_goes_there_as_it_comes(
    wishes: Wishes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "133")
    assert _environment(wishes).get("HYBRIDPAR_COLUMNS") == ("133" if wishes == Wishes() else None)
