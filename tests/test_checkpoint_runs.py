"""`hp.Checkpoints`: runs that go back, folders of other runs, and checkpoints that were damaged since."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import hybridpar as hp
from hybridpar.checkpoint import folders, look, manifest
from hybridpar.mesh import Mesh
from tests.models import layers, mine, numbers
from tests.ranks import ranks
from tests.test_checkpoint import Training, flipped
from tests.test_equality import opened

WEIGHTS = "model-00001-of-00001.safetensors"


def saved(run: Path, steps: int, keep: int | None = None, asynchronous: bool = False) -> Training:
    """A new training that saves after each of its steps, without loading."""
    one, checkpoints = Training(seed=steps), hp.Checkpoints(run, keep=keep, asynchronous=asynchronous)
    for _ in range(steps):
        one.step()
        checkpoints.save(*one.parts).wait()
    return one


def steps(run: Path) -> list[int]:
    return [manifest.read(path).step for path in hp.Checkpoints(run).all()]


def aside(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("aside-*"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_goes_back_sets_the_later_steps_aside_and_goes_on_from_what_it_wrote_last(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    saved(tmp_path, 5, keep=3)
    one, checkpoints = Training(seed=9), hp.Checkpoints(tmp_path, keep=2, asynchronous=asynchronous)
    hp.load(tmp_path / "step-00000003", *one.parts)
    one.step()
    capfd.readouterr()
    checkpoints.save(*one.parts).wait()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "step-00000004, step-00000005, which step 4 does not follow: set aside" in told[0]
    assert steps(tmp_path) == [3, 4] and aside(tmp_path) == ["aside-step-00000004", "aside-step-00000005"]
    other = Training(seed=8)
    assert hp.Checkpoints(tmp_path).load(*other.parts).step == 4
    assert torch.equal(other.model.full_state_dict()["up.weight"], one.model.full_state_dict()["up.weight"])
    assert hp.load(tmp_path, *other.parts).step == 4
    assert hp.load(tmp_path / "aside-step-00000005", *other.parts).step == 5
    one.step()
    checkpoints.save(*one.parts).wait()
    assert capfd.readouterr().err == "" and steps(tmp_path) == [4, 5] and len(aside(tmp_path)) == 2


def test_a_new_run_in_a_used_folder_loses_nothing_of_the_old_one(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    before = {path.name: (path / "manifest.json").read_text() for path in hp.Checkpoints(tmp_path).all()}
    for _ in range(2):
        one = saved(tmp_path, 2, keep=1)
        assert steps(tmp_path) == [2] and hp.Checkpoints(tmp_path).load(*one.parts).step == 2
    first = [tmp_path / f"aside-{name}" / "manifest.json" for name in before]
    assert [path.read_text() for path in first] == list(before.values())
    assert aside(tmp_path)[-1] == "aside-step-00000003" and "aside-step-00000002-2" in aside(tmp_path)


def test_a_step_saved_twice_by_one_training_is_replaced(tmp_path: Path) -> None:
    one, checkpoints = saved(tmp_path, 2), hp.Checkpoints(tmp_path)
    checkpoints.load(*one.parts)
    checkpoints.save(*one.parts, extra={"again": 1})
    checkpoints.save(*one.parts, extra={"again": 2})
    assert aside(tmp_path) == [] and checkpoints.load(*one.parts).extra == {"again": 2}


def test_checkpoints_under_names_of_their_own_are_neither_removed_nor_in_the_way(tmp_path: Path) -> None:
    one, checkpoints = Training(), hp.Checkpoints(tmp_path, keep=1)
    for _ in range(3):
        one.step()
        hp.save(tmp_path / f"mine-{one.model.steps}", *one.parts)
        checkpoints.save(*one.parts)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mine-1", "mine-2", "mine-3", "step-00000003"]


DAMAGE = {
    "manifest": lambda path: (path / "manifest.json").unlink(),
    "bits": lambda path: flipped(path / WEIGHTS, -9),
    "file": lambda path: (path / WEIGHTS).unlink(),
    "json": lambda path: (path / "manifest.json").write_text("{"),
}
TOLD = {"manifest": "no manifest.json", "bits": "is corrupted", "file": "is lost", "json": "is no JSON"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_told_passed_over_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    one = saved(tmp_path, 3)
    DAMAGE[kind](tmp_path / "step-00000003")
    with pytest.raises(ValueError, match=TOLD[kind]):
        hp.load(tmp_path / "step-00000003", *one.parts)
    with pytest.raises(ValueError, match=TOLD[kind]):
        hp.load(tmp_path, *one.parts)
    checkpoints = hp.Checkpoints(tmp_path, keep=2)
    capfd.readouterr()
    assert checkpoints.load(*one.parts).step == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "step-00000003 is passed over: " in told[0] and TOLD[kind] in told[0]
    assert told[0].endswith("loaded step-00000002 instead")
    one.step(3)
    checkpoints.save(*one.parts)  # of a later step than the damaged one
    assert steps(tmp_path) == [2, 5] and aside(tmp_path) == ["aside-step-00000003"]


def test_a_whole_checkpoint_that_took_the_name_of_a_damaged_one_stays(tmp_path: Path) -> None:
    one, checkpoints = saved(tmp_path, 3), hp.Checkpoints(tmp_path, keep=2, asynchronous=True)
    DAMAGE["bits"](tmp_path / "step-00000003")
    assert checkpoints.load(*one.parts).step == 2
    for _ in range(2):
        one.step()
        checkpoints.save(*one.parts).wait()
    assert steps(tmp_path) == [3, 4] and aside(tmp_path) == ["aside-step-00000003"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_of_which_nothing_is_whole_is_refused_and_never_begun_anew(tmp_path: Path, kind: str) -> None:
    one = saved(tmp_path, 1)
    DAMAGE[kind](tmp_path / "step-00000001")
    with pytest.raises(ValueError, match=f"no checkpoint in .* is whole: .*{TOLD[kind]}"):
        hp.Checkpoints(tmp_path).load(*one.parts)


def test_a_damaged_checkpoint_that_nobody_loaded_does_not_count_and_stays(tmp_path: Path) -> None:
    one, checkpoints = saved(tmp_path, 2), hp.Checkpoints(tmp_path, keep=2)
    DAMAGE["file"](tmp_path / "step-00000002")
    one.step()
    checkpoints.save(*one.parts)
    assert [path.name for path in checkpoints.all()] == ["step-00000001", "step-00000002", "step-00000003"]
    one.step()
    checkpoints.save(*one.parts)
    assert steps(tmp_path) == [2, 3, 4]


def test_another_model_than_the_newest_checkpoints_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match="up.weight has shape"):
        hp.Checkpoints(tmp_path).load(*Training(hidden=7).parts)


def test_a_file_is_refused_as_the_folder_of_a_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: give the folder in which"):
        hp.Checkpoints(tmp_path / "file")


@ranks(2)
def test_all_ranks_pass_over_what_one_of_them_finds_damaged(tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))
    model = hp.parallelize(layers(6, 8, 3), mesh, torch.nn.MSELoss())
    checkpoints = hp.Checkpoints(tmp_path, keep=2)
    for step in range(3):
        model.train_step((mine(numbers(8, 6, seed=step), mesh.data), mine(numbers(8, 3, seed=9), mesh.data)))
        checkpoints.save(model)
    if mesh.rank == 0:
        flipped(sorted(checkpoints.latest().glob("model-*.safetensors"))[-1], -9)
    mesh.everyone.barrier()
    assert checkpoints.load(model).step == 2
    checkpoints.save(model, step=4)
    assert steps(tmp_path) == [2, 4] and look.flaws(folders.newest(tmp_path)) == []
    mesh.everyone.barrier()
    if mesh.rank == 0:
        for path in checkpoints.all():
            shutil.rmtree(path)
    mesh.everyone.barrier()
    assert checkpoints.load(model) is None
    mesh.close()
