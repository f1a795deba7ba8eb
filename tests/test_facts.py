"""Mesh and Spec: who stands where, and who holds and owns what. No process is needed to ask."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridpar.mesh import AXES, Mesh, Place
from hybridpar.shard import Spec, balanced, cut

degrees = st.integers(1, 6)
meshes = st.builds(Mesh, degrees, degrees, degrees)


@given(meshes)
def test_a_place_has_one_rank_and_a_rank_one_place(mesh: Mesh) -> None:
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert [mesh.rank(place.data, place.pipeline, place.tensor) for place in places] == list(range(mesh.size))
    assert len(set(places)) == mesh.size


def test_the_tensor_axis_varies_fastest_and_data_slowest() -> None:
    mesh = Mesh(data=2, pipeline=3, tensor=2)
    assert [mesh.place(rank) for rank in (0, 1, 2, 6)] == [
        Place(0, 0, 0),
        Place(0, 0, 1),
        Place(0, 1, 0),
        Place(1, 0, 0),
    ]


@given(meshes, st.sampled_from(AXES))
def test_the_groups_of_an_axis_partition_the_ranks(mesh: Mesh, axis: str) -> None:
    groups = {mesh.group(axis, rank) for rank in range(mesh.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    for group in groups:
        assert [getattr(mesh.place(rank), axis) for rank in group] == list(range(getattr(mesh, axis)))
        assert all(mesh.group(axis, rank) == group for rank in group)


@given(meshes)
def test_replicas_partition_the_ranks_and_differ_in_their_data_index(mesh: Mesh) -> None:
    replicas = sorted({mesh.replica(rank) for rank in range(mesh.size)})
    assert [rank for replica in replicas for rank in replica] == list(range(mesh.size))
    for index, replica in enumerate(replicas):
        assert {mesh.place(rank).data for rank in replica} == {index}


@given(meshes, st.data())
def test_two_groups_of_different_axes_meet_in_one_rank_at_most(mesh: Mesh, data: st.DataObject) -> None:
    one, other = data.draw(st.permutations(AXES))[:2]
    ranks = st.integers(0, mesh.size - 1)
    common = set(mesh.group(one, data.draw(ranks))) & set(mesh.group(other, data.draw(ranks)))
    assert len(common) <= 1


@given(meshes)
def test_a_mesh_fits_its_own_size(mesh: Mesh) -> None:
    assert Mesh.fit(mesh.size, pipeline=mesh.pipeline, tensor=mesh.tensor) == mesh
    assert Mesh.fit(mesh.size, mesh.data, mesh.pipeline, mesh.tensor) == mesh


def test_a_mesh_of_4096_ranks_is_a_value_like_any_other() -> None:
    mesh = Mesh.fit(4096, pipeline=16, tensor=8)
    assert mesh == Mesh(data=32, pipeline=16, tensor=8) and hash(mesh) == hash(Mesh(32, 16, 8))
    assert {mesh.group("pipeline", rank)[0] for rank in range(4096)} == {
        mesh.rank(data, 0, tensor) for data in range(32) for tensor in range(8)
    }
    assert str(mesh) == "data=32 x pipeline=16 x tensor=8"


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: Mesh(tensor=0), "tensor=0: a degree is a whole number of at least 1"),
        (lambda: Mesh(data=2.0), "data=2.0: a degree is a whole number of at least 1"),
        (lambda: Mesh.fit(8, tensor=0), "tensor=0: a degree is a whole number of at least 1"),
        (lambda: Mesh.fit(8, data=0), "data=0: a degree is a whole number of at least 1"),
        (
            lambda: Mesh.fit(6, tensor=2, pipeline=2),
            "6 ranks cannot be laid out as pipeline=2 x tensor=2: 4 does not divide 6; "
            "start 4 or 8 ranks or change the degrees",
        ),
        (
            lambda: Mesh.fit(3, tensor=4),
            "3 ranks cannot be laid out as pipeline=1 x tensor=4: 4 does not divide 3; "
            "start 4 ranks or change the degrees",
        ),
        (
            lambda: Mesh.fit(8, data=2, tensor=2),
            "data=2 x pipeline=1 x tensor=2 needs 4 ranks and 8 were started; "
            "leave data out (it would be 4) or start 4",
        ),
        (lambda: Mesh(2).place(2), "rank 2 is outside data=2 x pipeline=1 x tensor=1, which has ranks 0 to 1"),
        (lambda: Mesh(2).place(-1), "rank -1 is outside data=2 x pipeline=1 x tensor=1, which has ranks 0 to 1"),
        (lambda: Mesh(2).rank(tensor=1), "index 1 is outside the tensor axis of data=2 x pipeline=1 x tensor=1"),
        (lambda: Mesh(2).rank(data=-1), "index -1 is outside the data axis of data=2 x pipeline=1 x tensor=1"),
        (lambda: Mesh(2).group("model", 0), "there is no axis 'model': the axes are data, pipeline, tensor"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_sentence(ask, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ask()


@given(st.integers(0, 200), st.integers(1, 50))
def test_balanced_pieces_follow_each_other_and_differ_by_one(length: int, pieces: int) -> None:
    ranges = balanced(length, pieces)
    sizes = [stop - start for start, stop in ranges]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(length))
    assert len(sizes) == pieces and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A dim cut into atoms, each held at one index or at several, in any local order; some ranges are empty."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    atoms = [(stop - size, stop) for stop, size in zip(stops, sizes)]
    size = draw(st.integers(1, 4))
    holders = [draw(st.sets(st.integers(0, size - 1), min_size=1)) for _ in atoms]
    parts = [draw(st.permutations([a for a, held in zip(atoms, holders) if index in held])) for index in range(size)]
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    dim = draw(st.integers(0, len(shape)))
    return cut("w", [*shape[:dim], stops[-1], *shape[dim:]], dim, parts)


def elements(spec: Spec, index: int) -> list[int]:
    """What is held at `index`, in local order."""
    return [i for start, stop in spec.held(index) for i in range(start, stop)]


@given(specs())
def test_the_owned_pieces_of_all_indices_partition_the_dim(spec: Spec) -> None:
    owned = [
        i for index in range(len(spec.parts)) for _, (start, stop) in spec.owned(index) for i in range(start, stop)
    ]
    assert sorted(owned) == list(range(spec.shape[spec.dim]))


@given(specs())
def test_an_owned_piece_is_the_same_elements_locally_and_globally(spec: Spec) -> None:
    for index in range(len(spec.parts)):
        held = elements(spec, index)
        for (begin, end), (start, stop) in spec.owned(index):
            assert held[begin:end] == list(range(start, stop)) != []


@given(specs())
def test_the_first_holder_owns(spec: Spec) -> None:
    for index in range(len(spec.parts)):
        before = {i for earlier in range(index) for i in elements(spec, earlier)}
        owned = {i for _, (start, stop) in spec.owned(index) for i in range(start, stop)}
        assert owned == set(elements(spec, index)) - before


@given(specs())
def test_a_spec_overlaps_where_an_element_is_held_twice_and_is_then_partial(spec: Spec) -> None:
    held = [i for index in range(len(spec.parts)) for i in elements(spec, index)]
    assert spec.overlaps == spec.partial == (len(held) > len(set(held)))


@given(specs())
def test_a_local_shape_counts_what_is_held(spec: Spec) -> None:
    for index in range(len(spec.parts)):
        shape = list(spec.shape)
        shape[spec.dim] = len(elements(spec, index))
        assert spec.local_shape(index) == tuple(shape)


def test_a_whole_parameter_is_held_everywhere_and_owned_at_index_0() -> None:
    spec = Spec("norm.weight", (2, 3))
    assert spec.local_shape(0) == spec.local_shape(3) == (2, 3)
    assert spec.owned(0) == (((0, 6), (0, 6)),) and spec.owned(3) == ()
    assert Spec("scale", ()).owned(0) == (((0, 1), (0, 1)),)
    assert not spec.overlaps and not spec.partial


def test_a_renamed_spec_is_the_same_spec_further_down() -> None:
    spec = cut("weight", (4, 2), 0, [[(0, 3)], [(2, 4)]])
    assert spec.renamed("blocks.0.up").name == "blocks.0.up.weight"
    assert spec.renamed("blocks.0.up").renamed("").partial
    assert spec.renamed("") == spec


@pytest.mark.parametrize(
    ("dim", "parts", "sentence"),
    [
        (2, [[(0, 4)]], "w [4, 6] has no dim 2 to be cut along"),
        (-1, [[(0, 6)]], "w [4, 6] has no dim -1 to be cut along"),
        (1, [[(0, 3)], [(3, 7)]], "index 1 cannot hold [3, 7) of dim 1 of w [4, 6]: it has 0 to 6"),
        (1, [[(3, 0)]], "index 0 cannot hold [3, 0) of dim 1 of w [4, 6]: it has 0 to 6"),
        (1, [[(0, 3)], [(4, 6)]], "nobody holds [3, 4) of dim 1 of w [4, 6]: the parts must cover it"),
        (1, [[(0, 3), (2, 6)]], "index 0 holds some element of dim 1 of w [4, 6] twice: ((0, 3), (2, 6))"),
    ],
)
def test_parts_that_cannot_be_are_refused_in_one_sentence(dim: int, parts: list, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        cut("w", (4, 6), dim, parts)
