"""Horovod as a carrier: every operation and dtype, names, and living beside mpi4py without a deadlock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import ranks

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
MOVED = (*FLOATS, *WHOLE, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn)
ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two roundings


@pytest.fixture
def axis() -> Iterator[Any]:
    import hybridpar as hp

    world = hp.init()
    yield world.data
    world.close()


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (drawn.abs() * 5).to(dtype)


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(-1).view(torch.uint8).tolist()


@ranks(4)
def test_allreduce_of_every_dtype_op_and_shape_is_the_one_of_the_stack(axis: Any) -> None:
    combine = {"sum": torch.sum, "average": torch.mean, "max": torch.amax, "min": torch.amin}
    for dtype in (*FLOATS, *WHOLE):
        for op in combine if dtype.is_floating_point else ("sum", "max", "min"):
            for shape in ((), (2, 3), (0,)):
                all_ = [numbers(i, shape, dtype) for i in range(axis.size)]
                x = all_[axis.index].clone()
                assert axis.start_allreduce(x, op, "same").wait() is x
                want = combine[op](torch.stack(all_).double(), dim=0)
                torch.testing.assert_close(x.double(), want, rtol=ERROR.get(dtype, 1e-6), atol=1e-3 * (dtype in ERROR))


@ranks(4)
def test_pieces_of_every_dtype_move_whole(axis: Any) -> None:
    n, here = axis.size, axis.index
    for dtype in MOVED:
        for dim, shapes in ((0, [(i, 4) for i in range(n)]), (-1, [(4, 1 + i) for i in range(n)])):
            all_ = [numbers(i, shape, dtype) for i, shape in enumerate(shapes)]  # index 0 has no row
            assert bits(axis.allgather(all_[here], dim)) == bits(torch.cat(all_, dim))
        x = numbers(here, (3, 4), dtype)
        assert axis.broadcast(x, n - 1) is x and bits(x) == bits(numbers(n - 1, (3, 4), dtype))

        def piece(source: int, to: int, dtype: torch.dtype = dtype) -> Tensor:
            return numbers(10 * source + to, ((source + 2 * to) % 3, 4), dtype)

        got = axis.alltoall([piece(here, to) for to in range(n)])
        assert [bits(x) for x in got] == [bits(piece(source, here)) for source in range(n)]


@ranks(4)
def test_reduce_scatter_gives_each_index_its_balanced_piece_of_the_sum(axis: Any) -> None:
    for dtype in (*FLOATS, torch.int64, torch.int16):
        for dim, length in ((0, 1), (0, 8), (1, 5), (1, 0)):
            shape = (length, 3) if dim == 0 else (3, length)
            total = torch.stack([numbers(i, shape, dtype) for i in range(axis.size)]).double().sum(0)
            start, stop = axis.piece(length)
            got = axis.reduce_scatter(numbers(axis.index, shape, dtype), dim)
            want = total.narrow(dim, start, stop - start)
            torch.testing.assert_close(got.double(), want, rtol=2 * ERROR.get(dtype, 1e-6), atol=1e-6)


@ranks(2)
def test_bfloat16_is_added_in_float32_and_rounded_once(axis: Any) -> None:
    all_ = [numbers(i, (1001,), torch.bfloat16) for i in range(axis.size)]
    handle = axis.start_allreduce(all_[axis.index].clone(), "average", "b")
    while not handle.done():  # asking makes progress: the second half starts when the first is over
        pass
    assert torch.equal(handle.wait(), torch.stack(all_).float().mean(0).bfloat16())


@ranks(2)
def test_operations_under_one_name_may_be_under_way_together_and_end_in_any_order(axis: Any) -> None:
    for _ in range(3):
        handles = [axis.start_allreduce(torch.tensor([axis.index + 10.0 * k]), "sum", "same") for k in range(5)]
        assert [h.wait().item() for h in reversed(handles)] == [1 + 20.0 * k for k in (4, 3, 2, 1, 0)]


@ranks(2)
def test_one_more_unnamed_operation_of_the_users_on_one_rank_does_not_unmatch_ours(axis: Any) -> None:
    import horovod.torch as hvd

    if axis.index == 0:
        alone = hvd.allreduce_async(torch.ones(1), name="only here, so far", op=hvd.Sum)  # moves Horovod's own count
    assert axis.start_allreduce(torch.ones(2), "sum").wait().tolist() == [2, 2]
    if axis.index == 1:
        alone = hvd.allreduce_async(torch.ones(1), name="only here, so far", op=hvd.Sum)
    assert hvd.synchronize(alone).item() == 2


@ranks(2)
def test_what_horovod_has_not_goes_over_mpi(axis: Any) -> None:
    sent = axis.send(torch.full((3,), float(axis.index)), to=1 - axis.index, tag=5)
    assert axis.recv(torch.empty(3), source=1 - axis.index, tag=5).wait()[0] == 1 - axis.index
    sent.wait()
    assert axis.objects({"index": axis.index}) == [{"index": 0}, {"index": 1}]
    axis.barrier()


@ranks(2)
def test_a_horovod_built_for_another_torch_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.wires.hvd import check_built

    check_built()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(RuntimeError, match=r"built for torch .* and torch 9\.9\.9 is installed.*hybridpar\.install"):
        check_built()


@ranks(4)
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_first_objects_on_fresh_axes_do_not_deadlock_with_horovods_thread(tensor: int) -> None:
    """A pickling MPI call duplicates its communicator when first used, and holds the interpreter lock meanwhile.

    Horovod's thread wants that lock to free a finished tensor. So: half of the ranks come to the first objects() on
    each new axis while their reductions are still under way and finished tensors are being freed; the other half comes
    only when these reductions are over, which takes the first half's Horovod threads. With buffer calls only, the lock
    is free, and every turn ends.
    """
    import hybridpar as hp

    for turn in range(12):
        world = hp.init(tensor=tensor)
        for k in range(4):
            world.data.start_allreduce(torch.ones(64), "sum", f"small {k}").wait()
        large = [world.data.start_allreduce(torch.ones(100_000), "sum", f"large {k}") for k in range(4)]
        if (world.rank + turn) % 2:
            for handle in large:
                handle.wait()
        for axis in (world.everyone, world.replica, world.tensor, world.peers):
            assert axis.objects(turn) == [turn] * axis.size
        assert all(handle.wait()[0] == world.data.size for handle in large)
        world.close()
