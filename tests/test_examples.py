"""The examples run as their first lines say, and do what the README says of them."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridpar.models.gpt import GPT
from tests.ranks.launch import CHECKOUT

EXAMPLES = CHECKOUT / "examples"


def run(ranks: int, *words: str) -> str:
    """What `hybridpar run -np ranks words` prints; it must succeed."""
    command = [sys.executable, "-m", "hybridpar", "run", "-np", str(ranks), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(260)
def test_the_gpt_learns_on_two_by_two_and_leaves_a_model_that_plain_pytorch_loads(tmp_path: Path) -> None:
    told = run(
        4, "--pipeline", "2", "examples/gpt.py", "--steps", "30", "--batch", "8", "--width", "48", "--depth", "3",
        "--context", "32", "--heads", "4", "--vocabulary", "512", "--megabytes", "0.3", "--lr", "0.01",
        "--schedule", "interleaved", "--folder", str(tmp_path),
    )  # fmt: skip
    assert "data=2 x pipeline=2 x tensor=1" in told
    (loss, unigram) = map(float, re.search(r"validation loss ([\d.]+) .*only: ([\d.]+)", told).groups())
    assert loss < 6.0 and unigram < 6.3, "a uniform guess over 512 tokens costs 6.24 nats"
    assert "interleaved: " in told and "measured: " in told
    assert (tmp_path / "pipeline.svg").read_text().startswith("<svg")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    GPT(**saved["shape"]).load_state_dict(saved["state"], strict=True)


def test_the_gpt_runs_as_one_process_too(tmp_path: Path) -> None:
    words = "--steps 2 --batch 4 --width 24 --depth 2 --context 16 --heads 2 --vocabulary 300 --megabytes 0.1"
    command = [sys.executable, "examples/gpt.py", *words.split(), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data=1 x pipeline=1 x tensor=1" in done.stdout


@pytest.mark.timeout(260)
def test_the_digits_are_read_as_well_by_the_hybrid_script_as_by_the_horovod_script() -> None:
    before = float(re.search(r"([\d.]+)% of the test digits", run(2, "examples/digits_horovod.py"))[1])
    told = run(4, "--tensor", "2", "examples/digits_hybrid.py")
    assert "data=2 x pipeline=1 x tensor=2" in told
    after = float(re.search(r"([\d.]+)% of the test digits", told)[1])
    assert before > 88 and abs(after - before) < 1, (before, after)  # rounding may move a digit or two of 297


def test_the_readme_shows_the_difference_between_the_two_scripts() -> None:
    shown = re.search(r"```diff\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)[1]
    scripts = [(EXAMPLES / name).read_text() for name in ("digits_horovod.py", "digits_hybrid.py")]
    old, new = (script.split('"""\n', 1)[1].splitlines() for script in scripts)
    assert shown.splitlines() == list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
