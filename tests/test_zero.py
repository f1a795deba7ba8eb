"""ZeRO: less memory on each rank, and the numbers of one process. Tolerances are those of tests.test_equality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybridpar as hp
from hybridpar.mesh import Mesh
from hybridpar.optim.zero.inside import check_elementwise
from tests.models import layers, mine, numbers, tokens
from tests.ranks import ranks
from tests.test_equality import CLIP, STEPS, TOLERANCE, Case, opened, plain
from tests.trainings import plain_adam, training

CLOSE = {"rtol": 0, "atol": TOLERANCE[torch.float64]}


def trained(
    mesh: Any,
    case: Case,
    zero: int,
    microbatches: int = 3,
    steps: int = STEPS,
    bucket_bytes: int = 4000,
    **how: Any,
) -> Any:
    """Train `case` on `mesh` and hold each number against one process."""
    reference = plain(case)
    model = hp.parallelize(case.model(), mesh, hp.CrossEntropy(), **how)
    clip = CLIP if case.clip else None
    stepper = case.stepper(model.parameters())
    optimizer = hp.DistributedOptimizer(stepper, model, clip=clip, bucket_bytes=bucket_bytes, zero=zero)
    for step in range(steps):
        batch = tuple(mine(x, mesh.data) for x in tokens(step))
        assert abs(model.train_step(batch, microbatches) - reference.losses[step]) < TOLERANCE[torch.float64]
        gradients = model.full_gradients()
        for name, gradient in reference.gradients[step].items():
            torch.testing.assert_close(gradients[name], gradient, **CLOSE, msg=f"gradient {step} of {name}")
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        weights = model.full_state_dict()
        for name, weight in reference.weights[step].items():
            torch.testing.assert_close(weights[name], weight, **CLOSE, msg=f"{name} after step {step}")
    return model, optimizer


CASES = [Case(), Case(tied=False, clip=True, kv_heads=2), Case(clip=True, optimizer="sgd")]


@ranks(2, 4)
@pytest.mark.parametrize("zero", [1, 2])
def test_training_equals_one_process_where_all_ranks_are_replicas(rank_count: int, zero: int) -> None:
    mesh = opened(Mesh(data=rank_count))
    _, optimizer = trained(mesh, Case(clip=True), zero)
    held = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.dim())
    whole = sum(2 * p.numel() for p in Case().model().parameters())
    assert held < 1.1 * whole / rank_count + 1000
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_one_process_beside_tensor_and_pipeline(case: Case, zero: int) -> None:
    mesh = opened(Mesh(data=2, tensor=2))
    trained(mesh, case, zero, sequence=case.clip)
    mesh.close()
    mesh = opened(Mesh(data=2, pipeline=2))
    trained(mesh, case, zero, schedule="gpipe" if case.clip else "1f1b")
    mesh.close()


@ranks(8)
def test_training_equals_one_process_on_all_three_axes() -> None:
    case = Case(depth=4, clip=True, kv_heads=2)
    mesh = opened(Mesh(2, 2, 2))
    trained(mesh, case, 2, schedule="interleaved", chunks=2, sequence=True)
    mesh.close()


@ranks(4)
def test_a_training_changes_its_mesh_and_its_stage_through_checkpoints(tmp_path: Path) -> None:
    reference = plain(Case())
    way = [(Mesh(data=4), 1), (Mesh(2, 2, 1), 2), (Mesh(1, 2, 2), 0), (Mesh(2, 1, 2), 2), (Mesh(data=4), 0)]
    for step, (degrees, zero) in enumerate(way):
        mesh = opened(degrees)
        model = hp.parallelize(Case().model(), mesh, hp.CrossEntropy())
        optimizer = hp.DistributedOptimizer(Case().stepper(model.parameters()), model, zero=zero)
        if step:
            hp.load(tmp_path / f"{step - 1}", model, optimizer)
        loss = model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), 2)
        assert abs(loss - reference.losses[step]) < TOLERANCE[torch.float64]
        optimizer.step()
        optimizer.zero_grad()
        hp.save(tmp_path / f"{step}", model, optimizer, asynchronous=step == 1).wait()
        for name, weight in model.full_state_dict().items():
            torch.testing.assert_close(weight, reference.weights[step][name], **CLOSE)
        mesh.close()


# ---- what parameters, gradients and optimizers may be


class Odd(nn.Module):
    """A scalar, a channels_last kernel, a layer that is frozen at first, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen, self.unused, self.out = nn.Linear(5, 5), nn.Linear(4, 4), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.frozen(torch.tanh(self.conv(x).sum((2, 3)) * self.scale)))


MAKERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 0.05),
    "adam": lambda ps: torch.optim.Adam(ps, 0.01, eps=1e-5, amsgrad=True),
}


def odd_steps(model: Any, module: Odd, optimizer: Any, step: Any) -> None:
    for number in range(4):
        if number == 2:
            module.frozen.requires_grad_(True)
        step(number)
        optimizer.step()
        if number != 0:  # gradients that stay are added to
            optimizer.zero_grad()


@ranks(3)
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("made", MAKERS)
def test_odd_parameters_equal_one_process(made: str, zero: int, tmp_path: Path) -> None:
    mesh = opened(Mesh(data=3))
    plain_one, module = Odd().double(), Odd().double()
    for one in (plain_one, module):
        one.frozen.requires_grad_(False)
    x, y = numbers(9, 3, 4, 4), numbers(9, 2, seed=1)
    optimizer = MAKERS[made](plain_one.parameters())
    odd_steps(None, plain_one, optimizer, lambda n: nn.functional.mse_loss(plain_one(x + n), y).backward())
    model = hp.parallelize(module, mesh, nn.MSELoss())
    cut = hp.DistributedOptimizer(MAKERS[made](model.parameters()), model, zero=zero)
    batch = lambda n: (mine(x + n, mesh.data), mine(y, mesh.data))  # noqa: E731
    odd_steps(model, module, cut, lambda n: model.train_step(batch(n), 2))
    for name, weight in model.full_state_dict().items():
        torch.testing.assert_close(weight, plain_one.state_dict()[name], **CLOSE, msg=name)
    hp.save(tmp_path / "x", model, cut)
    before = {p: {key: torch.as_tensor(x).clone() for key, x in state.items()} for p, state in cut.state.items()}
    hp.load(tmp_path / "x", model, cut)
    for p, state in before.items():
        assert all(torch.equal(x, torch.as_tensor(cut.state[p][key])) for key, x in state.items()), state
    mesh.close()


@ranks(2)
def test_what_an_optimizer_knew_before_is_cut_and_later_groups_are_too(tmp_path: Path) -> None:
    mesh = opened(Mesh(data=2))
    reference, module = layers(6, 8, 3), layers(6, 8, 3)
    one, model = MAKERS["adam"](reference.parameters()), hp.parallelize(module, mesh, nn.MSELoss())
    other = MAKERS["adam"](model.parameters())
    x, y = numbers(8, 6), numbers(8, 3, seed=1)
    for optimizer, net in ((one, reference), (other, module)):
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    cut = hp.DistributedOptimizer(other, model, zero=2)
    nn.functional.mse_loss(reference(x), y).backward()
    model.train_step((mine(x, mesh.data), mine(y, mesh.data)), 2)
    assert torch.allclose(hp.clip_grad_norm_(model, 0.01), nn.utils.clip_grad_norm_(reference.parameters(), 0.01))
    one.step()
    cut.step()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, **CLOSE)
    with pytest.raises(ValueError, match="exp_avg of parameter 0 has shape .* use hp.save and hp.load"):
        cut.load_state_dict(one.state_dict())
    cut.load_state_dict(cut.state_dict())
    model.zero_grad()
    assert all(p.grad is None for group in cut.param_groups for p in group["params"])
    for p in module[2].parameters():
        p.requires_grad_(False)
    part = hp.DistributedOptimizer(torch.optim.SGD(module[0].parameters(), 0.1), model, zero=1)
    part.add_param_group({"params": module[2].parameters(), "lr": 0.2})
    module[2].requires_grad_(True)
    reference.zero_grad()
    nn.functional.mse_loss(reference(x), y).backward()
    for layer, lr in ((reference[0], 0.1), (reference[2], 0.2)):
        torch.optim.SGD(layer.parameters(), lr).step()
    model.train_step((mine(x, mesh.data), mine(y, mesh.data)))
    part.step()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, **CLOSE)
    mesh.close()


@ranks(2)
def test_bfloat16_gradients_are_averaged_in_float32(rank_count: int) -> None:
    mesh = opened(Mesh(data=2))
    found = []
    for zero in (0, 1):
        model = hp.parallelize(layers(6, 8, 3, dtype=torch.bfloat16), mesh, nn.MSELoss())
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, zero=zero)
        x, y = numbers(8, 6, dtype=torch.bfloat16), numbers(8, 3, seed=1, dtype=torch.bfloat16)
        model.train_step((mine(x, mesh.data), mine(y, mesh.data)), 2)
        optimizer.step()
        found.append(model.full_state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    mesh.close()


@ranks(2)
def test_what_is_not_possible_is_refused_alike() -> None:
    mesh = opened(Mesh(data=2))
    model = hp.parallelize(layers(6, 8, 3), mesh, nn.MSELoss())
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="zero=4"):
        hp.DistributedOptimizer(sgd, model, zero=4)
    with pytest.raises(ValueError, match="zero=1 .* compression=hp.Compression.fp16 .*: leave out one of them"):
        hp.DistributedOptimizer(sgd, model, zero=1, compression=hp.Compression.fp16)
    hp.DistributedOptimizer(sgd, model, zero=2)
    batch = (numbers(4, 6), numbers(4, 3))
    with pytest.raises(ValueError, match='sync="allreduce", or leave out zero'):
        hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, zero=1, sync="local_sgd(2)")
    with pytest.raises(ValueError, match="cut their batches into 3 microbatches, this one into .*zero=2"):
        model.train_step(batch, 1 + mesh.rank)
    mesh.close()


@ranks(2)
def test_verify_says_that_gradients_are_in_pieces() -> None:
    cut = training(stepper=lambda model: hp.DistributedOptimizer(plain_adam(model), model, zero=1))
    with pytest.raises(ValueError, match="verify compares whole gradients, and zero="):
        hp.verify(cut)


@pytest.mark.parametrize("kind", ["Adafactor", "Muon"])
def test_optimizers_of_matrices_are_refused(kind: str) -> None:
    optimizer = getattr(torch.optim, kind)([nn.Parameter(torch.ones(4, 4))])
    with pytest.raises(ValueError, match=f"{kind} does not treat each element by itself"):
        check_elementwise(optimizer, 1)


@pytest.mark.parametrize(
    "kind", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"]
)
def test_optimizers_of_elements_are_taken(kind: str) -> None:
    check_elementwise(getattr(torch.optim, kind)([nn.Parameter(torch.ones(3))]), 1)
