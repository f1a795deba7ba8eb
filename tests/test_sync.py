"""Sync policies on several ranks against plain simulations in one process."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import hybridpar as hp
from benchmarks.policies import table
from hybridpar.install.probe import prefix, scripts
from hybridpar.launch.job import plan
from hybridpar.mesh import Mesh
from hybridpar.optim.sync.rounds import Rounds
from hybridpar.optim.sync.wish import AllReduce, AsyncPs, DiLoCo, Easgd, LocalSgd, parse
from tests.jobs import run_command
from tests.models import gpt, layers, mine, numbers, tokens
from tests.ranks import ranks
from tests.test_equality import opened

# fp64: sums over replicas in another order, for a dozen steps.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
Make = Callable[[Any], torch.optim.Optimizer]
adamw = torch.optim.AdamW


def plain_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = module(batch[0])
    if batch[1].dtype == torch.int64:
        return nn.functional.cross_entropy(out.flatten(0, -2), batch[1].flatten())
    return nn.functional.mse_loss(out, batch[1])


class Simulated:
    """Replicas of `module` in one process, each with its own optimizer."""

    def __init__(self, module: nn.Module, replicas: int) -> None:
        self.modules = [copy.deepcopy(module) for _ in range(replicas)]
        self.optimizers = [adamw(one.parameters(), lr=1e-2) for one in self.modules]

    def step(self, batches: list[tuple[Tensor, Tensor]], together: int = 1) -> None:
        """One step of all, gradients averaged in groups of `together` replicas."""
        for one, batch in zip(self.modules, batches):
            one.zero_grad()
            plain_loss(one, batch).backward()
        for start in range(0, len(self.modules), together):
            group = [list(one.parameters()) for one in self.modules[start : start + together]]
            for same in zip(*group):
                mean = torch.stack([p.grad for p in same]).mean(0)
                for p in same:
                    p.grad = mean.clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def weights(self) -> list[list[Tensor]]:
        return [[p.detach().clone() for p in one.parameters()] for one in self.modules]

    @torch.no_grad()
    def set(self, several: list[list[Tensor]]) -> None:
        for one, values in zip(self.modules, several):
            for p, value in zip(one.parameters(), values):
                p.copy_(value)


class Outer:
    """DiLoCo as its paper tells it, with torch's own SGD."""

    def __init__(self, simulated: Simulated, lr: float, momentum: float) -> None:
        self._all = simulated
        self._anchor = [nn.Parameter(p) for p in simulated.weights()[0]]
        self._sgd = torch.optim.SGD(self._anchor, lr=lr, momentum=momentum, nesterov=momentum > 0)

    def begin(self) -> None:
        self._left = self._all.weights()
        for i, p in enumerate(self._anchor):
            p.grad = p.detach() - torch.stack([one[i] for one in self._left]).mean(0)

    def finish(self) -> None:
        self._sgd.step()
        now = self._all.weights()
        self._all.set(
            [[a.detach() + w - left for a, w, left in zip(self._anchor, *two)] for two in zip(now, self._left)]
        )


def trained(model: hp.ParallelModel, sync: str, batches: list[tuple[Tensor, Tensor]], **options: Any) -> Any:
    """The model's optimizer after a step for each batch; this replica takes its share of them."""
    optimizer = hp.DistributedOptimizer(adamw(model.parameters(), lr=1e-2), model, sync=sync, **options)
    for batch in batches:
        model.train_step(tuple(mine(x, model.world.data) for x in batch), microbatches=2)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same(model: hp.ParallelModel, module: nn.Module) -> None:
    """The weights of this rank's replica are those of `module`."""
    world, specs = model.world, model.specs()
    expected = dict(module.named_parameters())
    for name, p in model.named_parameters():
        spec, whole = specs[name], expected[name].detach()
        if spec.dim is not None:
            held = spec.held(world.tensor.index)
            whole = torch.cat([whole.narrow(spec.dim, a, b - a) for a, b in held], spec.dim)
        torch.testing.assert_close(p.detach(), whole, **CLOSE, msg=lambda told, name=name: f"{name}: {told}")


def parts(batch: tuple[Tensor, Tensor], replicas: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].chunk(replicas), batch[1].chunk(replicas)))


def mlp_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(numbers(8, 6, seed=step), numbers(8, 3, seed=step + 50)) for step in range(count)]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return layers(6, 8, 3).double()


# ---- wishes


def test_a_wish_is_read_as_it_is_written() -> None:
    assert parse("allreduce") == AllReduce() and parse(" local_sgd(8) ") == LocalSgd(8)
    assert parse("diloco(64, momentum=0.5, delay=2, inside='node')") == DiLoCo(64, 0.7, 0.5, 2, "node")
    assert parse("easgd(steps=4)") == Easgd(4, 0.9) and parse("async_ps(3)") == AsyncPs(3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("local_sgd", "needs steps, as in local_sgd"),
        ("local_sgd(0)", "whole number of at least 1"),
        ("local_sgd(8, 9)", "takes not 2 numbers"),
        ("diloco(4, delay=4)", "do not fit into a round of 4"),
        ("diloco(4, rate=4)", "takes no 'rate'"),
        ("diloco(4, lr=-1)", "more than 0"),
        ("diloco(4, momentum=1)", "less than 1"),
        ("easgd(4, pull=2)", "at most 1"),
        ("sgd(4)", "the policies are allreduce, local_sgd"),
        ("local_sgd(", "cannot be read"),
        ("local_sgd(os.exit())", "cannot be read"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_in_one_sentence(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(text)


def test_the_command_line_hands_the_wish_to_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    job = plan(2, [str(script)], {}, scripts(), prefix(), cores=2, sync="diloco(8)")
    assert job.environment["HYBRIDPAR_SYNC"] == "diloco(8)"
    with pytest.raises(ValueError, match="there is no policy 'dilocco'"):
        plan(2, [str(script)], {}, scripts(), prefix(), cores=2, sync="dilocco(8)")


# ---- rounds


@ranks(2)
@pytest.mark.parametrize(
    ("sync", "lr", "momentum", "delay"),
    [("local_sgd(3)", 1.0, 0.0, 0), ("diloco(3)", 0.7, 0.9, 0), ("diloco(3, lr=0.5, delay=1)", 0.5, 0.9, 1)],
)
def test_rounds_are_those_of_a_plain_simulation(sync: str, lr: float, momentum: float, delay: int) -> None:
    mesh = opened(Mesh(data=2))
    batches = mlp_batches(8)
    model = hp.parallelize(mlp(), mesh, nn.MSELoss())
    optimizer = trained(model, sync, batches)
    simulated = Simulated(mlp(), 2)
    outer = Outer(simulated, lr, momentum)
    for number, batch in enumerate(batches, 1):
        simulated.step(parts(batch, 2))
        if number > 3 and number % 3 == delay and delay:
            outer.finish()
        if number % 3 == 0:
            outer.begin()
            if not delay:
                outer.finish()
    same(model, simulated.modules[mesh.data.index])
    assert "step 2 of a round of 3" in optimizer.policy.apart
    outer.begin()  # what is met is the round as far as it came
    outer.finish()
    simulated.set([[p.detach() for p in outer._anchor]] * 2)
    optimizer.meet()
    same(model, simulated.modules[0])
    assert optimizer.policy.apart is None
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [Mesh(2, 1, 2), Mesh(2, 2, 1)], ids=str)
def test_rounds_go_with_tensor_and_pipeline_parallelism(degrees: Mesh) -> None:
    mesh = opened(degrees)
    batches = [tokens(step) for step in range(4)]
    torch.manual_seed(1)
    model = hp.parallelize(gpt(), mesh, hp.CrossEntropy())
    trained(model, "diloco(2)", batches, clip=None)
    torch.manual_seed(1)
    simulated = Simulated(gpt(), 2)
    outer = Outer(simulated, 0.7, 0.9)
    for number, batch in enumerate(batches, 1):
        simulated.step(parts(batch, 2))
        if number % 2 == 0:
            outer.begin()
            outer.finish()
    same(model, simulated.modules[0])
    mesh.close()


@ranks(4)
def test_two_levels_average_gradients_near_and_weights_far() -> None:
    mesh = opened(Mesh(data=4))
    batches = mlp_batches(5)
    model = hp.parallelize(mlp(), mesh, nn.MSELoss())
    trained(model, "diloco(2, inside=2)", batches)
    simulated = Simulated(mlp(), 4)
    outer = Outer(simulated, 0.7, 0.9)
    for number, batch in enumerate(batches, 1):
        simulated.step(parts(batch, 4), together=2)
        if number % 2 == 0:
            outer.begin()
            outer.finish()
    same(model, simulated.modules[mesh.data.index])
    with pytest.raises(ValueError, match="4 replicas cannot be put into groups of 3: choose one of 1, 2, 4"):
        hp.DistributedOptimizer(adamw(model.parameters()), model, sync="diloco(2, inside=3)")
    mesh.close()


@ranks(2)
def test_elastic_averaging_is_that_of_a_plain_simulation() -> None:
    mesh = opened(Mesh(data=2))
    batches = mlp_batches(6)
    model = hp.parallelize(mlp(), mesh, nn.MSELoss())
    optimizer = trained(model, "easgd(2, pull=0.8)", batches)
    simulated = Simulated(mlp(), 2)
    centre = simulated.weights()[0]
    for number, batch in enumerate(batches, 1):
        simulated.step(parts(batch, 2))
        if number % 2 == 0:
            away = [[w - c for w, c in zip(one, centre)] for one in simulated.weights()]
            simulated.set([[w - 0.4 * a for w, a in zip(*two)] for two in zip(simulated.weights(), away)])
            centre = [c + 0.4 * (a + b) for c, a, b in zip(centre, *away)]
    same(model, simulated.modules[mesh.data.index])
    optimizer.meet()
    simulated.set([centre, centre])
    same(model, simulated.modules[0])
    mesh.close()


@ranks(2)
def test_what_does_not_go_with_replicas_on_their_own_is_refused_in_one_sentence() -> None:
    mesh = opened(Mesh(data=2))

    def wrapped(module: nn.Module, sync: str, **options: Any) -> hp.ParallelModel:
        model = hp.parallelize(module, mesh, nn.MSELoss())
        hp.DistributedOptimizer(adamw(model.parameters()), model, sync=sync, **options)
        return model

    with pytest.raises(ValueError, match="a SyncBatchNorm needs all 2 replicas in every step"):
        wrapped(nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4)), "local_sgd(2)")
    with pytest.raises(ValueError, match="compression=hp.Compression.bf16 .*: leave out the compression"):
        wrapped(mlp(), "async_ps(1)", compression=hp.Compression.bf16)

    def train() -> None:
        model = wrapped(mlp(), "local_sgd(2)")
        for batch in mlp_batches(2):
            model.train_step(tuple(mine(x, mesh.data) for x in batch))

    with pytest.raises(ValueError, match="verify the training with sync=.allreduce"):
        hp.verify(train, steps=1)
    mesh.close()


# ---- checkpoints


def opened_training(mesh: hp.World, sync: str, seed: int) -> tuple[hp.ParallelModel, hp.DistributedOptimizer]:
    torch.manual_seed(seed)
    model = hp.parallelize(layers(6, 8, 3).double(), mesh, nn.MSELoss())
    return model, hp.DistributedOptimizer(adamw(model.parameters(), lr=1e-2), model, sync=sync)


def go_on(model: hp.ParallelModel, optimizer: hp.DistributedOptimizer, steps: int) -> list[Tensor]:
    for step in range(model.steps, model.steps + steps):
        model.train_step(tuple(mine(x, model.world.data) for x in mlp_batches(step + 1)[-1]))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@ranks(2)
@pytest.mark.parametrize("sync", ["diloco(2)", "easgd(2)"])
def test_a_checkpoint_goes_on_exactly_and_is_refused_where_replicas_are_apart(sync: str, tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))
    one, other = opened_training(mesh, sync, 1), opened_training(mesh, sync, 2)
    go_on(*one, 3)
    with pytest.raises(ValueError, match=r"different weights now, since .*: call optimizer.meet\(\)"):
        hp.save(tmp_path / "x", *one)
    with pytest.raises(ValueError, match="replicas 0 and 1 hold different weights now"):
        hp.save(tmp_path / "x", one[0])
    one[1].meet()
    hp.save(tmp_path / "x", *one)
    hp.load(tmp_path / "x", *other)
    for mine_, theirs in zip(go_on(*one, 3), go_on(*other, 3)):
        assert torch.equal(mine_, theirs)
    averaging = opened_training(mesh, "allreduce", 3)
    hp.load(tmp_path / "x", *averaging)  # into another policy: the states are then the first replica's on all
    for p in go_on(*averaging, 2):
        both = mesh.peers.allgather(p.flatten()).chunk(2)
        assert torch.equal(*both)
    mesh.close()
    mesh = opened(Mesh(pipeline=2))
    fewer = opened_training(mesh, sync, 4)
    hp.load(tmp_path / "x", *fewer)
    go_on(*fewer, 2)
    mesh.close()


@ranks(2)
def test_the_command_line_overrules_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDPAR_SYNC", "local_sgd(5)")
    mesh = hp.init()
    _, optimizer = opened_training(mesh, "allreduce", 1)
    assert isinstance(optimizer.policy, Rounds)
    mesh.close()
    monkeypatch.setenv("HYBRIDPAR_SYNC", "local(5)")
    with pytest.raises(ValueError, match="there is no policy 'local'"):
        hp.init()


def test_the_benchmark_of_policies_measures_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.policies", "--rank", "local_sgd(8)", "--steps", "16"]
    # The harness ends a command with a word of its own: a file that nobody writes here.
    job = run_command(tmp_path, [*command, "--folder", str(tmp_path), "--json"], ranks=2)
    assert job.code == 0, job.said
    told = json.loads(job.out)
    assert set(told) == {"loss", "megabytes", "ms", "sent", "curve"} and told["megabytes"] > 0
    shown = io.StringIO()
    Console(file=shown, width=80).print(table({"local_sgd(8)": told}))
    assert "local_sgd(8)" in shown.getvalue()
