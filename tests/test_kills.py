"""A training that is killed again and again, at seeded random moments, and resumed each time.

Forty jobs, each killed by SIGKILL: on one of its ranks, the other, or both; every second one while a checkpoint is
being written. Each takes the run up where the one before left it, on another mesh; every second one saves in the
background. After each: nobody is left, the exit code tells, every checkpoint in the folder is whole to the last bit,
and none that was reported as saved is lost. The losses of all of them are those of a run that was never killed.

The rate is low for the sake of the last sentence. At 1e-2 the training is chaotic: weights changed by one rounding
change the loss by 1e-9 after 400 steps and by 2e-2 after 600, without any checkpoint. At 1e-3 it is 1e-15 after 1500.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from hybridpar.checkpoint import folders, look, manifest
from tests.jobs import Job, run

KILLS = 40
MESHES = ({"data": 2}, {"tensor": 2}, {"pipeline": 2})
TRAIN = """
from pathlib import Path
import json
from tests.models import gpt, tokens, mine

folder, number, steps, background, degrees = Path(sys.argv[0]).parent, {number}, {steps}, {background}, {degrees}
mesh = hp.init(seed=3, **degrees)
model = hp.parallelize(gpt(dropout=0.1), mesh, loss=hp.CrossEntropy())
adam = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
optimizer = hp.DistributedOptimizer(adam, model)
rate = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(adam, 7)
checkpoints = hp.Checkpoints(folder / "run", keep=2, asynchronous=background)
checkpoints.load(model, optimizer, rate)
(folder / f"process-{{number}}-{{mesh.rank}}").write_text(str(os.getpid()))

def tell(file, **what):
    if mesh.rank == 0:
        with open(folder / file, "a") as out:
            out.write(json.dumps(what) + "\\n")

while model.steps < steps:
    batch = tuple(mine(x, mesh.data) for x in tokens(model.steps % 50))
    loss = model.train_step(batch, microbatches=2)
    tell("losses", step=model.steps, loss=loss)
    optimizer.step()
    optimizer.zero_grad()
    rate.step()
    if number >= 0:
        saving = checkpoints.save(model, optimizer, rate)
        if not background:
            tell("saved", step=model.steps)
"""


def training(number: int, steps: int = 10**9, background: bool = False, **degrees: int) -> str:
    return TRAIN.format(number=number, steps=steps, background=background, degrees=degrees)


def killer(folder: Path, number: int, draw: random.Random, ended: Event) -> None:
    """Wait for both ranks and some steps, as many on a busy machine as on a quiet one, then for a moment, then kill."""
    notes = [folder / f"process-{number}-{rank}" for rank in range(2)]
    goal = len(lines(folder / "losses")) + draw.randint(0, 12)
    victims, pause = draw.choice([[0], [1], [0, 1]]), draw.uniform(0, 0.05)
    hurry = draw.choice([0, 0.002, 0.01, 0.05]) * draw.random()
    while not ended.is_set() and not all(note.exists() and note.read_text() for note in notes):
        time.sleep(0.01)
    while not ended.is_set() and len(lines(folder / "losses")) < goal:
        time.sleep(0.005)
    time.sleep(pause)
    if number % 2:
        limit = time.monotonic() + 30
        while not ended.is_set() and not any((folder / "run").glob(".tmp-*")) and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(hurry)
    for rank in victims if not ended.is_set() else ():
        with suppress(ProcessLookupError):
            os.kill(int(notes[rank].read_text()), signal.SIGKILL)


def lines(path: Path) -> list[dict[str, float]]:
    """What was told; the last line may have been cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def newest_step(run_folder: Path) -> int:
    several = folders.complete(run_folder)
    return manifest.read(several[-1]).step if several else 0


@pytest.mark.timeout(1200)
def test_forty_kills_lose_no_checkpoint_and_the_training_goes_on_as_if_never_killed(tmp_path: Path) -> None:
    draw, before, inside = random.Random(11), 0, 0
    for number in range(KILLS):
        ended = Event()
        thread = Thread(target=killer, args=(tmp_path, number, draw, ended), daemon=True)
        thread.start()
        background = number % 4 >= 2
        job = run(tmp_path, training(number, background=background, **MESHES[number % 3]), ranks=2)
        ended.set()
        thread.join()
        assert job.code != 0 and job.left == (), f"kill {number}: code {job.code}, left {job.left}\n{job.said}"
        inside += any((tmp_path / "run").glob(".tmp-*"))
        for path in folders.complete(tmp_path / "run"):
            assert look.flaws(path) == [], f"kill {number}"
        reported = max((int(one["step"]) for one in lines(tmp_path / "saved")), default=0)
        after = newest_step(tmp_path / "run")
        assert after >= max(before, reported), f"kill {number}: {after} after {before}, reported {reported}"
        before = after
    assert before >= KILLS, f"the jobs came no further than step {before}"
    assert inside >= KILLS // 4, f"only {inside} of {KILLS} kills were inside of a save"
    last = before + 3
    assert run(tmp_path, training(KILLS, last), ranks=2).code == 0
    assert newest_step(tmp_path / "run") == last and not list((tmp_path / "run").glob(".*")), "nothing is left over"
    (tmp_path / "alone").mkdir()
    assert run(tmp_path / "alone", training(-1, last)).code == 0
    expected = {one["step"]: one["loss"] for one in lines(tmp_path / "alone" / "losses")}
    told = lines(tmp_path / "losses")
    assert {one["step"] for one in told} == set(expected), "every step was done"
    assert max(abs(one["loss"] - expected[one["step"]]) for one in told) < 1e-10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB: one checkpoint of this training (400 kB) fits on it, two do not."""
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "background"), [(None, False), (2, False), (2, True)])
def test_a_full_disk_leaves_the_last_checkpoint_and_gives_one_sentence(
    tmp_path: Path, small_disk: Path, background: bool, ranks: int | None
) -> None:
    degrees = {} if ranks is None else {"data": 2}
    job = run(tmp_path, training(0, background=background, **degrees), ranks=ranks)
    assert_one_sentence(job)
    kept = folders.complete(small_disk)
    assert [manifest.read(path).step for path in kept] == [1] and look.flaws(kept[0]) == []
    assert [path.name for path in small_disk.iterdir()] == [kept[0].name], "nothing half-written is left"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert run(tmp_path, training(1, 4, **degrees), ranks=ranks).code == 0
    assert newest_step(small_disk) == 4


def test_a_save_in_the_background_that_fails_last_is_told_when_the_script_ends(
    tmp_path: Path, small_disk: Path
) -> None:
    for ranks, degrees in ((None, {}), (2, {"data": 2})):
        for path in folders.complete(small_disk):
            folders.remove(path, "x")
        assert_one_sentence(run(tmp_path, training(0, 2, background=True, **degrees), ranks=ranks))


def assert_one_sentence(job: Job) -> None:
    assert job.code == 1 and job.left == (), job
    assert len(job.lines("could not be written (No space left on device)")) == 1, job.said
    assert "Traceback" not in job.said
