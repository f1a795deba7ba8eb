"""`recompute=`: modules computed again in the backward pass train as those whose activations are kept, in less memory.

Recomputing repeats the same operations on the same numbers: in fp64, and for those who draw from torch's generator, the
weights after some steps must be the same bits as without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from hybridpar.models.gpt import GPT
from hybridpar.models.resnet import ResNet
from hybridpar.tensor.recompute import blocks, chosen
from tests.against_one import opened_alone
from tests.models import gpt, mine, numbers, tokens
from tests.ranks import ranks

WISHES = ("full", "blocks.*.mlp", ["blocks.0", "blocks.1.attention", "head"])


def trained(mesh: Any, build: Callable[[], nn.Module], batches: Callable[[int], Any], loss: Any, **how: Any) -> Any:
    """Losses, whole weights and buffers after three steps."""
    torch.manual_seed(4)
    model = hp.parallelize(build(), mesh, loss, **how)
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model)
    losses = []
    for step in range(3):
        losses.append(model.train_step(tuple(mine(x, mesh.data) for x in batches(step)), microbatches=3))
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.full_state_dict()


def same(mesh: Any, build: Callable[[], nn.Module], batches: Any, loss: Any, wish: Any, **how: Any) -> None:
    losses, kept = trained(mesh, build, batches, loss, **how)
    again, found = trained(mesh, build, batches, loss, recompute=wish, **how)
    assert again == losses
    for name, x in kept.items():
        assert torch.equal(x, found[name]), f"{mesh.mesh}, recompute={wish}, {how}: {name}"


def gpts(mesh: Any, wish: Any, **how: Any) -> None:
    same(mesh, lambda: gpt(depth=4, kv_heads=4, dropout=0.1), tokens, hp.CrossEntropy(), wish, **how)


class Functional(nn.Module):
    """Blocks that drop by calls of functions, and one that draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.blocks = nn.ModuleList([layer, Noisy(), Normed()])
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [b, 8] -> [b, 3]
        x = x.unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return self.out(x.squeeze(1))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x).tanh(), 0.3, self.training) + torch.rand_like(x) * x.sin()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.squeeze(1)).relu()).unsqueeze(1)


def functional() -> nn.Module:
    torch.manual_seed(1)
    return Functional().double()


def regression(step: int) -> tuple[Tensor, Tensor]:
    return numbers(12, 8, seed=step), numbers(12, 3, seed=100 + step)


@ranks(1)
def test_what_draws_from_torchs_generator_and_what_keeps_statistics_are_repeated_exactly() -> None:
    mesh = hp.init(seed=3)
    for wish in ("full", ["blocks.0", "blocks.1"], "blocks.2"):
        same(mesh, functional, regression, F.mse_loss, wish)
    gpts(mesh, "full")
    mesh.close()


@ranks(2)
@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"pipeline": 2}, {"data": 2}], ids=str)
def test_recomputed_blocks_train_to_the_same_bits_on_2_ranks(degrees: dict[str, int]) -> None:
    mesh = hp.init(seed=3, **degrees)
    for wish in WISHES:
        gpts(mesh, wish, sequence="tensor" in degrees)
    if "pipeline" in degrees:
        gpts(mesh, "full", schedule="gpipe")
        gpts(mesh, "full", schedule="interleaved", chunks=2)
        same(mesh, functional, regression, F.mse_loss, "full", example=regression(0)[0])
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("degrees", [{"tensor": 2, "pipeline": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_recomputed_blocks_train_to_the_same_bits_on_4_ranks(degrees: dict[str, int]) -> None:
    mesh = hp.init(seed=3, **degrees)
    gpts(mesh, "full", sequence=True)
    gpts(mesh, "blocks.*.attention")
    mesh.close()


def images(step: int) -> tuple[Tensor, Tensor]:
    return numbers(9, 3, 8, 8, seed=step), torch.arange(9) % 4


@ranks(2)
@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"data": 2}], ids=str)
def test_synchronised_norms_and_cut_convolutions_are_repeated(degrees: dict[str, int]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(2)
        net = ResNet(3, 4, widths=(4, 6), depth=1).double()
        return nn.SyncBatchNorm.convert_sync_batchnorm(net) if "data" in degrees else net

    mesh = hp.init(seed=3, **degrees)
    same(mesh, build, images, nn.CrossEntropyLoss(), "full", plan={} if "data" in degrees else None)
    mesh.close()


def kept_bytes(wish: Any) -> int:
    """Bytes that one forward leaves for its backward, without the weights."""
    mesh = opened_alone(seed=3)
    model = hp.parallelize(GPT(11, 32, 4, 4, 64), mesh, hp.CrossEntropy(), recompute=wish)
    (stage,), weights = model._stages.values(), {p.data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.data_ptr()] = 0 if x.data_ptr() in weights else x.untyped_storage().nbytes()
        return x

    model._draw.samples = torch.arange(8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output, _ = stage(torch.zeros(8, 64, dtype=torch.long), {}, None)
    mesh.close()
    return sum(found.values()) - output.nbytes


@ranks(1)
def test_a_recomputed_forward_keeps_less() -> None:
    kept, mlps, full = kept_bytes(None), kept_bytes("blocks.*.mlp"), kept_bytes("full")
    assert full < mlps < kept and full < kept / 5, (kept, mlps, full)


def test_blocks_are_the_parts_of_lists_that_have_parts() -> None:
    assert blocks(gpt(depth=2)) == ("blocks.0", "blocks.1")
    assert blocks(functional()) == ("blocks.0", "blocks.1", "blocks.2")
    assert chosen(gpt(depth=2), ["blocks.1.*"])[:2] == ("blocks.1.attention_norm", "blocks.1.attention")


@ranks(1)
def test_what_cannot_be_recomputed_is_refused() -> None:
    mesh = hp.init(seed=3)

    def refused(wish: Any, message: str, module: nn.Module | None = None, **how: Any) -> None:
        with pytest.raises(ValueError, match=message):
            hp.parallelize(module or gpt(), mesh, recompute=wish, **how)

    refused("block.*", 'recompute: "block.*" matches no module; the nearest are ')
    refused(["blocks.*", "blocks.1.mlp"], "blocks.1.mlp is inside blocks.1, which is recomputed as a whole")
    refused("full", 'recompute="full" finds no blocks in Linear', nn.Linear(2, 2))
    refused(2.5, "give .full., a pattern such as")
    skip = hp.Skip("a")
    refused("0", "0.1 is an end of a skip connection", nn.Sequential(nn.Sequential(nn.Tanh(), skip.stash), skip.pop))
    compiled = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    compiled[0].compile(backend="eager")
    refused("0", "0 is compiled; leave it uncompiled", compiled)
    mesh.close()
