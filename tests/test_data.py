"""Batches: the arithmetic without processes, then the loader, then replicas."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from hybridpar.batches import Batches, shuffled
from hybridpar.data import DataLoader
from tests.ranks import ranks


def world(data: int = 1, index: int = 0, seed: int = 0) -> Any:
    """As much of a world as a loader looks at."""
    return SimpleNamespace(seed=seed, data=SimpleNamespace(size=data, index=index))


class Numbers(Dataset[int]):
    """Sample i is the number i."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> int:
        return i


def drawn(loader: DataLoader) -> list[list[int]]:
    """The samples of the batches from here to the end of the epoch."""
    return [batch.tolist() for batch in loader]


# ---- arithmetic


@given(st.integers(1, 400), st.integers(0, 2**64), st.integers(0, 10**6))
def test_an_order_holds_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    assert sorted(map(shuffled(samples, seed, epoch), range(samples))) == list(range(samples))


def test_orders_differ_between_epochs_and_seeds_and_every_order_of_few_samples_occurs() -> None:
    def order(samples: int, seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(map(shuffled(samples, seed, epoch), range(samples)))

    assert len({order(50, seed, epoch) for seed in range(10) for epoch in range(10)}) == 100
    times = Counter(order(4, 7, epoch) for epoch in range(2400))
    assert len(times) == 24 and min(times.values()) > 50  # 100 each is expected


def test_an_order_never_changes_from_one_release_to_the_next() -> None:
    assert [*map(shuffled(12, seed=3, epoch=1), range(12))] == [11, 9, 4, 0, 1, 6, 5, 3, 10, 7, 8, 2]


def test_an_order_of_a_thousand_million_samples_needs_no_list() -> None:
    permutation = shuffled(10**9, seed=1, epoch=2)
    places = [permutation(place) for place in range(0, 10**9, 10**7)]
    assert len(set(places)) == 100 and all(0 <= place < 10**9 for place in places)


@given(
    st.integers(1, 200), st.integers(1, 40), st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 3)
)
def test_the_replicas_parts_of_a_batch_are_the_batch_of_one_process_in_order(
    samples: int, size: int, replicas: int, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    batches = Batches(samples, size, shuffle, seed=5, drop_last=drop_last)
    try:
        batches.check(replicas)
    except ValueError:
        return
    epoch_samples = []
    for batch in range(batches.count):
        parts = [batches.of(epoch, batch, replica, replicas) for replica in range(replicas)]
        assert min(map(len, parts)) >= 1 and max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sum(parts, []) == batches.of(epoch, batch)
        epoch_samples += sum(parts, [])
    assert len(set(epoch_samples)) == len(epoch_samples) == (samples // size * size if drop_last else samples)
    if not shuffle:
        assert epoch_samples == list(range(len(epoch_samples)))


@pytest.mark.parametrize(
    ("batches", "replicas", "sentence"),
    [
        (Batches(10, 3), 4, "batch_size=3 is shared by 4 replicas.*at least 4"),
        (Batches(9, 4), 2, r"last batch of an epoch has 1 of 4 samples \(9 in all\) for 2 replicas.*drop_last=True"),
        (Batches(3, 4, drop_last=True), 2, "3 samples hold no whole batch of 4.*drop_last"),
        (Batches(0, 4), 1, "a data set of 0 samples in batches of 4"),
        (Batches(4, 0), 1, "a data set of 4 samples in batches of 0"),
    ],
)
def test_batches_in_which_a_replica_would_get_nothing_are_refused(
    batches: Batches, replicas: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        batches.check(replicas)


# ---- the loader


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_loaders_of_all_replicas_give_the_batches_of_one_process(degree: int) -> None:
    whole = DataLoader(Numbers(23), world(), batch_size=6)
    parts = [DataLoader(Numbers(23), world(degree, i), batch_size=6) for i in range(degree)]
    assert len(whole) == len(parts[0]) == 4
    for _ in range(3):
        together = [sum(batches, []) for batches in zip(*map(drawn, parts))]
        assert together == drawn(whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_saved_position_continues_exactly_in_any_data_degree(data: st.DataObject) -> None:
    samples, size = data.draw(st.integers(8, 40)), data.draw(st.integers(4, 12))
    if 0 < samples % size < 4:
        samples -= samples % size
    size = min(size, samples)
    before, after = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    handed_out = data.draw(st.integers(0, 3 * -(-samples // size)))
    unbroken = DataLoader(Numbers(samples), world(seed=4), batch_size=size)
    want = [batch for _ in range(5) for batch in drawn(unbroken)]

    first = [DataLoader(Numbers(samples), world(before, i, seed=4), batch_size=size) for i in range(before)]
    states = [_after(loader, handed_out) for loader in first]
    assert all(state == states[0] for state in states)
    second = [DataLoader(Numbers(samples), world(after, i), batch_size=size) for i in range(after)]
    for loader in second:
        loader.load_state_dict(states[0])
    got = [sum(batches, []) for _ in range(4) for batches in zip(*map(drawn, second))]
    assert want[handed_out:][: len(got)] == got[: len(want) - handed_out]


def _after(loader: DataLoader, handed_out: int) -> dict[str, Any]:
    """The position after so many batches, saved inside the loop as a training script does."""
    while handed_out:
        for _ in loader:
            handed_out -= 1
            if not handed_out:
                return loader.state_dict()
    return loader.state_dict()


def test_the_position_counts_batches_handed_out_and_not_those_that_workers_prefetched() -> None:
    loader = DataLoader(Numbers(24), world(), batch_size=4, num_workers=1, prefetch_factor=4)
    batches = iter(loader)
    got = [next(batches).tolist() for _ in range(2)]
    assert (loader.epoch, loader.batch) == (0, 2)
    assert got == drawn(DataLoader(Numbers(24), world(), batch_size=4))[:2]
    again = DataLoader(Numbers(24), world(), batch_size=4)
    again.load_state_dict(loader.state_dict())
    assert drawn(again) == [batch.tolist() for batch in batches]
    assert (loader.epoch, loader.batch) == (1, 0)


def test_a_loop_left_early_is_taken_up_where_it_was_left() -> None:
    loader, unbroken = (DataLoader(Numbers(20), world(), batch_size=5) for _ in range(2))
    first = []
    for batch in loader:
        first.append(batch.tolist())
        if len(first) == 3:
            break
    assert first + drawn(loader) + drawn(loader) == drawn(unbroken) + drawn(unbroken)


def test_loading_leaves_torchs_own_random_numbers_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    drawn(DataLoader(Numbers(20), world(), batch_size=5))
    assert torch.equal(torch.rand(3), want)


def test_options_go_to_torch_and_its_collation_is_the_default() -> None:
    x, y = torch.arange(6.0), torch.arange(6)
    loader = DataLoader(TensorDataset(x, y), world(), batch_size=3, shuffle=False)
    assert [(a.tolist(), b.tolist()) for a, b in loader] == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5])]
    loader = DataLoader(Numbers(6), world(2, 1), batch_size=3, shuffle=False, collate_fn=sum)
    assert list(loader) == [2, 5]


def test_what_a_loader_cannot_do_is_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="range_iterator has no samples by number.*__len__ and __getitem__"):
        DataLoader(iter(range(3)), world(), batch_size=1)
    with pytest.raises(ValueError, match="generator: hp.DataLoader chooses random numbers"):
        DataLoader(Numbers(4), world(), batch_size=2, generator=torch.Generator())
    with pytest.raises(ValueError, match="in_order=False: batches that overtake"):
        DataLoader(Numbers(4), world(), batch_size=2, num_workers=2, in_order=False)
    with pytest.raises(ValueError, match="last batch of an epoch has 1 of 4 samples"):
        DataLoader(Numbers(9), world(2, 0), batch_size=4)
    loader = DataLoader(Numbers(9), world(), batch_size=4)
    for samples, size in ((10, 4), (9, 3)):
        other = DataLoader(Numbers(samples), world(), batch_size=size)
        with pytest.raises(ValueError, match="position is one in 9 samples in batches of 4.*must be the same"):
            other.load_state_dict(loader.state_dict())


# ---- replicas


@ranks(4)
@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"pipeline": 2}, {"data": 4}])
def test_peers_of_a_replica_get_the_same_samples_and_replicas_share_the_batch(degrees: dict[str, int]) -> None:
    import hybridpar as hp

    mesh = hp.init(**degrees, seed=11)
    got = drawn(hp.DataLoader(Numbers(30), mesh, batch_size=8))
    everyone = mesh.everyone.objects((mesh.place.data, got))
    mesh.close()
    by_replica = {replica: batches for replica, batches in everyone}
    assert all(by_replica[replica] == batches for replica, batches in everyone)
    together = [sum(parts, []) for parts in zip(*(by_replica[r] for r in sorted(by_replica)))]
    assert together == drawn(DataLoader(Numbers(30), world(seed=11), batch_size=8))
