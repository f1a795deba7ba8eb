"""`recompute=hp.Budget(...)`: which blocks it chooses, that training stays the same bits, and what is really held."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.budgeted import planned
from hybridpar.pipeline.budget import Block, Budget, Left, choose, peak
from hybridpar.pipeline.schedule import build, gpipe, one_f_one_b
from tests.models import gpt, mine, tokens
from tests.ranks import ranks
from tests.test_recompute_blocks import functional, regression, same

DEPTH, MICROBATCHES = 6, 4


# ---- the choice


def even(stage: int, count: int = 4, seconds: float = 1.0) -> Left:
    """A stage of equal blocks that leave 100 bytes, 20 of them inputs, and 7 bytes besides."""
    numbers = range(1000 * stage, 1000 * stage + count)
    return Left(tuple(Block(f"{n}", seconds, {n: 80, n + 500: 20}, {n + 500: 20}) for n in numbers), {-1: 7})


def test_no_more_blocks_are_recomputed_than_the_budget_asks_for() -> None:
    schedule, left = one_f_one_b(ranks=2, microbatches=6), [even(0), even(1)]
    for size in range(300, 900, 20):
        chosen = choose(schedule, left, Budget(size)).names
        for rank in (0, 1):
            mine = {rank: left[rank]}
            fitting = [
                several for count in range(5) for several in combinations([b.name for b in left[rank].blocks], count)
                if peak(schedule, rank, mine, several) <= size
            ]  # fmt: skip
            assert len([name for name in chosen if name in {b.name for b in left[rank].blocks}]) == len(fitting[0])


def test_the_cheapest_seconds_per_byte_come_first() -> None:
    slow, quick = Block("slow", 2.0, {1: 100}, {}), Block("quick", 0.1, {2: 100}, {})
    dear, large = Block("dear", 1.0, {3: 10}, {}), Block("large", 1.0, {4: 1000}, {})
    left = [Left((slow, quick, dear, large), {})]
    once = gpipe(ranks=1, microbatches=2)
    assert choose(once, left, Budget(2400)).names == ("quick",)
    assert choose(once, left, Budget(2000)).names == ("large",)  # without `quick`, which came first and is not needed
    assert choose(gpipe(1, 9), left, Budget(2100)).names == ("quick", "large")


def test_what_several_blocks_leave_is_there_once_and_a_recomputed_block_comes_back_for_a_moment() -> None:
    mask = {9: 50}
    left = Left((Block("a", 1.0, {1: 30, 2: 5} | mask, {2: 5} | mask), Block("b", 1.0, {3: 30} | mask, mask)), {2: 5})
    assert left.held(()) == 30 + 5 + 30 + 50
    assert left.held(("a", "b")) == 55 and left.moment(("a", "b")) == 30
    three = gpipe(ranks=1, microbatches=3)
    assert peak(three, 0, {0: left}, ("a", "b")) == 3 * 55 + 30
    assert choose(three, [left], Budget(1000)).names == ()


def test_a_budget_that_even_all_blocks_do_not_keep_is_refused_with_the_numbers() -> None:
    told = r"pipeline index 0 holds 814 B of activations .* 254 B \(254 bytes\) with 4 blocks recomputed, all"
    with pytest.raises(ValueError, match=told):
        choose(one_f_one_b(ranks=2, microbatches=6), [even(0), even(1)], Budget(250))
    choice = choose(one_f_one_b(ranks=2, microbatches=6), [even(0), even(1)], Budget(254))
    assert choice.names[:4] == ("0", "1", "2", "3") and choice.before == (814, 407) and choice.after[0] == 254


def test_a_budget_is_read_as_it_is_written() -> None:
    assert [Budget(one).bytes for one in ("2 GB", "2gb", "1.5 KiB", 17)] == [2 * 10**9, 2 * 10**9, 1536, 17]
    for wrong in ("2", "GB", "2 XB", "-1 GB", 0):
        with pytest.raises(ValueError, match="Budget"):
            Budget(wrong)


def test_schedules_that_hold_all_microbatches_must_be_told_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"gpipe holds more the more .*: say how many, as in Budget\('1 GB', micro"):
        planned(Budget("1 GB"), "gpipe", 2, 1)
    assert planned(Budget("1 GB", 8), "gpipe", 2, 1) == build("gpipe", 2, 8)


# ---- that it is true


class Alive:
    """Bytes that forwards have left for backwards and that are still there; `most` is the most there ever were."""

    def __init__(self, model: Any) -> None:
        held = [x for stage in model._stages.values() for x in (*stage.parameters(), *stage.buffers())]
        self._known = {x.untyped_storage().data_ptr() for x in held}
        self._counts: dict[int, int] = {}
        self.now = self.most = 0

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda x: _Saved(x, self), lambda saved: saved.x)

    def count(self, x: Tensor, step: int) -> None:
        place = x.untyped_storage().data_ptr()
        if place in self._known:
            return
        before, after = self._counts.get(place, 0), self._counts.get(place, 0) + step
        self._counts[place] = after
        if not before or not after:
            self.now += step * x.untyped_storage().nbytes()
            self.most = max(self.most, self.now)


class _Saved:
    def __init__(self, x: Tensor, alive: Alive) -> None:
        self.x, self._alive = x, alive
        alive.count(x, 1)

    def __del__(self) -> None:
        self._alive.count(self.x, -1)


def trained(mesh: Any, recompute: Any, **how: Any) -> tuple[list[float], dict[str, Tensor], int, str]:
    """Losses, weights, the most bytes that were held on this rank, and the report."""
    how = {"example": tokens(0)[0][:5], "costs": [1.0] * (DEPTH + 2), **how}  # costs: one cut for all, not by the clock
    dtype = torch.float32 if "precision" in how else torch.float64
    model = hp.parallelize(
        gpt(DEPTH, kv_heads=4, dropout=0.1, dtype=dtype), mesh, hp.CrossEntropy(), recompute=recompute, **how
    )
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model)
    losses, alive = [], Alive(model)
    for step in range(2):
        with alive.hooks():
            losses.append(model.train_step(tuple(mine(x, mesh.data) for x in tokens(step)), MICROBATCHES))
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.full_state_dict(), alive.most, model.report


def held(mesh: Any, share: float, **how: Any) -> None:
    """Train with a budget of `share` of what the fullest rank holds without, and with nothing recomputed."""
    losses, weights, most, _ = trained(mesh, None, **how)
    size = int(share * max(mesh.everyone.objects(most)))
    again, found, kept, report = trained(mesh, hp.Budget(size, MICROBATCHES), **how)
    assert again == losses and all(torch.equal(x, found[name]) for name, x in weights.items())
    assert kept <= size, report
    told = re.search(rf"index {mesh.pipeline.index}: (\S+ \w+) with nothing", report)
    predicted = Budget(told[1]).bytes  # rounded, and of 5 samples, where some microbatches have 4
    assert 0.99 * most < predicted < 1.15 * most, (report, most)
    line = next(line for line in report.splitlines() if "recomputed for" in line)
    assert 0 < line.count("blocks.") < DEPTH, report
    assert set(mesh.everyone.objects(line)) == {line}


@ranks(2)
@pytest.mark.parametrize("degrees", [{"pipeline": 2}, {"tensor": 2}, {"data": 2}], ids=str)
def test_a_budget_is_kept_and_changes_no_bit_on_2_ranks(degrees: dict[str, int]) -> None:
    mesh = hp.init(seed=3, **degrees)
    held(mesh, 0.8, sequence="tensor" in degrees, example=tokens(0)[0][: 3 if "data" in degrees else 5])
    if "pipeline" in degrees:
        held(mesh, 0.8, schedule="gpipe", precision="bf16")
        how = {"example": regression(0)[0][:4], "stages": [1, 3]}  # a module that names no chain, and draws numbers
        same(mesh, functional, regression, nn.functional.mse_loss, hp.Budget("7 KB"), **how)
        held(mesh, 0.8, schedule="interleaved", chunks=2)
    mesh.close()


@ranks(1)
def test_what_a_budget_cannot_do_is_refused() -> None:
    mesh = hp.init(seed=3)
    with pytest.raises(ValueError, match="by watching one microbatch: give its inputs as parallelize"):
        hp.parallelize(gpt(), mesh, recompute=hp.Budget("1 GB"))
    with pytest.raises(ValueError, match="holds .* with nothing recomputed and .* with 2 blocks recomputed"):
        hp.parallelize(gpt(), mesh, recompute=hp.Budget("1 KB"), example=tokens(0)[0])
    with pytest.raises(ValueError, match="with 0 blocks recomputed"):
        hp.parallelize(nn.Linear(2, 2), mesh, recompute=hp.Budget(1), example=torch.ones(3, 2))
    model = hp.parallelize(gpt(), mesh, recompute=hp.Budget("1 GB"), example=tokens(0)[0])
    assert "recomputed for 1 GB of activations: nothing" in model.report
    mesh.close()
