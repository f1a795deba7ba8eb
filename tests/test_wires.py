"""Carriers, the mailbox and the world, on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hybridpar as hp
from hybridpar.mesh import Mesh
from hybridpar.shard import balanced
from hybridpar.wires.axis import Alone, Axis
from hybridpar.wires.message import Mailbox
from tests.ranks import ranks

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ALL = (*FLOATS, *COMPLEX, *WHOLE, torch.bool)
CPU = torch.device("cpu")


@pytest.fixture(params=["mpi", "gloo"])
def axis(request: pytest.FixtureRequest) -> Iterator[Axis]:
    """All ranks of the test as one axis, over each carrier."""
    from mpi4py import MPI

    world, failed = hp.init(pipeline=MPI.COMM_WORLD.size, carrier=request.param), request.session.testsfailed
    yield world.pipeline
    if request.session.testsfailed == failed:  # a rank that failed must report it, not wait here for the others
        world.close()


def values(shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    """Small whole numbers, so that every sum is exact in every dtype; `index` tells ranks apart."""
    count = torch.Size(shape).numel()
    x = (torch.arange(count) * 7 + index * 3) % 11
    return (x % 2 == index % 2).view(shape) if dtype is torch.bool else x.view(shape).to(dtype)


def same(found: Tensor, wanted: Tensor, what: object) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (what, found, wanted)
    assert torch.equal(found, wanted), (what, found, wanted)


# ---- collectives


@ranks(1, 2, 3)
def test_a_sum_is_that_of_all_ranks_in_every_dtype_and_shape(axis: Axis) -> None:
    for dtype in ALL:
        for shape in ((), (5,), (2, 3), (0,), (2, 0, 3)):
            each = [values(shape, dtype, i) for i in range(axis.size)]
            wanted = torch.stack(each).any(0) if dtype is torch.bool else torch.stack(each).sum(0).to(dtype)
            x = each[axis.index].clone()
            found = axis.allreduce(x)
            same(found, wanted, ("sum", dtype, shape))
            assert found.data_ptr() == x.data_ptr(), "a sum is made in place"


@ranks(1, 2, 3)
def test_averages_largest_and_smallest_are_of_all_ranks(axis: Axis) -> None:
    for dtype in (*FLOATS, *WHOLE):
        each = torch.stack([values((2, 5), dtype, i) for i in range(axis.size)])
        same(axis.allreduce(each[axis.index].clone(), "max"), each.amax(0), ("max", dtype))
        same(axis.allreduce(each[axis.index].clone(), "min"), each.amin(0), ("min", dtype))
        if dtype.is_floating_point:
            wanted = (each.double().sum(0) / axis.size).to(dtype)
            found = axis.allreduce(each[axis.index].clone(), "average")
            # The quotient is rounded once or, where the sum was rounded before it, twice.
            torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@ranks(2, 3)
def test_many_sums_under_way_at_once_do_not_mix(axis: Axis) -> None:
    handles = [axis.start_allreduce(torch.full((i + 1,), float(i + axis.index))) for i in range(20)]
    added = sum(range(axis.size))
    for i, handle in enumerate(handles):
        same(handle.wait(), torch.full((i + 1,), float(i * axis.size + added)), i)
        assert handle.done()


@ranks(1, 2)
def test_a_handle_may_be_waited_for_twice(axis: Axis) -> None:
    handle = axis.start_allreduce(torch.tensor([4.0, 8.0]), "average")
    assert [handle.wait().tolist() for _ in range(2)] == [[4.0, 8.0]] * 2


@ranks(1, 2, 3)
def test_gathered_pieces_may_differ_in_length_along_any_dim(axis: Axis) -> None:
    for dtype in ALL:
        for dim in (0, 1, -1):
            shapes = [[4, 3, 2] for _ in range(axis.size)]
            for i, shape in enumerate(shapes):
                shape[dim] = i  # index 0 gives nothing
            each = [values(tuple(shape), dtype, i) for i, shape in enumerate(shapes)]
            same(axis.allgather(each[axis.index], dim), torch.cat(each, dim), ("allgather", dtype, dim))


@ranks(2, 3)
def test_a_gather_of_more_than_mpi_counts_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    from hybridpar.wires import mpi

    monkeypatch.setattr(mpi, "_MOST", 12 if MPI.COMM_WORLD.size == 3 else 11)  # of the whole: 24 and 12
    axis = mpi.MpiAxis(MPI.COMM_WORLD, "everyone")
    mine = torch.full((axis.index + 1, 4), axis.index)
    whole = torch.cat([torch.full((i + 1, 4), i) for i in range(axis.size)])
    assert torch.equal(axis.allgather(mine), whole)
    assert torch.equal(axis.allgather(mine.T, dim=1), whole.T)


@ranks(1, 2, 3)
def test_each_index_gets_its_balanced_piece_of_a_sum(axis: Axis) -> None:
    for dtype in (*FLOATS, *COMPLEX, *WHOLE):
        for length in (5, 2, 0):  # 2 leaves the last of three without
            for dim in (0, 1, -1):
                shape = [4, 3, 2]
                shape[dim] = length
                each = [values(tuple(shape), dtype, i) for i in range(axis.size)]
                start, stop = balanced(length, axis.size)[axis.index]
                wanted = torch.stack(each).sum(0).to(dtype).narrow(dim, start, stop - start)
                same(axis.reduce_scatter(each[axis.index], dim), wanted, ("reduce_scatter", dtype, length, dim))


@ranks(1, 2, 3)
def test_pieces_of_any_length_reach_every_rank(axis: Axis) -> None:
    for dtype in ALL:
        # From index i to index j go i + 2 j rows: none from 0 to 0.
        pieces = [values((axis.index + 2 * j, 3), dtype, axis.index) for j in range(axis.size)]
        wanted = [values((i + 2 * axis.index, 3), dtype, i) for i in range(axis.size)]
        for found, piece in zip(axis.alltoall(pieces), wanted):
            same(found, piece, ("alltoall", dtype))


@ranks(1, 2, 3)
def test_every_rank_can_tell_the_others_a_tensor(axis: Axis) -> None:
    for dtype in ALL:
        for shape in ((), (2, 3), (0,)):
            for source in range(axis.size):
                x = values(shape, dtype, axis.index)
                same(axis.broadcast(x, source), values(shape, dtype, source), ("broadcast", dtype, shape))
                same(x, values(shape, dtype, source), "a broadcast is into the tensor given")


@ranks(1, 2, 3)
def test_python_values_of_any_length_are_told_to_all(axis: Axis) -> None:
    mine = {"index": axis.index, "text": "x" * (5000 * axis.index), "none": None}
    assert axis.objects(mine) == [{"index": i, "text": "x" * (5000 * i), "none": None} for i in range(axis.size)]
    axis.barrier()


@ranks(2, 3)
def test_collectives_take_tensors_with_strides_and_leave_them_alone(axis: Axis) -> None:
    each = [values((4, 6), torch.float32, i).t() for i in range(axis.size)]  # [6, 4], not contiguous
    mine = each[axis.index]
    same(axis.allgather(mine, 1), torch.cat(each, 1), "allgather")
    start, stop = axis.piece(6)
    same(axis.reduce_scatter(mine, 0), torch.stack(each).sum(0)[start:stop], "reduce_scatter")
    same(mine, values((4, 6), torch.float32, axis.index).t(), "what was given")


@ranks(2)
def test_what_is_changed_in_place_must_be_contiguous() -> None:
    world = hp.init(tensor=2)
    with pytest.raises(ValueError, match=r"tensor axis: a tensor of shape \(6, 4\) must be contiguous"):
        world.tensor.allreduce(torch.ones(4, 6).t())
    world.close()


# ---- messages


@ranks(2, 3)
def test_tensors_of_every_dtype_and_several_megabytes_travel_both_ways_at_once(axis: Axis) -> None:
    """Sends wait for their receivers here: whoever sent all before receiving anything would wait for ever."""
    to, source = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    for dtype in ALL:
        for shape in ((), (7,), (3, 5)):
            handle = axis.send(values(shape, dtype, axis.index), to, tag=1)
            found = axis.recv(torch.empty(shape, dtype=dtype), source, tag=1).wait()
            same(found, values(shape, dtype, source), ("message", dtype, shape))
            handle.wait()
    handles = [axis.send(torch.full((1 << 20,), float(i + axis.index)), to, tag=2) for i in range(4)]
    for i in range(4):
        found = axis.recv(torch.empty(1 << 20), source, tag=2).wait()
        assert torch.equal(found, torch.full((1 << 20,), float(i + source)))
    for handle in handles:
        handle.wait()


@ranks(2)
def test_messages_over_mpi_are_matched_by_their_tag() -> None:
    world = hp.init(pipeline=2)
    axis, other = world.pipeline, 1 - world.pipeline.index
    handles = [axis.send(torch.tensor([float(tag)]), other, tag) for tag in range(5)]
    for tag in reversed(range(5)):
        assert axis.recv(torch.empty(1), other, tag).wait() == tag
    for handle in handles:
        handle.wait()
    assert not axis.ordered
    world.close()


def test_alone_keeps_what_is_sent_until_it_is_received() -> None:
    axis = Alone("pipeline", rank=5)
    assert (axis.size, axis.index, axis.ranks, axis.piece(7)) == (1, 0, (5,), (0, 7))
    for value in (1.0, 2.0):
        assert axis.send(torch.tensor([value]), 0, tag=3).done()
    assert [float(axis.recv(torch.empty(1), 0, tag=3).wait()) for _ in range(2)] == [1.0, 2.0]


def test_alone_every_collective_gives_back_what_it_was_given() -> None:
    axis, x = Alone("tensor"), torch.arange(6.0).view(2, 3)
    for found in (axis.allreduce(x), axis.allreduce(x, "average"), axis.allgather(x, 1), axis.reduce_scatter(x, -1)):
        assert found is x
    assert axis.broadcast(x, 0) is x
    assert axis.alltoall([x])[0] is x
    assert axis.objects("told") == ["told"]
    axis.barrier()


# ---- the mailbox

SHAPES = [(torch.float64, (2, 3)), (torch.bfloat16, ()), (torch.bool, (4,)), (torch.float32, (0, 3)), None]


def letter(number: int) -> tuple[list[Tensor | None], Any]:
    """A message that differs from every other: other shapes, dtypes, absent tensors and values."""
    tensors = [None if s is None else values(s[1], s[0], number) for s in SHAPES[: number % 6]]
    return tensors, {"number": number, "long": "x" * (number * 300)}  # from 4 on, longer than one note


def delivered(message: tuple[list[Tensor | None], Any], number: int) -> None:
    (tensors, value), (wanted, wanted_value) = message, letter(number)
    assert value == wanted_value and len(tensors) == len(wanted)
    for found, tensor in zip(tensors, wanted):
        if tensor is None:
            assert found is None
        else:
            same(found, tensor, number)


Order = Callable[[list[int]], list[int]]


@ranks(2, 3)
@pytest.mark.parametrize("order", [list, lambda n: n[::-1], lambda n: n[1::2] + n[::2]], ids=["sent", "back", "odd"])
def test_messages_may_be_taken_in_any_order_and_all_sent_before_one_is_taken(axis: Axis, order: Order) -> None:
    box, numbers = Mailbox(axis, CPU), list(range(12))
    others = [i for i in range(axis.size) if i != axis.index]
    for other in others:
        for number in numbers:
            box.post(other, 100 + number, *letter(number))
    for number in order(numbers):
        for other in others:
            delivered(box.take(other, 100 + number), number)
    box.flush()


@ranks(2)
def test_a_tag_may_be_used_again_with_other_shapes(axis: Axis) -> None:
    box, other = Mailbox(axis, CPU), 1 - axis.index
    for number in (5, 1, 11, 0, 3):
        box.post(other, 7, *letter(number))
    for number in (5, 1, 11, 0, 3):
        delivered(box.take(other, 7), number)
    box.flush()


@ranks(2)
def test_a_message_may_hold_tensors_with_strides_and_with_gradients(axis: Axis) -> None:
    box, other = Mailbox(axis, CPU), 1 - axis.index
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    box.post(other, 1, [x.t() * 2, x[:, 1]])
    (first, second), _ = box.take(other, 1)
    same(first, torch.arange(6.0).view(2, 3).t() * 2, "strides")
    same(second, torch.tensor([1.0, 4.0]), "a column")
    assert not first.requires_grad
    box.flush()


@ranks(2)
def test_big_messages_cross_without_waiting_for_each_other(axis: Axis) -> None:
    box, other = Mailbox(axis, CPU), 1 - axis.index
    for number in range(6):
        box.post(other, number, [torch.full((1 << 19,), float(number)), None], "a value")
    for number in (3, 0, 5, 1, 4, 2):
        (big, none), value = box.take(other, number)
        assert none is None and value == "a value" and torch.equal(big, torch.full((1 << 19,), float(number)))
    box.flush()


# ---- the world


@ranks(8)
def test_each_axis_has_the_ranks_that_the_mesh_says() -> None:
    import horovod.torch as hvd

    world = hp.init(data=2, pipeline=2, tensor=2)
    mesh, place = world.mesh, world.place
    for name in ("data", "pipeline", "tensor"):
        axis = getattr(world, name)
        assert axis.ranks == mesh.group(name, world.rank)
        assert (axis.size, axis.index) == (2, getattr(place, name))
        assert float(axis.allreduce(torch.tensor([2.0**world.rank]))) == sum(2.0**rank for rank in axis.ranks)
    assert world.peers.ranks == world.data.ranks
    assert world.replica.ranks == mesh.replica(world.rank) and world.everyone.ranks == tuple(range(8))
    assert (hvd.size(), hvd.rank()) == (2, place.data), "Horovod's world is the data axis"
    world.close()


@ranks(4)
def test_a_world_that_was_closed_may_be_opened_as_another_mesh() -> None:
    import horovod.torch as hvd

    for degrees in (Mesh(2, 2, 1), Mesh(4, 1, 1), Mesh(1, 2, 2), Mesh(2, 1, 2), Mesh(2, 2, 1)):
        world = hp.init(data=degrees.data, pipeline=degrees.pipeline, tensor=degrees.tensor)
        assert world.mesh == degrees and hvd.size() == degrees.data
        for axis in (world.data, world.pipeline, world.tensor, world.peers, world.replica, world.everyone):
            assert int(axis.allreduce(torch.ones(1))) == axis.size
        world.close()
        assert not hvd.is_initialized()


@ranks(4)
def test_init_after_horovods_own_takes_its_place() -> None:
    import horovod.torch as hvd

    hvd.init()
    assert hvd.size() == 4
    world = hp.init(tensor=2)
    assert hvd.size() == 2 and world.data.size == 2
    world.close()


@ranks(4)
def test_a_part_of_the_ranks_may_be_a_world_of_its_own() -> None:
    from mpi4py import MPI

    half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank // 2)
    world = hp.init(pipeline=2, comm=half)
    assert world.mesh == Mesh(1, 2, 1) and world.rank == half.rank
    assert int(world.everyone.allreduce(torch.ones(1))) == 2
    world.close()
    half.Free()


@ranks(4)
def test_degrees_that_do_not_fit_the_ranks_and_unknown_carriers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 ranks cannot be laid out as pipeline=1 x tensor=3"):
        hp.init(tensor=3)
    with pytest.raises(ValueError, match="carrier 'pigeon' is unknown: use mpi, nccl or gloo"):
        hp.init(tensor=2, carrier="pigeon")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="carrier nccl needs GPUs"):
            hp.init(tensor=2, carrier="nccl")


@ranks(2)
def test_ranks_that_ask_for_different_things_are_told_so() -> None:
    from mpi4py import MPI

    with pytest.raises(ValueError, match=r"rank 1 was started with seed=1 and rank 0 with seed=0"):
        hp.init(seed=MPI.COMM_WORLD.rank)
