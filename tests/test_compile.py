"""torch.compile: compiled blocks train as they do uncompiled, on any axis; a compiled whole has no stages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.models.gpt import GPT
from tests.against_one import CLOSE
from tests.ranks import ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler loads what torch deprecates,
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # and looks at what torch warns of
]
BACKEND = "aot_eager"  # all of the compiler but its code generator, which takes half a minute for each block


class Loop(nn.Module):
    """Blocks in a loop, of which nothing says how to cut them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4))
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def gpt() -> GPT:
    return GPT(vocabulary=20, width=8, depth=4, heads=2, context=8, dropout=0.1)


def losses(build: Callable[[], nn.Module], mesh: object, compiled: bool) -> list[float]:
    torch.manual_seed(4)
    module = build().double()
    for block in module.blocks if compiled else ():
        block.compile(backend=BACKEND)
    ids = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(0))
    model = hp.parallelize(module, mesh, loss=hp.CrossEntropy(), example=ids[:2, :-1])
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    found = []
    for _ in range(3):
        found.append(model.train_step((ids[:, :-1], ids[:, 1:]), microbatches=2))
        optimizer.step()
        optimizer.zero_grad()
    return found


@ranks(2, timeout=240)
@pytest.mark.parametrize("build", [gpt, Loop])
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_compiled_blocks_train_the_same(rank_count: int, build: Callable[[], nn.Module], axis: str) -> None:
    torch.set_num_threads(1)
    mesh = hp.init(**{axis: rank_count})
    torch._dynamo.reset()
    plain, compiled = (torch.tensor(losses(build, mesh, how)) for how in (False, True))
    assert build is Loop or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, plain, **CLOSE)
    mesh.close()


@ranks(2)
def test_a_compiled_whole_is_not_cut_into_stages() -> None:
    mesh = hp.init(pipeline=2)
    whole = gpt()
    whole.compile(backend=BACKEND)
    with pytest.raises(ValueError, match=r"compiled as a whole, and 2 stages .*: compile its parts"):
        hp.parallelize(whole, mesh, loss=hp.CrossEntropy())
    with pytest.raises(ValueError, match=r"torch.compile\(model\) returns hides the model"):
        hp.parallelize(torch.compile(gpt()), mesh, loss=hp.CrossEntropy())
    mesh.close()
