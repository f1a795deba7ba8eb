"""ZeRO 3: weights that are there only while they are used, and the numbers of one process.

Tolerances are those of tests.test_equality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybridpar as hp
from hybridpar.mesh import Mesh
from hybridpar.models.gpt import GPT
from hybridpar.optim.zero.bucket import Bucket
from hybridpar.optim.zero.units import outside, units
from hybridpar.wires.axis import Alone
from tests.models import gpt, layers, mine, numbers, tokens
from tests.ranks import ranks
from tests.test_equality import CLIP, TOLERANCE, Case, opened, plain
from tests.test_zero import CLOSE, MAKERS, trained


def there(model: Any) -> int:
    """Bytes of the memory in which parameters lie now."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


# ---- equal to one process


@ranks(2)
def test_training_equals_one_process_where_all_ranks_are_replicas(rank_count: int) -> None:
    mesh = opened(Mesh(data=2))
    model, optimizer = trained(mesh, Case(clip=True), 3, steps=3)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    pieces = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    assert there(model) < 0.02 * whole and pieces < 0.51 * whole + 1000
    mesh.close()


@ranks(4, timeout=120)
def test_training_equals_one_process_beside_tensor_and_pipeline() -> None:
    mesh = opened(Mesh(data=2, tensor=2))
    trained(
        mesh, Case(tied=False, clip=True, kv_heads=2), 3, steps=2, bucket_bytes=16000, sequence=True, recompute="full"
    )
    mesh.close()
    mesh = opened(Mesh(data=2, pipeline=2))
    trained(mesh, Case(), 3, steps=2, bucket_bytes=16000)
    how = {"schedule": "gpipe", "recompute": "blocks.*.mlp"}
    trained(mesh, Case(clip=True, optimizer="sgd"), 3, steps=2, bucket_bytes=16000, **how)
    mesh.close()


@ranks(8, timeout=120)
def test_training_equals_one_process_on_all_three_axes() -> None:
    mesh = opened(Mesh(2, 2, 2))
    how = {"schedule": "interleaved", "chunks": 2, "sequence": True}
    trained(mesh, Case(depth=4, clip=True, kv_heads=2), 3, steps=2, bucket_bytes=64000, **how)
    mesh.close()


# ---- what else reads and writes weights


@ranks(2)
def test_evaluations_take_unequal_batches_of_the_replicas() -> None:
    mesh = opened(Mesh(data=2))
    model = hp.parallelize(gpt(), mesh, hp.CrossEntropy())
    optimizer = hp.DistributedOptimizer(Case().stepper(model.parameters()), model, bucket_bytes=4000, zero=3)
    batch = tuple(mine(x, mesh.data) for x in tokens(0))
    before = model.eval_step(batch, 2)
    assert model.eval_step(batch, 1 + 2 * mesh.rank) == pytest.approx(before, abs=1e-12)
    torch.testing.assert_close(model.predict(batch[0], 3 - mesh.rank), gpt()(batch[0]), **CLOSE)
    with pytest.raises(ValueError, match="cut their batches into 3 microbatches, this one into .*zero=3 needs"):
        model.train_step(batch, 1 + mesh.rank)
    del optimizer
    mesh.close()


@ranks(4)
def test_checkpoints_and_averages_are_whole_whatever_the_mesh(tmp_path: Path) -> None:
    reference = plain(Case())
    way = [(Mesh(data=4), 3), (Mesh(2, 2, 1), 3), (Mesh(1, 2, 2), 0), (Mesh(2, 1, 2), 3)]
    average = {name: x.clone() for name, x in gpt().state_dict().items()}
    for step, (degrees, zero) in enumerate(way):
        mesh = opened(degrees)
        model = hp.parallelize(Case().model(), mesh, hp.CrossEntropy())
        optimizer = hp.DistributedOptimizer(Case().stepper(model.parameters()), model, zero=zero, bucket_bytes=4000)
        ema = hp.EMA(model, 0.5)
        if step:
            hp.load(tmp_path / f"{step - 1}", model, optimizer, ema)
        loss = model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), 2)
        assert abs(loss - reference.losses[step]) < TOLERANCE[torch.float64]
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        hp.save(tmp_path / f"{step}", model, optimizer, ema, asynchronous=step == 1).wait()
        for name, weight in model.full_state_dict().items():
            torch.testing.assert_close(weight, reference.weights[step][name], **CLOSE)
            average[name].lerp_(weight, 0.5)
        with ema.applied():
            for name, weight in model.full_state_dict().items():
                torch.testing.assert_close(weight, average[name], **CLOSE)
        model.load_full_state_dict(reference.weights[step])
        assert all(torch.equal(x, reference.weights[step][name]) for name, x in model.full_state_dict().items())
        mesh.close()


class Twice(nn.Module):
    """Layers that are called twice, a weight that the root reads, and a unit that gives several tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(6, 3)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.first(x)[:, None]) * self.scale
        y, _ = self.attention(x, x, x)
        for block in (*self.blocks, *self.blocks):
            y = block(y)
        y = self.again(y + x)
        y += x
        return self.last(y[:, 0])


@ranks(2)
def test_shared_and_repeated_layers_equal_one_process_and_another_optimizer_may_follow() -> None:
    mesh = opened(Mesh(data=2))
    reference, module = Twice().double(), Twice().double()
    model = hp.parallelize(module, mesh, nn.MSELoss())
    x, y = numbers(8, 6), numbers(8, 3, seed=1)
    for zero, offload in ((3, False), (0, False), (3, True)):
        one = MAKERS["adam"](reference.parameters())
        how = {"zero": zero, "offload": offload, "bucket_bytes": 500}
        cut = hp.DistributedOptimizer(MAKERS["adam"](model.parameters()), model, **how)
        for _ in range(2):
            one.zero_grad()
            nn.functional.mse_loss(reference(x), y).backward()
            one.step()
            model.train_step((mine(x, mesh.data), mine(y, mesh.data)), 2)
            cut.step()
            cut.zero_grad()
        for name, weight in model.full_state_dict().items():
            torch.testing.assert_close(weight, reference.state_dict()[name], **CLOSE, msg=name)
    mesh.close()


@ranks(2)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precisions_give_the_weights_that_zero_2_gives(precision: str) -> None:
    mesh, found = opened(Mesh(data=2)), []
    for zero in (2, 3):
        model = hp.parallelize(gpt(dtype=torch.float32), mesh, hp.CrossEntropy(), precision=precision)
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, clip=CLIP, zero=zero)
        for step in range(2):
            model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), 2)
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.full_state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=TOLERANCE[torch.float32], msg=name)
    mesh.close()


class Outside(nn.Module):
    """Its own forward reads the weight of a part, beside the part's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) @ self.first.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler loads what torch deprecates
@ranks(2)
def test_what_is_not_possible_is_refused_with_a_way_out() -> None:
    mesh = opened(Mesh(data=2))
    for module, words in ((Outside(), "reads a weight outside"), (layers(6, 4, 3), "0 is compiled, and zero=3")):
        if "compiled" in words:
            module[0].compile()
        model = hp.parallelize(module.float(), mesh, nn.MSELoss())
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(ValueError, match="offload=True and zero=2"):
            hp.DistributedOptimizer(sgd, model, zero=2, offload=True)
        with pytest.raises(ValueError, match=words):
            optimizer = hp.DistributedOptimizer(sgd, model, zero=3, bucket_bytes=64)
            model.train_step((torch.ones(2, 6), torch.ones(2, 3)))
            del optimizer
    mesh.close()


def test_pieces_their_gradients_and_states_lie_on_the_device_that_is_their_home() -> None:
    module, alone, home = layers(6, 4), Alone("data"), torch.device("meta")
    before = module[0].weight.detach().clone()
    bucket = Bucket("b", list(module.named_parameters()), alone, alone, each_pass=True, home=home)
    assert all(piece.held.device == home and piece.whole.isnan().all() for piece in bucket.pieces)
    bucket.fill(torch.cat([before.view(-1), torch.zeros(24, dtype=before.dtype)]))
    assert torch.equal(module[0].weight, before)
    module(numbers(2, 6)).sum().backward()
    bucket.launch()
    bucket.memory.empty()
    bucket.deliver([True, True])
    optimizer = torch.optim.Adam([piece.held for piece in bucket.pieces])
    optimizer.step()
    lie = [x.device for piece in bucket.pieces for x in (piece.held.grad, optimizer.state[piece.held]["exp_avg"])]
    assert lie == [home] * 4 and all(p.grad is None for p in module.parameters())


# ---- units


def test_units_are_blocks_and_what_holds_parameters_beside_them() -> None:
    model = GPT(vocabulary=9, width=8, depth=2, heads=2, context=4)
    parts = [model.embed.token, model.embed.position, *model.blocks, model.head.norm, model.head.project]
    assert units(model) == parts and not outside(model, units(model))
    chain = layers(4, 5, 6)
    assert units(chain) == [chain[0], chain[2]]


def test_what_a_module_around_units_holds_stays_whole() -> None:
    model, found = Twice(), units(Twice())
    assert list(map(type, found)) == [nn.Linear, nn.MultiheadAttention, *4 * [nn.Linear]]
    assert outside(model, units(model)) == {model.scale}
