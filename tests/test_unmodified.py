"""Unmodified modules on a mesh: what users' models have besides layers in a row, held against plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridpar as hp
from tests.ranks import ranks

WIDTH, SAMPLES = 8, 4


class Doubled(torch.autograd.Function):
    """A custom function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Busy(nn.Module):
    """A frozen layer, an unused one, a tied one, a buffer that counts, a custom function, two heads, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU()) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))
        self.words = nn.Linear(WIDTH, 12, bias=False)
        self.words.weight = self.embed.weight
        self.size = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))

    def forward(self, ids: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        x = self.frozen(self.embed(ids)) * self.scale
        for block, down in zip(self.blocks, self.down):
            x = x + Doubled.apply(down(block(x)))
        return {"words": self.words(x), "size": self.size(x).squeeze(-1) + (0 if shift is None else shift)}


def both(output: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    words = F.cross_entropy(output["words"].flatten(0, 1), targets["words"].flatten())
    return words + 0.3 * F.mse_loss(output["size"], targets["size"])


def data() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 12, (SAMPLES, 5), generator=draw)
    real = torch.randn(2, SAMPLES, 5, generator=draw, dtype=torch.float64)
    return {"ids": ids, "shift": real[0]}, {"words": ids.flip(1), "size": real[1]}


@pytest.mark.parametrize("degrees", [{"pipeline": 2}, {"tensor": 2}, {"data": 2}], ids=str)
@ranks(2)
def test_a_module_with_all_the_rest_trains_as_in_one_process(degrees: dict[str, int]) -> None:
    torch.manual_seed(0)
    mesh, module = hp.init(**degrees), Busy().double()
    plain, (inputs, targets) = copy.deepcopy(module), data()
    model = hp.parallelize(module, mesh, loss=both, example=inputs)
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6), model, clip=1.0)
    alone = torch.optim.AdamW([p for p in plain.parameters()], lr=1e-2, eps=1e-6)
    share, index = SAMPLES // mesh.data.size, mesh.place.data
    mine = tuple({k: x[index * share : (index + 1) * share] for k, x in part.items()} for part in (inputs, targets))
    for _ in range(3):
        loss = model.train_step(mine, microbatches=2)
        optimizer.step()
        optimizer.zero_grad()
        expected = both(plain(**inputs), targets)
        expected.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        alone.step()
        alone.zero_grad()
        assert abs(loss - expected.item()) < 1e-10
    state = model.full_state_dict()
    assert set(state) == set(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-10, msg=name)


@ranks(2)
def test_the_report_names_what_each_stage_has() -> None:
    mesh = hp.init(pipeline=2)
    report = hp.parallelize(Busy().double(), mesh, loss=both, example=data()[0]).report
    assert "stage 0 on pipeline index 0: embed to " in report and " to words; " in report


@ranks(2)
def test_stages_are_cut_where_the_user_says_and_parts_are_named_where_that_cannot_be() -> None:
    mesh = hp.init(pipeline=2)
    model = hp.parallelize(Busy().double(), mesh, loss=both, example=data()[0], stages=[6, 2])
    assert "embed to blocks.2" in model.report
    with pytest.raises(ValueError, match=r"stages=\[1, 2\] must be 2 numbers .* the 8 parts .*: embed, blocks.0"):
        hp.parallelize(Busy().double(), mesh, loss=both, example=data()[0], stages=[1, 2])


@ranks(2)
def test_a_recurrence_is_cut_without_a_plan() -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    mesh, module = hp.init(tensor=2), Speech().double()
    plain, x = copy.deepcopy(module), torch.randn(4, 5, 3, dtype=torch.float64)
    model = hp.parallelize(module, mesh, loss=F.cross_entropy)
    assert model.specs()["rnn.weight_hh_l1"].dim == 0
    targets = torch.tensor([0, 1, 1, 0])
    assert abs(model.train_step((x, targets), microbatches=2) - F.cross_entropy(plain(x), targets).item()) < 1e-10
