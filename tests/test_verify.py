"""`hp.verify` and `hybridpar verify`: no alarm where nothing is wrong, and what is said where something is.

The planted bugs are in test_mutations.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.cli import main
from hybridpar.proof.causes import likely, same_mask
from hybridpar.proof.diagnose import fit
from hybridpar.proof.facts import Divergence, Facts, Fit, Mask, Part
from hybridpar.proof.report import Difference, Finding, Report, first, rows
from hybridpar.proof.together import Change, changed_apart, frozen_apart, strayed
from hybridpar.proof.verify import verify
from tests.jobs import run_command
from tests.ranks import ranks
from tests.ranks.launch import CHECKOUT
from tests.trainings import changing, gpt, norms, numbers, plain_adam, training

# ---- no false alarm


def assert_equal(train: Any, steps: int = 2) -> Report:
    torch.set_num_threads(1)
    report = verify(train, steps)
    assert report.equal, report.sentence
    assert not [row for row in report.rows if row.run == "fp64" and row.verdict != "equal"]
    return report


class Loop(nn.Module):
    """A module with a block list, a plain forward and keyword inputs: it is cut without a chain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inside = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)) for _ in range(3))
        self.norm, self.outside = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        h = self.inside(x) * scale
        for block in self.blocks:
            h = h + block(h)
        return self.outside(self.norm(h))


def horovods(microbatches: int) -> Any:
    def stepper(model: Any) -> Any:
        import horovod.torch as hvd

        named = list(model.named_parameters())
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return hvd.DistributedOptimizer(sgd, named_parameters=named, backward_passes_per_step=microbatches)

    return stepper


def clean(init: dict[str, int]) -> None:
    """Trainings of several kinds on one mesh, all right."""
    sequence = init.get("tensor", 1) > 1
    report = assert_equal(training(init=init, sequence=sequence))
    assert {row.run for row in report.rows} == {"float32", "fp64"}
    assert len(report.rows) == 8 and not report.notes
    assert_equal(training(lambda: gpt(False, 0.1, 2), init=init, sequence=sequence))
    report = assert_equal(training(lambda: gpt(dtype=torch.float64), init=init, stepper=horovods(2)))
    assert {row.run for row in report.rows} == {"fp64"}
    assert_equal(norms(init=init, microbatches=1))
    assert_equal(looped(init))


def looped(init: dict[str, int]) -> Any:
    """Keyword inputs, clipping between the step and the optimizer, two parameter groups, a changing learning rate."""

    def train() -> None:
        mesh = hp.init(seed=5, **init)
        example = {"x": torch.randn(2, 6), "scale": torch.ones(2, 1)}
        model = hp.parallelize(Loop(), mesh, loss=F.mse_loss, example=example)
        frozen = dict(model.named_parameters()).get("blocks.1.0.bias")
        if frozen is not None:
            frozen.requires_grad_(False)
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=1e-2)
        optimizer = hp.DistributedOptimizer(adam, model)
        rate = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
        for step in range(5):
            x, y = (part[mesh.data.piece(len(part))[0] : mesh.data.piece(len(part))[1]] for part in numbers(step))
            model.train_step(({"x": x, "scale": torch.full((len(x), 1), 0.5)}, y), microbatches=2)
            optimizer.synchronize()
            hp.clip_grad_norm_(model, 0.3)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()

    return train


@ranks(1, timeout=120)
def test_one_rank_gives_no_alarm() -> None:
    clean({})


@ranks(2, timeout=200)
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
def test_two_ranks_give_no_alarm(axis: str) -> None:
    clean({axis: 2})


@ranks(2, timeout=200)
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
def test_weights_that_are_changed_alike_between_steps_are_taken_over(axis: str) -> None:
    def shrunk(model: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)

    kept: dict[str, torch.Tensor] = {}

    def loaded_back(model: Any) -> None:
        if kept:
            model.load_full_state_dict(kept)
        kept.update({} if kept else {n: x.clone() for n, x in model.full_state_dict().items()})

    def clamped(model: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)

    for change in (shrunk, clamped, loaded_back):
        report = verify(training(init={axis: 2}, stepper=changing(change)), 3)
        assert report.equal, report.sentence
        assert report.notes[0].startswith("weights were changed between steps (")
        assert report.notes[0].endswith(": the reference took them over")
        kept.clear()


@ranks(4, timeout=200)
@pytest.mark.parametrize("axes", [("tensor", "pipeline"), ("data", "tensor"), ("data", "pipeline")])
def test_four_ranks_give_no_alarm(axes: Sequence[str]) -> None:
    clean(dict.fromkeys(axes, 2))


@ranks(2)
def test_weights_that_are_loaded_or_made_by_hybridpar_are_those_of_the_reference() -> None:
    def on_meta() -> None:
        mesh = hp.init(tensor=2)
        with torch.device("meta"):
            module = gpt()
        model = hp.parallelize(module, mesh, loss=hp.CrossEntropy(), weights=7)
        _some_steps(mesh, model)

    def loaded() -> None:
        mesh = hp.init(pipeline=2)
        model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
        model.load_full_state_dict({name: x * 0.5 for name, x in model.full_state_dict().items()})
        _some_steps(mesh, model)

    assert_equal(on_meta, steps=1)
    assert_equal(loaded, steps=1)


def _some_steps(mesh: Any, model: Any) -> None:
    from tests.trainings import tokens

    optimizer = plain_adam(model)
    for step in range(3):
        model.train_step(tokens(step), microbatches=2)
        optimizer.step()
        optimizer.zero_grad()


@ranks(2)
def test_gradients_of_two_steps_may_add_up_before_the_optimizer_steps() -> None:
    def train() -> None:
        from tests.trainings import tokens

        mesh = hp.init(pipeline=2)
        model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
        optimizer = plain_adam(model)
        for step in range(6):
            model.train_step(tokens(step), microbatches=2)
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()

    assert_equal(train, steps=4)


@ranks(2)
def test_a_module_that_draws_from_torch_s_generator_is_told_so() -> None:
    class Drawing(nn.Module):
        chain = ("a", "b")

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = _Noisy(), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    report = verify(training(Drawing, batches=numbers, loss=F.mse_loss, init={"data": 2}), 1)
    assert report.finding.cause == "torch's generator", report.sentence


class _Noisy(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5)


@ranks(1)
def test_a_training_without_a_step_is_wrong_use() -> None:
    with pytest.raises(ValueError, match="there is nothing to verify"):
        verify(lambda: None)
    with pytest.raises(ValueError, match="steps=0"):
        verify(lambda: None, steps=0)


# ---- the command


SCRIPT = """\
import sys
import torch
import hybridpar as hp
from hybridpar.models.gpt import GPT

torch.set_num_threads(1)
mesh = hp.init()
print("the script speaks", sys.argv[1:])
model = hp.parallelize(GPT(20, 16, 2, 4, 8), mesh, loss=hp.CrossEntropy())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
if "averaged" in sys.argv:
    optimizer = hp.DistributedOptimizer(optimizer, model)
for step in range(1000):
    text = torch.randint(20, (8, 9), generator=torch.Generator().manual_seed(step))
    a, b = mesh.data.piece(8)
    model.train_step((text[a:b, :-1], text[a:b, 1:]), microbatches=2)
    optimizer.step()
    optimizer.zero_grad()
"""


def command(folder: Path, *words: str) -> Any:
    """A `hybridpar verify`; nothing of it may outlive it, no process and no file."""
    job = run_command(folder, [sys.executable, "-m", "hybridpar", "verify", *words], None, env={"TMPDIR": str(folder)})
    assert not job.left and not [*folder.glob("hybridpar-verify-*")]
    return job


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_verified(script: Path, tmp_path: Path) -> None:
    job = command(tmp_path, "--tensor", "2", "--steps", "2", str(script), "averaged")
    assert job.code == 0, job.said + job.out
    assert "data=1 x pipeline=1 x tensor=2 equals one process in each of 2 steps" in job.out
    assert "updated parameters" in job.out and "the script speaks ['averaged'" in job.said
    assert "in fp64" in job.said


def test_a_difference_ends_with_code_1_and_is_told_as_json(script: Path, tmp_path: Path) -> None:
    job = command(tmp_path, "--data", "2", "--json", "--steps", "1", str(script))
    assert job.code == 1, job.said + job.out
    told = json.loads(job.out)
    assert told["equal"] is False and told["finding"]["cause"] == "missing reduction"
    assert "gradients are not averaged over the data axis" in told["sentence"]
    assert {row["verdict"] for row in told["rows"]} == {"equal", "different"}


def test_the_digits_example_is_verified(tmp_path: Path) -> None:
    job = command(tmp_path, "--tensor", "2", "--steps", "1", str(CHECKOUT / "examples" / "digits_hybrid.py"))
    assert job.code == 0, job.said + job.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nowhere.py",), "there is no script 'nowhere.py'"),
        (("--steps", "0", __file__), "--steps 0: there must be at least 1"),
        (("-np", "3", "--tensor", "2", __file__), "3 ranks cannot be laid out"),
    ],
)
def test_wrong_use_ends_with_code_2(words: Sequence[str], sentence: str) -> None:
    result = CliRunner().invoke(main, ["verify", *words])
    assert result.exit_code == 2 and sentence in result.output


def test_a_model_that_cannot_compute_in_fp64_is_verified_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "single.py"
    path.write_text(
        "import torch\nimport hybridpar as hp\nfrom torch import nn\n"
        "class Single(nn.Linear):\n    def forward(self, x):\n        return super().forward(x.float())\n"
        "mesh = hp.init()\nmodel = hp.parallelize(Single(4, 1), mesh, loss=nn.MSELoss())\n"
        "stepper = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model.train_step((torch.ones(4, 4), torch.ones(4, 1)))\nstepper.step()\n"
    )
    job = command(tmp_path, "-np", "1", str(path))
    assert job.code == 0, job.said + job.out
    assert "note: a later run ended with code 1" in job.out and "in the one step" in job.out


def test_a_script_that_trains_nothing_is_wrong_use(tmp_path: Path) -> None:
    path = tmp_path / "nothing.py"
    path.write_text("import hybridpar as hp\nhp.init()\n")
    job = command(tmp_path, "-np", "1", str(path))
    assert job.code == 2, job.said
    assert "there is nothing to verify" in job.said


def test_a_script_that_fails_is_told(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text("import hybridpar as hp\nhp.init()\nraise OSError('no disk')\n")
    job = command(tmp_path, "--data", "2", str(path))
    assert job.code == 1 and "no disk" in job.said and "before there was anything to compare" in job.said


def test_help_shows_examples() -> None:
    done = subprocess.run([sys.executable, "-m", "hybridpar", "verify", "-h"], capture_output=True, text=True)
    assert "xamples:" in done.stdout and "exit code" in done.stdout


# ---- signatures and reports, without a process


def facts(kind: str, name: str = "block.weight", **known: Any) -> Facts:
    """Facts on a mesh of two replicas of two tensor ranks."""
    places = [(d, 0, t) for d in range(2) for t in range(2)]
    wrong = known.pop("wrong", [[name]] * 4)
    return Facts(kind, name, 0, (2, 1, 2), places, wrong=wrong, held=[1] * 4, **known)


PARTS = [Part(0, 3.0, 1.0), Part(0, 2.0, 2.0), Part(1, 3.0, 4.0), Part(1, 2.0, 8.0)]


def fits(*coefficients: float) -> list[Fit]:
    return [Fit(coefficients, 1e-14)] * 4


@pytest.mark.parametrize(
    ("coefficients", "key", "words"),
    [
        ((2.0, 2.0, 2.0, 2.0), "doubled reduction", "2 times too large"),
        ((0.5, 0.5, 0.5, 0.5), "missing reduction", "2 times too small"),
        ((0.0, 0.0, 0.0, 0.0), "missing", "no gradient at all"),
        ((1.0, 0.0, 1.0, 1.0), "missing microbatch", "microbatch 1 is missing"),
        ((1.0, 1.0, 2.0, 1.0), "doubled microbatch", "microbatch 2 counts twice"),
        ((2 / 3, 1.0, 2 / 3, 1.0), "unequal microbatches", "count 3, 2, 3, 2"),
        ((0.7, 0.7, 0.7, 0.7), "scaled", "0.7 times"),
        ((1.0, 3.0, 5.0, 1.0), "weights of microbatches", "1, 3, 5, 1"),
    ],
)
def test_the_weights_of_microbatches_tell_the_cause(coefficients: Sequence[float], key: str, words: str) -> None:
    cause = likely(facts("gradients", parts=PARTS, fits=fits(*coefficients)))
    assert cause.key == key and words in cause.words


def test_replicas_that_step_with_their_own_gradients_are_known() -> None:
    own = [Fit((2.0, 2.0, 0.0, 0.0), 0.0)] * 2 + [Fit((0.0, 0.0, 2.0, 2.0), 0.0)] * 2
    cause = likely(facts("gradients", parts=PARTS, fits=own))
    assert cause.key == "missing reduction" and "data axis" in cause.words


def test_clipped_gradients_are_known_up_to_a_factor() -> None:
    cause = likely(facts("gradients", parts=PARTS, fits=fits(0.3, 0.0, 0.3, 0.3), clipped=True))
    assert cause.key == "missing microbatch" and cause.microbatch == 1
    local = [Fit((c,) * 4, 0.0) for c in (0.3, 0.4, 0.3, 0.4)]
    assert likely(facts("gradients", parts=PARTS, fits=local)).key == "local clipping"


def test_uses_of_a_tied_weight_tell_which_is_lost() -> None:
    known = {"use_names": ["embed.weight", "head.weight"], "fits": [None] * 4}
    lost = likely(facts("gradients", "embed.weight", uses=Fit((1.0, 0.0), 0.0), **known))
    assert lost.key == "tied weight" and "its use as head.weight is missing" in lost.words
    twice = likely(facts("gradients", "embed.weight", uses=Fit((2.0, 1.0), 0.0), **known))
    assert "its use as embed.weight counts twice" in twice.words


@pytest.mark.parametrize(
    ("loss", "key", "words"),
    [
        (3.75, "unequal microbatches", "every microbatch counts the same"),
        (1.4, "missing reduction", "that of replica 0 alone"),
        ((3 + 12 + 16) / 10, "missing microbatch", "microbatch 1 is missing"),
        (2 * 3.5, "doubled reduction", "2 times too large"),
        (0.5 * 3.5, "scaled", "0.5 times"),
        (3.5 * 1.00004, "unknown", ""),
    ],
)
def test_a_loss_tells_how_its_microbatches_were_weighed(loss: float, key: str, words: str) -> None:
    cause = likely(facts("loss", "", parts=PARTS, loss=loss, reference_loss=3.5))
    assert (cause.key, words in cause.words) == (key, True), cause


def test_a_loss_that_is_no_mean_over_samples_is_told_so_and_not_by_counts_that_are_equal() -> None:
    even = [Part(0, 3.0, 1.0), Part(0, 3.0, 2.0)]
    known = {"parts": even, "loss": 1.5, "reference_loss": 3.0}
    cause = likely(Facts("loss", "", 0, (1, 1, 2), [(0, 0, 0), (0, 0, 1)], wrong=[[""]] * 2, held=[1] * 2, **known))
    assert cause.key == "no mean over samples" and "gives 3 for the whole batch" in cause.words


@pytest.mark.parametrize("factor", [0.999991, 1.0, 1.0001])
def test_a_factor_of_nearly_one_is_no_cause(factor: float) -> None:
    assert likely(facts("loss", "", divergence=divergence(ratio=factor, residual=0.0))).key == "unknown"
    assert likely(facts("gradients", parts=PARTS, fits=fits(*[factor] * 4))).key == "unknown"
    assert likely(facts("updated parameters", fits=[Fit((factor,), 0.0)] * 4)).key == "unknown"


def divergence(**known: Any) -> Divergence:
    usual = {"forward": True, "module": "a", "reader": "b", "kind": "Linear", "microbatch": 1, "rank": 2, "error": 1.0,
             "scale": 1.0, "total": 1.0, "twin": 1.0, "ratio": 0.3, "residual": 0.8}  # fmt: skip
    return Divergence(**(usual | known))


@pytest.mark.parametrize(
    ("known", "key", "module"),
    [
        ({"total": 0.0}, "missing reduction", "a"),
        ({"total": 0.0, "forward": False}, "missing reduction", "b"),
        ({"ratio": 2.0, "residual": 0.0}, "doubled reduction", "a"),
        ({"twin": 0.0}, "wrong slice", "a"),
        ({"ratio": 0.0, "residual": 0.0}, "missing", "a"),
        ({"ratio": 0.3, "residual": 0.0}, "scaled", "a"),
    ],
)
def test_the_first_module_that_differs_tells_the_cause(known: dict[str, Any], key: str, module: str) -> None:
    cause = likely(facts("loss", "", divergence=divergence(**known)))
    assert (cause.key, cause.module, cause.rank) == (key, module, 2)


def test_masks_are_compared_between_samples_parts_and_ranks() -> None:
    half, other = ((0, 2),), ((2, 4),)
    fine = [Mask(0, 0, "drop:0", 0, 11, 64, half, True), Mask(1, 0, "drop:0", 0, 12, 64, other, True)]
    assert same_mask(fine) is None
    twice = [fine[0], Mask(1, 0, "drop:0", 0, 11, 64, other, True)]
    cause = likely(facts("loss", "", masks=twice))
    assert (cause.key, cause.module) == ("same dropout mask", "drop")
    apart = [fine[0], Mask(1, 0, "drop:0", 0, 13, 64, half, True)]
    assert likely(facts("loss", "", masks=apart)).key == "different dropout masks"
    tiny = [Mask(0, 0, "drop:0", 0, 1, 4, (), True), Mask(2, 1, "drop:0", 5, 1, 4, (), True)]
    assert likely(facts("loss", "", masks=tiny)).key != "same dropout mask", "a few bits may be alike by chance"


def test_ranks_that_do_not_go_together_are_told() -> None:
    step = ("step", 3, 0, 17, 2)
    assert strayed([step, step]) == "" == strayed([("end",), ("end",)])
    assert "goes on to step 3" in strayed([("end",), step])
    assert "different batches in step 3" in strayed([step, ("step", 3, 0, 18, 2)])
    assert "different numbers of microbatches" in strayed([step, ("step", 3, 0, 17, 4)])
    assert strayed([step, ("step", 3, 1, 99, 2)]) == "", "replicas have batches of their own"


def test_a_weight_that_some_ranks_freeze_is_told_and_one_that_a_stage_has_alone_is_not() -> None:
    cause = frozen_apart([(("a.weight",), ("b",)), ((), ("a.weight", "b")), ((), ("a.weight", "b"))])
    assert cause.words.startswith("a.weight is frozen on rank 0 and trained on ranks 1, 2: ")
    assert frozen_apart([(("a",), ("b",)), (("c",), ("d",))]) is None


def test_changes_between_steps_are_apart_where_replicas_or_most_of_a_shard_are() -> None:
    kept, moved, other = Change(0, 1, 1, 0.0, 0.0), Change(0, 1, 2, 0.5, 1.0), Change(0, 1, 3, 0.5, 1.0)
    apart = [one.words for one in changed_apart(2, [{"a": kept}, {"a": moved}])]
    assert apart[0].startswith("rank 1 has changed a between steps 1 and 2, and rank 0 has not")
    assert [one.words for one in changed_apart(2, [{"a": other}, {"a": moved}])] == [
        "ranks 0, 1 have changed a in different ways between steps 1 and 2"
    ]
    elsewhere, few = Change(1, 7, 8, 0.5, 1.0), Change(1, 7, 8, 0.5, 0.1)
    assert not [*changed_apart(2, [{"a": moved}, {"a": elsewhere}])]
    assert [*changed_apart(2, [{"a": kept}, {"a": elsewhere}])]
    assert not [*changed_apart(2, [{"a": kept}, {"a": few}])], "a clamp may leave a shard as it is"
    before = Change(0, 5, 6, 0.5, 1.0)
    assert not [*changed_apart(2, [{"a": before}, {"a": moved}])], "they were apart before"


def test_coefficients_are_found_by_least_squares() -> None:
    columns = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fit(columns, columns @ torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    assert found.holds and found.coefficients == pytest.approx((1.0, 0.0, 2.0), abs=1e-12)
    assert not fit(columns, torch.ones(50, dtype=torch.float64)).holds


def test_a_report_survives_json_and_shows_the_worst_of_each_kind() -> None:
    one = Difference(0, "gradients", "a.weight", 1, 2e-3, 1e-4, 1.0)
    two = Difference(0, "loss", "", 0, 1e-9, 1e-6, 4.0)
    broken = Difference(1, "loss", "", 0, float("inf"), 1e-6, 4.0)
    assert first([two, broken, one]) is one and first([two]) is None
    shown = rows("fp64", [one, two])
    assert [(row.quantity, row.verdict) for row in shown] == [("loss", "equal"), ("gradients", "different")]
    assert [row.verdict for row in rows("float32", [one, broken], excused=True)] == ["different", "rounding"]
    finding = Finding("gradients", "a", 0, 1, None, 2e-3, 1e-4, "unknown", "It differs.")
    report = Report("data=1 x pipeline=1 x tensor=2", 3, rows("fp64", [one, broken]), finding, ("a note",))
    assert Report.from_json(report.as_json()) == report and not report.equal


def test_a_script_that_hangs_is_ended_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "hangs.py"
    path.write_text(
        "import time\nimport hybridpar as hp\nmesh = hp.init()\n"
        "def stuck():\n    time.sleep(1000) if mesh.rank else mesh.everyone.barrier()\nstuck()\n"
    )
    job = command(tmp_path, "--data", "2", "--timeout", "8", str(path))
    assert job.code == 1 and "the script hangs, or its first 3 steps need more than 8 s" in job.said, job.said
    assert job.lines("[rank 1] verify: ")[0].endswith("It is at hangs.py:5 in stuck")
    assert "hangs.py:5 in stuck, " in job.lines("[rank 0] verify: ")[0] and "in barrier" in job.said
