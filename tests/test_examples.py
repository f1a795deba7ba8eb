"""The examples run as their first lines say, and do what the README says of them."""

from __future__ import annotations

import difflib
import os
import re
import shutil
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


@pytest.mark.timeout(260)
def test_bert_learns_to_fill_gaps_on_two_by_two(tmp_path: Path) -> None:
    told = run(
        4, "--pipeline", "2", "examples/bert.py", "--steps", "60", "--batch", "16", "--width", "32", "--depth", "2",
        "--context", "16", "--vocabulary", "300", "--megabytes", "0.3", "--lr", "0.01", "--folder", str(tmp_path),
    )  # fmt: skip
    assert "data=2 x pipeline=2 x tensor=1" in told
    (loss, unigram) = map(float, re.search(r"validation loss ([\d.]+) .*only: ([\d.]+)", told).groups())
    assert loss < unigram + 0.3 and unigram < 5.6, "a uniform guess over 300 tokens costs 5.70 nats"


@pytest.mark.timeout(260)
@pytest.mark.parametrize("degrees", [("--pipeline", "2"), ("--tensor", "2")], ids=" ".join)
def test_the_resnet_reads_digits_on_two_ranks(degrees: tuple[str, str]) -> None:
    told = run(2, *degrees, "examples/resnet.py", "--steps", "150", "--widths", "8", "16", "32")
    assert float(re.search(r"([\d.]+)% of the 297 digits", told)[1]) > 85, told


@pytest.mark.timeout(260)
@pytest.mark.parametrize("degrees", [("--pipeline", "2"), ("--tensor", "2")], ids=" ".join)
def test_the_unet_finds_ellipsoids_by_space_and_over_stages(degrees: tuple[str, str]) -> None:
    told = run(2, *degrees, "examples/unet3d.py", "--steps", "40", "--side", "12", "--widths", "8", "8", "--space")
    assert float(re.search(r"Dice score ([\d.]+)", told)[1]) > 0.3, told


@pytest.mark.timeout(260)
@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng speaks the data of this example")
def test_the_recogniser_understands_voices_that_it_has_not_heard(tmp_path: Path) -> None:
    words = ["--steps", "40", "--voices", "2", "--width", "32", "--lr", "0.01", "--folder", str(tmp_path)]
    told = run(4, "--pipeline", "2", "--tensor", "2", "examples/speech.py", *words)
    assert float(re.search(r"([\d.]+)% of the 60 digits", told)[1]) > 30, told


def test_the_recogniser_says_what_it_lacks_where_espeak_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "examples/speech.py"]
    environment = os.environ | {"PATH": without("espeak-ng", os.environ["PATH"], tmp_path)}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs espeak-ng" in done.stdout and "apt install espeak-ng" in done.stdout


def without(program: str, path: str, folder: Path) -> str:
    """`path` with a folder of links in the place of each folder that has `program`, to all else that is there."""
    kept = []
    for place in filter(Path.is_dir, map(Path, path.split(os.pathsep))):
        if (place / program).exists():
            linked = folder / str(len(kept))
            linked.mkdir()
            for other in place.iterdir():
                if other.name != program:
                    (linked / other.name).symlink_to(other)
            place = linked
        kept.append(str(place))
    return os.pathsep.join(kept)


def test_the_readme_shows_the_difference_between_the_two_scripts() -> None:
    shown = re.search(r"```diff\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)[1]
    scripts = [(EXAMPLES / name).read_text() for name in ("digits_horovod.py", "digits_hybrid.py")]
    old, new = (script.split('"""\n', 1)[1].splitlines() for script in scripts)
    assert shown.splitlines() == list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
