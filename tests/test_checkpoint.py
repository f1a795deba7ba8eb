"""Checkpoints in one process: the files, what is refused, what is kept; then the commands."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

import hybridpar as hp
from hybridpar.checkpoint import folders, look, manifest
from hybridpar.checkpoint.export import export
from hybridpar.checkpoint.folders import surplus
from hybridpar.checkpoint.manifest import Manifest
from hybridpar.checkpoint.plain import from_plain, to_plain
from hybridpar.checkpoint.stream import DTYPES, Stream
from hybridpar.checkpoint.writers import WIDTHS, Item, assign
from hybridpar.cli import main
from hybridpar.mesh import Mesh
from tests.against_one import opened_alone
from tests.models import numbers

# ---- facts

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=9) | st.integers() | st.just("__tuple__"), inner, max_size=3),
    max_leaves=12,
)


@given(plain_values)
def test_plain_values_come_back_as_they_were_and_of_the_same_types(value: Any) -> None:
    back = from_plain(json.loads(json.dumps(to_plain(value, "it"), allow_nan=False)))
    assert back == value and repr(back) == repr(value)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_tensors_of_every_dtype_come_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    name = next(name for name, one in DTYPES.items() if one == dtype)
    several = {}
    for shape in ((), (3,), (0, 2), (2, 3, 1)):
        high = 2 if dtype == torch.bool else 60  # no NaN among the floats of 8 bits
        bits = torch.randint(0, high, (*shape, WIDTHS[name]), generator=draw, dtype=torch.uint8)
        several[str(shape)] = bits.view(dtype).view(shape)
    stream = Stream(tmp_path / "x", [Item("model", key, tuple(x.shape), name, 0) for key, x in several.items()])
    for x in several.values():
        stream.write(x)
        back = from_plain(json.loads(json.dumps(to_plain(x, "it"))))
        assert back.dtype == dtype and back.shape == x.shape and str(back) == str(x)
    written = stream.close()
    assert manifest.flaw(tmp_path, "x", written) is None
    for key, x in load_file(tmp_path / "x").items():
        assert x.dtype == dtype and str(x) == str(several[key])


def test_what_no_checkpoint_can_keep_is_named() -> None:
    with pytest.raises(ValueError, match=r"extra\['a'\]\[1\] is a set: a checkpoint keeps numbers"):
        to_plain({"a": [1, {2}]}, "extra")
    with pytest.raises(ValueError, match="w is torch.complex128, which safetensors cannot hold"):
        to_plain(torch.zeros(1, dtype=torch.complex128), "w")


items = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 1)), max_size=30)


@given(items, st.sampled_from([Mesh(), Mesh(2, 2, 2), Mesh(3, 2, 1), Mesh(1, 2, 4)]))
def test_writers_hold_what_they_write_and_share_the_bytes(sizes: list[tuple[int, int]], mesh: Mesh) -> None:
    several = [Item("model", str(i), (n,), "F32", p % mesh.pipeline) for i, (n, p) in enumerate(sizes)]
    writers = assign(several, mesh)
    loads = Counter({rank: 0 for rank in range(mesh.size)})
    for item in several:
        assert mesh.place(writers[item.key]).pipeline == item.pipeline
        loads[writers[item.key]] += item.nbytes
    for p in range(mesh.pipeline):
        here = [loads[rank] for rank in range(mesh.size) if mesh.place(rank).pipeline == p]
        assert max(here) - min(here) <= max((i.nbytes for i in several), default=0)


@given(st.lists(st.floats(0, 9) | st.just(float("nan")), max_size=8), st.integers(1, 4), st.booleans())
def test_the_newest_and_the_best_are_never_removed(scores: list[float], keep: int, largest: bool) -> None:
    steps = {Path(str(i)): i for i in range(len(scores))}
    told = {Path(str(i)): score for i, score in enumerate(scores)}
    gone = surplus(steps, keep, told, largest)
    assert not {Path(str(i)) for i in range(len(scores))[-keep:]} & set(gone)
    real = [score for score in scores if score == score]
    if real:
        best = (max if largest else min)(real)
        assert any(told[path] == best for path in set(steps) - set(gone))
    assert len(steps) - len(gone) <= keep + 1


# ---- a small training


class Net(nn.Module):
    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x))) * self.scale


class Training:
    """A net, an optimizer and a rate in one process."""

    def __init__(
        self,
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        seed: int = 0,
        hidden: int = 5,
        net: type[nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.mesh = opened_alone(seed)
        torch.set_num_threads(1)
        module = (Net(hidden) if net is None else net()).double()
        self.model = hp.parallelize(module, self.mesh, nn.MSELoss())
        self.adam = make(self.model.parameters(), lr=0.01, **options)
        self.optimizer = hp.DistributedOptimizer(self.adam, self.model)
        self.rate = lr_scheduler.ExponentialLR(self.adam, 0.9)
        self.parts = (self.model, self.optimizer, self.rate)

    def step(self, count: int = 1) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(self.model.train_step((numbers(6, 4, seed=self.model.steps), numbers(6, 2, seed=99))))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rate.step()
        return losses


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[tuple[Training, Path]]:
    one = Training()
    one.step(2)
    hp.save(tmp_path / "run" / "last", *one.parts, extra={"note": (1, "x")}, metrics={"loss": 0.5})
    yield one, tmp_path / "run" / "last"


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "asgd": (torch.optim.ASGD, {}),
    "rprop": (torch.optim.Rprop, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    make, options = OPTIMIZERS[name]
    one = Training(make, **options)
    one.step(3)
    hp.save(tmp_path / "x", *one.parts)
    other = Training(make, seed=1, **options)
    assert hp.load(tmp_path / "x", *other.parts).step == 3
    assert other.step(3) == one.step(3)
    for name_, x in one.model.full_state_dict().items():
        assert torch.equal(other.model.full_state_dict()[name_], x), name_


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda s: 1 / (s + 1)),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 3]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "averaging": lambda o: torch.optim.swa_utils.SWALR(o, 0.1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    def rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
        found = []
        for step in range(4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a scheduler that steps before its optimizer
                scheduler.step(*([1.0 + step] if name == "plateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    one, other = Training(), Training(seed=1)
    left, right = (SCHEDULERS[name](training.adam) for training in (one, other))
    rates(one.adam, left)
    hp.save(tmp_path / "x", one.model, one.optimizer, left)
    hp.load(tmp_path / "x", other.model, other.optimizer, right)
    assert rates(other.adam, right) == rates(one.adam, left)


def test_scaler_loader_extra_and_generators_come_back(tmp_path: Path) -> None:
    import numpy

    one, other = Training(), Training(seed=1)
    data = torch.utils.data.TensorDataset(torch.arange(10))
    loaders = [hp.DataLoader(data, training.mesh, batch_size=4, num_workers=0) for training in (one, other)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**n) for n in (5, 9)]
    next(iter(loaders[0]))
    extra = {"best": float("inf"), "history": [1, (2.5, None)], "table": torch.eye(2)}
    hp.save(tmp_path / "x", loaders[0], scalers[0], *one.parts, extra=extra, metrics={"loss": 2.0}, step=77)
    drawn = [torch.rand(2).tolist(), random.random(), numpy.random.rand(2).tolist()]
    found = hp.load(tmp_path / "x", *other.parts, scalers[1], loaders[1])
    assert [torch.rand(2).tolist(), random.random(), numpy.random.rand(2).tolist()] == drawn
    assert (found.step, found.metrics, found.mesh) == (77, {"loss": 2.0}, Mesh())
    assert torch.equal(found.extra.pop("table"), extra.pop("table")) and found.extra == extra
    assert scalers[1].get_scale() == 32.0 and loaders[1].state_dict() == loaders[0].state_dict()
    assert [b[0].tolist() for b in loaders[1]] == [b[0].tolist() for b in loaders[0]]


def test_a_checkpoint_from_before_the_first_step_and_one_of_the_model_alone_can_be_loaded(tmp_path: Path) -> None:
    one, other = Training(), Training(seed=1)
    hp.save(tmp_path / "x", *one.parts)
    other.step(2)
    assert hp.load(tmp_path / "x", *other.parts).step == 0
    assert other.step(3) == one.step(3)
    hp.save(tmp_path / "y", one.model)
    assert hp.load(tmp_path / "y", other.model).step == 3
    with pytest.raises(ValueError, match="has 0 optimizers and 1 were given"):
        hp.load(tmp_path / "y", *other.parts)


def test_frozen_parameters_are_kept_and_one_frozen_since_is_named(tmp_path: Path) -> None:
    def frozen(seed: int) -> Training:
        def make(parameters: Any, **options: Any) -> torch.optim.Optimizer:
            given = list(parameters)
            given[0].requires_grad_(False)
            return torch.optim.AdamW(given[1:], **options)

        return Training(make, seed)

    one, other = frozen(0), frozen(1)
    one.step(2)
    hp.save(tmp_path / "x", *one.parts)
    hp.load(tmp_path / "x", *other.parts)
    assert other.step(2) == one.step(2)
    with pytest.raises(ValueError, match="scale is trained by this optimizer and was not by the checkpoint's"):
        hp.load(tmp_path / "x", *Training().parts)
    hp.save(tmp_path / "y", *Training().parts)
    with pytest.raises(ValueError, match="scale .* was trained by the checkpoint's optimizer and is not by this"):
        hp.load(tmp_path / "y", *other.parts)


# ---- what is refused, by name, before anything is changed


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class Smaller(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.scale = 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hidden": 7}, r"up.weight has shape \[7, 4\] in this model and \[5, 4\] in "),
        ({"net": Wider}, "more.weight is in this model and not in "),
        ({"net": Smaller}, "scale is in .* and not in this model: build the model that was saved"),
        ({"make": torch.optim.SGD}, "the checkpoint has the state of AdamW and this optimizer is SGD"),
    ],
)
def test_another_training_is_refused_and_stays_as_it_was(
    trained: tuple[Training, Path], options: dict[str, Any], told: str
) -> None:
    other = Training(seed=1, **options)
    before = {name: x.clone() for name, x in other.model.full_state_dict().items()}
    with pytest.raises(ValueError, match=told):
        hp.load(trained[1], *other.parts)
    assert all(torch.equal(x, before[name]) for name, x in other.model.full_state_dict().items())
    assert other.model.steps == 0


def test_other_schedulers_loaders_and_objects_are_refused(trained: tuple[Training, Path]) -> None:
    one, path = trained
    with pytest.raises(ValueError, match=r"has the schedulers \['ExponentialLR'\] and here are \['StepLR'\]"):
        hp.load(path, one.model, lr_scheduler.StepLR(one.adam, 1))
    with pytest.raises(ValueError, match="was saved without a scaler: leave it out of hp.load"):
        hp.load(path, one.model, torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="Linear is not kept as such: give a parallel model, optimizers"):
        hp.save(path, one.model, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a checkpoint needs the model that hp.parallelize returned"):
        hp.save(path, one.optimizer)
    with pytest.raises(ValueError, match=r"extra\['f'\] is a function"):
        hp.save(path, one.model, extra={"f": lambda: 0})
    data = torch.utils.data.TensorDataset(torch.arange(10))
    hp.save(path, *one.parts, hp.DataLoader(data, one.mesh, batch_size=4))
    with pytest.raises(ValueError, match="the saved position is one in 10 samples in batches of 4"):
        hp.load(path, one.model, hp.DataLoader(data, one.mesh, batch_size=5))


def flipped(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def newer(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


DAMAGE = [
    ("model-00001-of-00001.safetensors", lambda p: flipped(p, -9), "is corrupted: its CRC-32 is not the one"),
    ("optimizer-00001-of-00001.safetensors", lambda p: flipped(p, 20), "is corrupted: its CRC-32 is not the one"),
    ("model-00001-of-00001.safetensors", lambda p: os.truncate(p, 99), "is truncated: 99 bytes instead of"),
    ("optimizer-00001-of-00001.safetensors", lambda p: p.unlink(), "is lost: the manifest speaks of it"),
    ("manifest.json", lambda p: os.truncate(p, 400), "is damaged: it is no JSON"),
    ("manifest.json", lambda p: p.write_text(p.read_text().replace('"step": 2', '"step": 3')), "is damaged: its ch"),
    ("manifest.json", lambda p: p.write_text('{"format": "something"}'), "is foreign: its format is not"),
    ("manifest.json", newer, "has version 2 of the format and this hybridpar reads up to 1"),
]


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGE)
def test_damaged_foreign_and_newer_files_are_refused_by_name(
    trained: tuple[Training, Path], name: str, damage: Callable[[Path], None], told: str
) -> None:
    one, path = trained
    losses = one.step(1)
    damage(path / name)
    with pytest.raises(ValueError, match=f"{path / name} {told}"):
        hp.load(path, *one.parts)
    assert one.model.steps == 3 and losses
    done = CliRunner().invoke(main, ["checkpoint", "verify", str(path)])
    assert done.exit_code == 1 and str(path / name) in done.output and told.split(":")[0] in done.output


def test_folders_that_are_no_checkpoints_are_refused(trained: tuple[Training, Path], tmp_path: Path) -> None:
    one, _ = trained
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").touch()
    with pytest.raises(ValueError, match="other is no checkpoint of hybridpar: it has model.pt and no manifest.json"):
        hp.load(tmp_path / "other", *one.parts)
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere on this host"):
        hp.load(tmp_path / "nowhere", *one.parts)
    with pytest.raises(ValueError, match="other is there and is no checkpoint: save to a new folder"):
        hp.save(tmp_path / "other", *one.parts)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_place_where_nothing_can_be_written_is_named_with_the_reason_and_not_with_room(
    trained: tuple[Training, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "x", "Not a directory|File exists"), (Path("/proc/foo"), "No such file")):
        with pytest.raises(RuntimeError, match=f"{path} could not be written .({why}).*in which this user can") as told:
            hp.save(path, *trained[0].parts)
        assert "room" not in str(told.value) and "bytes" not in str(told.value)
    assert repr(hp.save(tmp_path / "x", *trained[0].parts)) == f"Saving('{tmp_path / 'x'}', done)"


# ---- complete or absent


def test_a_checkpoint_of_the_same_name_is_replaced_and_found_again_if_that_was_cut_short(
    trained: tuple[Training, Path],
) -> None:
    one, path = trained
    one.step(1)
    hp.save(path, *one.parts)
    assert manifest.read(path).step == 3 and [p.name for p in path.parent.iterdir()] == ["last"]
    path.rename(folders.beside(path, "old", "x"))  # killed between the two renames
    (folders.beside(path, "tmp", "y")).mkdir()
    assert hp.load(path, *Training(seed=1).parts).step == 3 == hp.load(path.parent, *one.parts).step
    one.step(1)
    hp.save(path, *one.parts)
    assert manifest.read(path).step == 4
    assert folders.leftovers(path.parent) == [folders.beside(path, "old", "x")], "the empty one is fresh: somebody's?"


def test_what_was_killed_just_before_its_rename_is_no_checkpoint(trained: tuple[Training, Path]) -> None:
    one, path = trained
    one.step(1)
    hp.save(path.parent / "later", *one.parts)
    (path.parent / "later").rename(folders.beside(path.parent / "later", "tmp", "x"))
    assert folders.complete(path.parent) == [path] and folders.newest(path.parent) == path


def test_what_is_being_written_by_a_living_process_is_left_alone(tmp_path: Path) -> None:
    mine = folders.new_token()
    dead = mine.replace(f".{os.getpid()}.", f".{2**22 + 1}.")
    far = "0" + mine[1:] if mine[0] != "0" else "1" + mine[1:]
    for name, token in (("mine", mine), ("dead", dead), ("far", far), ("far-and-old", far)):
        folders.beside(tmp_path / name, "tmp", token).mkdir()
    os.utime(folders.beside(tmp_path / "far-and-old", "tmp", far), (0, 0))
    found = {path.name.split("-", 1)[1].rpartition("-")[0] for path in folders.leftovers(tmp_path)}
    assert found == {"dead", "far-and-old"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_keeps_the_newest_and_the_best(tmp_path: Path, asynchronous: bool) -> None:
    one = Training()
    checkpoints = hp.Checkpoints(tmp_path, keep=2, best="loss", asynchronous=asynchronous)
    assert checkpoints.load(*one.parts) is None and checkpoints.latest() is None and checkpoints.best() is None
    for loss in (3.0, 1.0, 2.0, 5.0, 4.0):
        one.step()
        saving = checkpoints.save(*one.parts, metrics={"loss": loss})
    saving.wait()
    assert saving.done
    assert [manifest.read(path).step for path in checkpoints.all()] == [2, 4, 5]
    assert manifest.read(checkpoints.best()).step == 2 and checkpoints.latest() == checkpoints.all()[-1]
    assert checkpoints.load(*Training(seed=1).parts).step == 5
    with pytest.raises(ValueError, match='the best is chosen by "loss": give metrics='):
        checkpoints.save(*one.parts)
    with pytest.raises(ValueError, match="keep=0: at least the newest"):
        hp.Checkpoints(tmp_path, keep=0)


def test_an_asynchronous_save_keeps_the_moment_at_which_it_was_asked_for(tmp_path: Path) -> None:
    one, other = Training(), Training(seed=1)
    one.step(2)
    saving = hp.save(tmp_path / "x", *one.parts, asynchronous=True)
    losses = one.step(3)
    saving.wait()
    assert hp.load(tmp_path / "x", *other.parts).step == 2 and other.step(3) == losses


def test_a_failed_save_in_the_background_is_told_once_by_the_next_call(tmp_path: Path) -> None:
    import resource

    one = Training()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes of a file: stands for a full disk
    try:
        saving = hp.save(tmp_path / "x", *one.parts, asynchronous=True)
        while not saving.done:
            pass
        with pytest.raises(RuntimeError, match="x could not be written .File too large.: this rank has .* bytes"):
            hp.save(tmp_path / "y", *one.parts, asynchronous=True)
        with pytest.raises(RuntimeError, match="y could not be written .File too large."):
            hp.save(tmp_path / "y", *one.parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    hp.save(tmp_path / "y", *one.parts)
    assert look.flaws(tmp_path / "y") == []


# ---- for others


def test_plain_safetensors_and_weights_read_the_model_part(trained: tuple[Training, Path], tmp_path: Path) -> None:
    one, path = trained
    plain = Net().double()
    plain.load_state_dict(load_file(path / "model-00001-of-00001.safetensors"))
    assert export(path, tmp_path / "m.safetensors", dtype="BF16") == len(plain.state_dict())
    half = load_file(tmp_path / "m.safetensors")
    for name, x in plain.state_dict().items():
        assert torch.equal(x, one.model.full_state_dict()[name])
        assert torch.equal(half[name], x.bfloat16() if x.is_floating_point() else x)
    with torch.device("meta"):
        empty = Net().double()
    filled = hp.parallelize(empty, one.mesh, weights=path)
    assert torch.equal(filled.full_state_dict()["up.weight"], plain.up.weight)


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_read_a_checkpoint_and_a_checkpoint_reads_into_theirs(tie: bool, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(vocab_size=33, n_embd=8, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tie)
    mesh = opened_alone()
    torch.manual_seed(0)
    model = hp.parallelize(hf.GPT2LMHeadModel(config), mesh, hp.CrossEntropy())
    hp.save(tmp_path / "x", model)
    theirs = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "x")
    mine = model.full_state_dict()
    for name, x in theirs.state_dict().items():
        assert torch.equal(x, mine[name]), name
    torch.manual_seed(1)
    other = hp.parallelize(hf.GPT2LMHeadModel(config), mesh, hp.CrossEntropy())
    hp.load(tmp_path / "x", other)
    assert all(torch.equal(x, mine[name]) for name, x in other.full_state_dict().items())


# ---- commands


def said(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["checkpoint", *map(str, words)])
    return done.exit_code, done.output


def test_checkpoints_are_listed_shown_verified_and_exported(trained: tuple[Training, Path], tmp_path: Path) -> None:
    one, path = trained
    code, out = said("list", path.parent)
    assert code == 0 and str(path) in out and "step 2" in out and "loss=0.5" in out
    code, out = said("list", path.parent, "--json")
    assert code == 0 and json.loads(out)[0]["layout"] == {"data": 1, "pipeline": 1, "tensor": 1}
    code, out = said("show", path.parent, "--json", "--tensors")
    told = json.loads(out)
    assert code == 0 and told["all"]["model"]["up.weight"]["shape"] == [5, 4] and told["numbers"]["model"] == 59
    code, out = said("show", path, "--tensors")
    assert code == 0 and "up.weight  [5, 4] F64  model-00001-of-00001.safetensors" in out
    assert said("verify", path.parent) == (0, f"{path} is whole\n")
    assert said("export", path, tmp_path / "m.safetensors")[0] == 0
    code, out = said("export", path, tmp_path / "m.safetensors")
    assert code == 2 and "m.safetensors is there already" in out
    assert said("export", path, tmp_path / "n", "--dtype", "I8")[0] == 2
    code, out = said("export", path, tmp_path / "m.bin")
    assert code == 2 and "m.bin does not end in .safetensors" in out
    code, out = said("export", path, tmp_path / "nowhere" / "m.safetensors")
    assert code == 2 and "there is no folder" in out and ".tmp-" not in out
    assert said("list", tmp_path / "nowhere")[0] == 2 == said("verify", path, tmp_path / "nowhere")[0]
    told = json.loads(said("show", path, "--json")[1])
    assert told["extra"] == ["note"] and told["tied"] == {}
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.model.full_state_dict().values())
    (path / "notes.txt").touch()
    code, out = said("verify", path)
    assert code == 1 and "notes.txt is foreign: the manifest does not speak of it" in out
    (path / "manifest.json").write_text("{")
    assert said("list", path.parent)[0] == 1


def test_differences_are_told_tensor_by_tensor(trained: tuple[Training, Path], tmp_path: Path) -> None:
    one, path = trained
    hp.save(tmp_path / "same", *one.parts, extra={"note": (1, "x")})
    assert said("diff", path, tmp_path / "same") == (0, "")
    with torch.no_grad():
        dict(one.model.named_parameters())["up.bias"][0] += 0.25
    hp.save(tmp_path / "other", *one.parts, extra={"note": (1, "y")})
    code, out = said("diff", path, tmp_path / "other")
    assert code == 1 and "up.bias: 20.0% of 5 numbers, by 0.25 at most" in out and "extra.note" in out
    assert said("diff", path, tmp_path / "other", "--model", "--tolerance", 0.3) == (0, "")
    code, out = said("diff", path, tmp_path / "other", "--json", "--model")
    assert code == 1 and [one["name"] for one in json.loads(out)] == ["up.bias"]
    one.step()
    hp.save(tmp_path / "later", *one.parts)
    named = [one["name"] for one in json.loads(said("diff", path, tmp_path / "later", "--json")[1])]
    assert "step" in named and "steps" not in named


def test_a_manifest_reads_what_it_wrote() -> None:
    one = Manifest(step=1, written="now", layout={"data": 1, "pipeline": 1, "tensor": 1}, metrics={"a": float("inf")})
    assert manifest.parse(one.text(), "here") == one
