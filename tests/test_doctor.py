"""The doctor: what it makes of what it finds, and that it is well here."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybridpar import doctor
from hybridpar.doctor import Finding, Level

ROOT = Path(__file__).parents[1]
WELL: dict[str, Any] = {
    "library": "Open MPI v4.1.8",
    "threads": "MULTIPLE",
    "world": 2,
    "horovod": {"size": 2, "sum": 2.0, "mpi": True, "gloo": True, "nccl": False, "cuda": False},
    "seconds": 2e-6,
    "bytes_per_second": 5e9,
    "cuda_aware": False,
    "ranks": [{"host": "a", "cores": [0, 1, 2, 3], "gpu": None}] * 2,
}


def judged(cores: int = 4, **changes: Any) -> dict[str, Finding]:
    facts = {**copy.deepcopy(WELL), **changes}
    return {f.name: f for f in doctor.judge(2, facts, cores)}


def test_a_healthy_job_has_nothing_to_mend() -> None:
    findings = judged()
    assert all(f.level is Level.FINE for f in findings.values())
    assert findings["ring"].found == "2.0 us a message, 5.00 GB/s"
    assert findings["host a"].found == "rank 0 on cores 0-3; rank 1 on cores 0-3"


@pytest.mark.parametrize(
    "changes", [{"world": 1}, {"horovod": {**WELL["horovod"], "size": 1}}, {"horovod": {**WELL["horovod"], "sum": 1.0}}]
)
def test_a_silent_world_of_one_is_found(changes: dict[str, Any]) -> None:
    finding = judged(**changes)["world"]
    assert finding.level is Level.WRONG
    assert "2 started" in finding.found
    assert "hybridpar run" in finding.mend


def test_too_low_a_thread_level_is_found() -> None:
    finding = judged(threads="SINGLE")["mpi threads"]
    assert finding.level is Level.WRONG
    assert "MULTIPLE" in finding.found


def test_ranks_bound_to_one_core_are_found() -> None:
    finding = judged(ranks=[{"host": "a", "cores": [0], "gpu": None}] * 2)["host a"]
    assert finding.level is Level.NOTE
    assert "--bind-to none" in finding.mend
    spread = [{"host": "a", "cores": [i], "gpu": None} for i in range(2)]
    assert judged(ranks=spread)["host a"].level is Level.FINE


def test_more_ranks_than_cores_is_noted() -> None:
    assert judged(cores=1)["cores"].level is Level.NOTE


def test_a_horovod_without_mpi_is_found() -> None:
    horovod = {**WELL["horovod"], "mpi": False}
    assert judged(horovod=horovod)["horovod's build"].level is Level.WRONG


def test_gpus_without_nccl_are_noted() -> None:
    ranks = [{"host": "a", "cores": [0, 1], "gpu": "NVIDIA H200"}] * 2
    finding = judged(ranks=ranks)["gpu"]
    assert finding.level is Level.NOTE
    assert "NVIDIA H200" in finding.found
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in finding.mend
    assert judged(ranks=ranks, horovod={**WELL["horovod"], "nccl": True})["gpu"].level is Level.FINE


def test_a_job_that_breaks_is_told_in_its_own_words() -> None:
    finding = doctor.broken(1, None, "-----\nThere are not enough slots available\n-----\n")
    assert finding.level is Level.WRONG
    assert finding.found == "ended with code 1: There are not enough slots available"
    assert "did not end" in doctor.broken(None, None, "").found
    assert doctor.broken(1, "the launcher started 2", "").found == "the launcher started 2"


def test_runs_of_cores_are_written_short() -> None:
    assert doctor.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert doctor.ranges([3]) == "3"


def test_the_report_has_a_code_a_table_and_json() -> None:
    wrong = [Finding("mpi", "none", Level.WRONG, "install one"), Finding("python", "3.11")]
    assert doctor.exit_code(wrong) == 1
    assert doctor.exit_code(wrong[1:]) == 0
    assert doctor.render(wrong).splitlines() == [
        "wrong  mpi     none",
        "                 -> install one",
        "ok     python  3.11",
        "",
        "1 to mend",
    ]
    told = json.loads(doctor.as_json(wrong))
    assert told["ok"] is False
    assert told["findings"][0] == {"name": "mpi", "found": "none", "level": "wrong", "mend": "install one"}


def test_without_any_package_the_doctor_says_so_without_a_traceback() -> None:
    script = (
        "import os, sys; from hybridpar import doctor; findings = doctor.examine(2, os.environ);"
        "print(doctor.render(findings)); sys.exit(doctor.exit_code(findings))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == ""
    for name in ("torch", "mpi4py", "horovod"):
        assert any(line.split()[:4] == ["wrong", name, "not", "installed"] for line in done.stdout.splitlines())
    assert "python -m hybridpar.install" in done.stdout


def test_this_environment_is_well() -> None:
    findings = doctor.examine(2, os.environ)
    assert doctor.exit_code(findings) == 0, doctor.render(findings)
    assert {"world", "ring", "mpi threads"} <= {f.name for f in findings}
