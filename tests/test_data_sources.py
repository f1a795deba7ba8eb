"""Samplers, streams and batches handed on: without processes, then replicas."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hybridpar.chance import Chance
from hybridpar.data import DataLoader
from hybridpar.wires.axis import Alone
from tests.ranks import ranks


def world(data: int = 1, index: int = 0, seed: int = 0) -> Any:
    """As much of a world as a loader looks at."""
    alone = Alone("everyone")
    return SimpleNamespace(
        seed=seed, data=SimpleNamespace(size=data, index=index), everyone=alone, replica=alone, peers=alone
    )


class Numbers(Dataset[int]):
    """Sample i is the number i."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> int:
        return i


class Counting(IterableDataset[int]):
    """0, 1, 2, ... or, shuffled, the same with a random number under 1000 added to each thousandfold."""

    def __init__(self, length: int, first: int = 0, random: bool = False) -> None:
        self._length, self._first, self._random = length, first, random

    def __iter__(self) -> Iterator[int]:
        for i in range(self._first, self._first + self._length):
            yield i * 1000 + int(torch.randint(1000, ())) if self._random else i


def drawn(loader: DataLoader) -> list[list[int]]:
    """The samples of the batches from here to the end of the epoch."""
    return [batch.tolist() for batch in loader]


def test_random_numbers_of_ones_own_neither_disturb_nor_are_disturbed() -> None:
    def three() -> tuple[float, float, float]:
        import numpy as np

        return torch.rand(()).item(), random.random(), float(np.random.rand())

    torch.manual_seed(1)
    random.seed(1)
    chance, again = Chance(5), Chance(5)
    with chance:
        first = three()
    outside = three()
    with chance:
        second = three()
    torch.manual_seed(1)
    random.seed(1)
    assert outside[:2] == (torch.rand(()).item(), random.random()) and first != second
    with again:
        assert (three(), three()) == (first, second)


# ---- samplers


def samplers(length: int) -> dict[str, dict[str, Any]]:
    numbers = Numbers(length)
    weights = [1.0 + i % 3 for i in range(length)]
    return {
        "list": {"sampler": list(range(length))[::-1], "batch_size": 4},
        "random": {"sampler": RandomSampler(numbers), "batch_size": 4},
        "weighted": {"sampler": WeightedRandomSampler(weights, length), "batch_size": 4, "drop_last": True},
        "subset": {
            "sampler": SubsetRandomSampler(range(3, length), generator=torch.Generator().manual_seed(3)),
            "batch_size": 5,
        },
        "batches": {"batch_sampler": BatchSampler(RandomSampler(numbers), 4, drop_last=True)},
        "unequal": {"batch_sampler": [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9]]},
    }


@pytest.mark.parametrize("kind", samplers(4))
def test_a_users_sampler_gives_every_layout_the_batches_of_one_process(kind: str) -> None:
    whole = DataLoader(Numbers(22), world(), **samplers(22)[kind])
    parts = [DataLoader(Numbers(22), world(2, i), **samplers(22)[kind]) for i in range(2)]
    for epoch in range(2):
        torch.manual_seed(epoch)  # what else is drawn has no influence
        together = [sum(batches, []) for batches in zip(*map(drawn, parts))]
        assert together == drawn(whole) and len(together) == len(whole)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(samplers(4))), st.integers(0, 9), st.integers(1, 2), st.integers(1, 2))
def test_a_position_in_a_samplers_order_continues_exactly_in_any_data_degree(
    kind: str, handed_out: int, before: int, after: int
) -> None:
    unbroken = DataLoader(Numbers(22), world(seed=4), **samplers(22)[kind])
    want = [batch for _ in range(6) for batch in drawn(unbroken)]
    first = DataLoader(Numbers(22), world(before, 0, seed=4), **samplers(22)[kind])
    state = first.state_dict()
    while handed_out:
        for _ in first:
            handed_out -= 1
            state = first.state_dict()
            if not handed_out:
                break
    place = state["epoch"] * len(first) + state["batch"]
    second = [DataLoader(Numbers(22), world(after, i), **samplers(22)[kind]) for i in range(after)]
    for loader in second:
        loader.load_state_dict(state)
    got = [sum(batches, []) for _ in range(2) for batches in zip(*map(drawn, second))]
    assert got == want[place : place + len(got)]


class Moody:
    """Another order each time, whatever the seed."""

    def __init__(self) -> None:
        self._turn = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        self._turn += 1
        return iter([(i + self._turn) % 8 for i in range(8)])


def test_what_a_sampler_cannot_do_is_refused_with_a_sentence() -> None:
    numbers = Numbers(8)
    with pytest.raises(ValueError, match="DistributedSampler gives each replica its own part"):
        DataLoader(numbers, world(2), 4, sampler=DistributedSampler(numbers, 2, 0))
    with pytest.raises(ValueError, match="choose one of them"):
        DataLoader(numbers, world(), 4, sampler=[1], batch_sampler=[[1]])
    with pytest.raises(ValueError, match="shuffle=True: the order is that of the stream or of the sampler"):
        DataLoader(numbers, world(), 4, True, sampler=[1])
    with pytest.raises(ValueError, match="leave out batch_size and drop_last"):
        DataLoader(numbers, world(), 4, batch_sampler=[[1]])
    with pytest.raises(ValueError, match="batch_size is missing"):
        DataLoader(numbers, world())
    with pytest.raises(ValueError, match="batch 1 of epoch 0 has 1 samples for 2 replicas.*drop_last=True"):
        drawn(DataLoader(numbers, world(2), 2, sampler=[4, 2, 0]))
    moody = DataLoader(numbers, world(), 2, sampler=Moody())
    next(iter(moody))
    position = moody.state_dict()
    with pytest.raises(ValueError, match="Moody now gives another order in epoch 0 than when the position was saved"):
        moody.load_state_dict(position)  # draws anew, as another process would
    with pytest.raises(ValueError, match="sampler=Moody.*sampler must be the same"):
        DataLoader(numbers, world(), 2, sampler=SequentialSampler(numbers)).load_state_dict(position)


# ---- streams


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("random", [False, True])
def test_replicas_share_each_batch_of_a_stream_and_end_together(workers: int, random: bool) -> None:
    def loader(replicas: int, index: int, **more: Any) -> DataLoader:
        one = DataLoader(Counting(21, random=random), world(replicas, index), 5, num_workers=workers, **more)
        one._agreed = True  # these replicas cannot talk to each other
        return one

    whole = loader(1, 0)
    want = [drawn(whole) for _ in range(2)]
    assert [len(batch) for batch in want[0]] == [5, 5, 5, 5, 1] and (want[0] != want[1]) is random
    parts = [loader(2, index) for index in range(2)]
    for epoch in range(2):
        got = [sum(batches, []) for batches in zip(*map(drawn, parts), strict=True)]
        assert got == want[epoch][:4], "one sample is not enough for two replicas"
    assert drawn(loader(2, 1, drop_last=True)) == [batch[3:] for batch in want[0][:4]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 3))
def test_a_position_in_a_stream_continues_exactly_in_any_data_degree(handed_out: int, before: int, after: int) -> None:
    def loader(replicas: int, index: int) -> DataLoader:
        one = DataLoader(Counting(18, random=True), world(replicas, index), 4, drop_last=True)
        one._agreed = True
        return one

    unbroken = loader(1, 0)
    want = [batch for _ in range(6) for batch in drawn(unbroken)]
    first, left = loader(before, 0), handed_out
    while left:
        for _ in first:
            left -= 1
            if not left:
                break
    second = [loader(after, index) for index in range(after)]
    for one in second:
        one.load_state_dict(first.state_dict())
    got = [sum(batches, []) for _ in range(2) for batches in zip(*map(drawn, second))]
    assert got[: len(want) - handed_out] == want[handed_out:][: len(got)]


def test_what_a_stream_cannot_do_is_refused_with_a_sentence() -> None:
    class Once(Counting):
        def __iter__(self) -> Iterator[int]:
            self._gone = getattr(self, "_gone", iter(range(3)))
            return self._gone

    with pytest.raises(ValueError, match="Once can be read once only.*begin anew each time"):
        DataLoader(Once(3), world(), 1)
    with pytest.raises(ValueError, match="num_workers=2: Counting is a stream.*use 0 or 1"):
        DataLoader(Counting(3), world(), 1, num_workers=2)
    with pytest.raises(ValueError, match="persistent_workers would go on"):
        DataLoader(Counting(3), world(), 1, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="batch_size=1 is shared by 2 replicas"):
        DataLoader(Counting(3), world(2), 1)
    with pytest.raises(ValueError, match="own_stream is for iterable data sets"):
        DataLoader(Numbers(3), world(), 1, own_stream=True)
    loader = DataLoader(Counting(9), world(), 4)
    with pytest.raises(TypeError, match="Counting is a stream"):
        len(loader)
    with pytest.raises(ValueError, match="have no numbers"):
        next(loader.indices())
    own = DataLoader(Counting(9), world(2, 0), 4, own_stream=True)
    with pytest.raises(ValueError, match="own_streams must be the same"):
        DataLoader(Counting(9), world(3, 0), 4, own_stream=True).load_state_dict(own.state_dict())


# ---- ranks


@ranks(4)
def test_unequal_replicas_end_together_and_a_stream_that_is_cut_twice_is_told() -> None:
    import hybridpar as hp

    mesh = hp.init(tensor=2)
    mine = Counting(7 + 4 * mesh.place.data, first=100 * mesh.place.data)
    loader = hp.DataLoader(mine, mesh, 6, own_stream=True)
    for _ in range(2):
        got = drawn(loader)
        first = 100 * mesh.place.data
        wanted = [list(range(first, first + 3)), list(range(first + 3, first + 6))]
        last = [first + 6] if mesh.place.data == 0 else [first + 6, first + 7, first + 8]
        assert got == [*wanted, last]
    assert (loader.epoch, loader.batch) == (2, 0)
    with pytest.raises(ValueError, match="not begin with the same sample on all 4 ranks.*own_stream=True"):
        drawn(hp.DataLoader(mine, mesh, 6))
    shared = hp.DataLoader(Counting(12), mesh, 6)
    here = drawn(shared)
    assert here == [[6 * k + 3 * mesh.place.data + i for i in range(3)] for k in range(2)]
    mesh.close()


class OnFirstOnly(Dataset[Any]):
    """Samples that only the first rank of a replica may fetch."""

    def __init__(self, first: bool) -> None:
        self._first = first

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        assert self._first
        return {"x": torch.full((2, 3), float(i))}, (i, torch.zeros(0), f"sample {i}")


@ranks(4)
@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"pipeline": 4}])
def test_shared_batches_are_loaded_by_one_rank_of_each_replica_and_the_same_on_all(degrees: dict[str, int]) -> None:
    import hybridpar as hp

    mesh = hp.init(**degrees, seed=3)
    loader = hp.DataLoader(OnFirstOnly(mesh.replica.index == 0), mesh, 4, drop_last=True, shared=True)
    alone = hp.DataLoader(OnFirstOnly(True), mesh, 4, drop_last=True)
    for _ in range(2):
        got, want = list(loader), list(alone)
        assert len(got) == len(want) == 2 and loader.state_dict() == alone.state_dict()
        for (x, (i, nothing, words)), (x0, (i0, nothing0, words0)) in zip(got, want):
            assert torch.equal(x["x"], x0["x"]) and torch.equal(i, i0) and words == words0
            assert nothing.shape == nothing0.shape
    left = iter(loader)
    next(left)
    assert loader.batch == 1
    mesh.close()


@ranks(2)
def test_orders_that_differ_between_ranks_are_refused() -> None:
    import hybridpar as hp

    mesh = hp.init()
    order = [0, 1, 2, 3] if mesh.rank == 0 else [3, 2, 1, 0]
    with pytest.raises(ValueError, match="list gives the 2 ranks different orders in epoch 0"):
        drawn(hp.DataLoader(Numbers(4), mesh, 2, sampler=order))
    mesh.close()


class Told(Dataset[Any]):
    """Samples of a text, and who has fetched any."""

    fetched = 0

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> Any:
        self.fetched += 1
        text = torch.randint(37, (11,), generator=torch.Generator().manual_seed(i))
        return text[:-1], text[1:]


@ranks(4)
def test_ranks_between_the_first_stage_and_the_last_load_nothing_and_train_alike() -> None:
    import hybridpar as hp
    from tests.models import gpt

    torch.set_num_threads(1)
    mesh = hp.init(pipeline=4, seed=3)
    found = []
    for needed in (False, True):
        model = hp.parallelize(gpt(depth=6, dropout=0.1), mesh, hp.CrossEntropy(), schedule="interleaved")
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        samples = Told()
        loader = hp.DataLoader(samples, mesh, 4, model=model if needed else None)
        losses = []
        for batch in [*loader, *loader]:  # the last one of an epoch is shorter than the microbatches
            losses.append(model.train_step(batch, 4))
            optimizer.step()
            optimizer.zero_grad()
        inputs, targets = batch
        losses += [model.eval_step((inputs, targets) if model.reads_batches else batch, 2)]
        found.append((losses, model.predict(inputs, 2), loader.state_dict()))
        assert (samples.fetched > 0) == (not needed or mesh.rank in (0, 3))
    mesh.close()
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]


def test_a_model_that_does_not_look_at_batches_goes_with_samples_by_number_only() -> None:
    with pytest.raises(ValueError, match="model= is for map-style data sets"):
        DataLoader(Counting(9), world(), 4, model=object())
