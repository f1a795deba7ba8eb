"""Unmodified modules cut by their own forward: stages one after another, in one process, equal the whole module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from hybridpar.microbatch import call
from hybridpar.skeleton.anatomy import dissect
from hybridpar.skeleton.cut import Skeleton
from hybridpar.skeleton.freight import pack, tensors, unpack

WIDTH = 6


class Loop(nn.Module):
    """Blocks in a list, called in order; `glue` says what is done between them."""

    def __init__(self, glue: Callable[[Any, nn.Module, list[Any]], Any] | None = None, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.glue = glue or (lambda x, block, before: block(x))

    def forward(self, ids: Tensor) -> Tensor:
        x, before = self.embed(ids), []
        for block in self.blocks:
            before.append(x)
            x = self.glue(x, block, before)
        return F.linear(self.norm(x * self.scale), self.embed.weight)  # tied by hand


def through(module: nn.Module, batch: Any, stages: int, example: Any = None) -> tuple[Any, list[nn.Module]]:
    """The output of `module` cut into `stages`, each of which gets what the one before it gives."""
    skeleton = Skeleton(module, stages, batch if example is None else example)
    count = len(skeleton.labels)
    cut = skeleton.stages(module, [*range(stages), count])
    passed: Any = batch
    for stage in cut:
        passed, _ = stage(passed, {}, batch)
    return passed, cut


def residual(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
    return x + block(x)


def far_skip(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
    return block(x) + before[0] if len(before) == 5 else block(x)


def joined(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
    return block(torch.cat([x, before[0]], -1)[..., WIDTH:] * x) if len(before) > 2 else block(x)


def in_place(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
    y = block(x).clone()
    y[:, 0] = before[-1][:, 0]
    return y.add_(before[0])


def recomputed(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


GLUES = [None, residual, far_skip, joined, in_place, recomputed]


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("glue", GLUES, ids=lambda glue: getattr(glue, "__name__", "plain"))
def test_stages_of_an_unmodified_forward_equal_the_whole_module(glue: Any, stages: int) -> None:
    torch.manual_seed(0)
    module, ids = Loop(glue, depth=5).double(), torch.randint(0, 20, (3, 4))
    whole = copy.deepcopy(module)
    expected = whole(ids)
    expected.square().sum().backward()
    output, _ = through(module, ids, stages)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.square().sum().backward()
    for (name, p), q in zip(module.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_a_stage_holds_the_parameters_of_its_own_units_only() -> None:
    module = Loop(residual)
    _, stages = through(module, torch.randint(0, 20, (3, 4)), 3)
    held = [{name for name, _, _ in stage.named()} for stage in stages]
    assert held[1] == {"scale", "blocks.0.0.weight", "blocks.0.0.bias"}  # parameters of bones are everywhere
    assert "embed.weight" in held[0] & held[2], "the head multiplies by it"
    assert {name for names in held for name in names} == set(dict(module.named_parameters()))


def test_a_module_that_is_called_again_and_again_is_cut_between_its_calls() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.groups = nn.Linear(WIDTH, WIDTH), nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(4):
                x = self.groups[0](x).tanh()
            return x

    module, x = Again().double(), torch.randn(2, WIDTH, dtype=torch.float64)
    output, stages = through(module, x, 3)
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)
    assert all("groups.0.weight" in {name for name, _, _ in stage.named()} for stage in stages[1:])


def test_an_encoder_s_result_travels_to_every_later_block() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))})
            self.decoder = nn.ModuleList(nn.Bilinear(WIDTH, WIDTH, WIDTH) for _ in range(3))

        def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
            for layer in self.encoder["layers"]:
                source = layer(source)
            for layer in self.decoder:
                target = layer(target, source).sin()
            return {"logits": target, "source": source}

    module = Pair().double()
    batch = {"source": torch.randn(2, WIDTH).double(), "target": torch.randn(2, WIDTH).double()}
    output, stages = through(module, batch, 5)
    torch.testing.assert_close(output, call(module, batch), rtol=0, atol=0)
    assert ("encoder.layers.1", 0) in stages[3]._leaving


def test_another_way_than_on_the_example_is_noticed() -> None:
    class Turns(Loop):
        def forward(self, ids: Tensor) -> Tensor:
            x = first = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.norm(x + first if len(ids) > 2 else x)

    with pytest.raises(ValueError, match="gives NaN: either the model does.*example= inputs like those of training"):
        through(Turns(), torch.randint(0, 20, (3, 4)), 3, example=torch.randint(0, 20, (2, 4)))


def test_a_forward_may_look_at_its_inputs_and_inside_a_block_at_anything() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if float(x.detach().sum()) > 0 else self.linear(-x)

    class Masked(Loop):
        def __init__(self) -> None:
            super().__init__(residual)
            self.blocks = nn.ModuleList(Looks() for _ in range(4))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.clamp(max=7)) if bool((ids > 7).any()) else super().forward(ids)

    module, ids = Masked().double(), torch.randint(0, 20, (3, 4))
    output, _ = through(module, ids, 4)
    torch.testing.assert_close(output, module(ids), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_which_would_lose_gradients_is_refused() -> None:
    def reentrant(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
        return checkpoint(block, x, use_reentrant=True)

    module, ids = Loop(reentrant), torch.randint(0, 20, (3, 4))
    skeleton = Skeleton(module, 2, ids)
    first, last = skeleton.stages(module, [0, 3, len(skeleton.labels)])
    passed, _ = first(ids, {}, ids)
    structure, *moving = passed
    with pytest.raises(ValueError, match="would lose those of the stages before; checkpoint with use_reentrant=False"):
        last((structure, *(t.detach().requires_grad_() for t in moving)), {}, ids)


def test_a_cut_inside_a_checkpoint_is_refused() -> None:
    output, _ = through(Loop(recomputed, depth=2), torch.randint(0, 20, (3, 4)), 4)  # blocks of two layers are opened
    with pytest.raises(ValueError, match="recomputed by a checkpoint on stage .*use stages= to cut"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("looks", "name"),
    [
        (lambda x: x if x.mean() > -1e9 else -x, "bool"),
        (lambda x: x * x.detach().sum().item(), "item"),
        (lambda x: x if max(x.flatten().tolist()) < 1e9 else -x, "tolist"),
    ],
)
def test_a_turn_that_depends_on_what_another_stage_computed_is_refused(
    looks: Callable[[Tensor], Tensor], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"stage . .* looks at a value \({name}\) that only an earlier stage has"):
        through(Loop(lambda x, block, before: looks(block(x))), torch.randint(0, 20, (3, 4)), 5)


def test_hooks_of_blocks_and_of_their_results_count_once() -> None:
    def glue(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
        y = block(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 2)
        return y

    module, ids = Loop(glue).double(), torch.randint(0, 20, (3, 4))
    for block in module.blocks:
        block.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
        block.register_forward_hook(lambda _, args, output: output * 0.5)
        block.register_full_backward_hook(lambda _, into, out: (into[0] * 3,))
    whole = copy.deepcopy(module)
    whole(ids).square().sum().backward()
    output, _ = through(module, ids, 3)
    output.square().sum().backward()
    for (name, p), q in zip(module.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_a_result_that_is_changed_in_place_between_two_stages_is_refused() -> None:
    def glue(x: Tensor, block: nn.Module, before: list[Tensor]) -> Tensor:
        y = block(x)
        y += 1
        return y

    with pytest.raises(ValueError, match=r"blocks.0 gives is changed in place .* on stage 1 .* write x = x \+ y"):
        through(Loop(glue), torch.randint(0, 20, (3, 4)), 3)


def test_what_a_block_hands_on_besides_its_result_is_refused() -> None:
    class Kept(Loop):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x + sum(self.blocks[i].kept for i in range(2))

    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.kept = y.square().mean()
            return y

    module = Kept()
    module.blocks = nn.ModuleList(Keeps(WIDTH, WIDTH) for _ in range(4))
    with pytest.raises(ValueError, match=r"blocks.[01] hands a tensor of shape \[\] on by something else than"):
        through(module, torch.randint(0, 20, (3, 4)), 3)


def test_what_transformers_collect_from_all_blocks_is_refused() -> None:
    class Asked(Loop):
        def forward(self, ids: Tensor, output_hidden_states: bool = False) -> Tensor:
            return super().forward(ids)

    ids = torch.randint(0, 20, (3, 4))
    with pytest.raises(ValueError, match="output_hidden_states=True collects from all blocks"):
        Skeleton(Asked(), 2, {"ids": ids, "output_hidden_states": True})
    _, stages = through(Asked(), {"ids": ids}, 2)
    with pytest.raises(ValueError, match="output_hidden_states=True collects from all blocks"):
        stages[0](None, {}, {"ids": ids, "output_hidden_states": True})


def test_what_cannot_be_watched_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="Linear cannot be cut into pipeline stages: it has no nn.ModuleList"):
        Skeleton(nn.Linear(2, 2), 2, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"Loop names no chain.*example=inputs"):
        Skeleton(Loop(), 2)
    with pytest.raises(ValueError, match=r"Loop could not be watched while it ran on the example inputs"):
        Skeleton(Loop(), 2, torch.zeros(1, 2, 3))


def test_lists_within_blocks_are_opened_where_there_are_too_few_blocks() -> None:
    nested = nn.ModuleDict({"stages": nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))})
    assert dissect(nested, 2).blocks == {"stages.0", "stages.1"}
    assert dissect(nested, 3).blocks == {f"stages.{i}.{j}" for i in range(2) for j in range(2)}
    assert dissect(nested, 3, closed={"stages.1"}).blocks == {"stages.0.0", "stages.0.1", "stages.1"}
    with pytest.raises(ValueError, match="outside of stages, which the tensor plan has run as one piece"):
        dissect(nested, closed={"stages"})


def test_any_structure_travels_as_tensors_and_the_rest() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    value = {"a": (x, [y, x]), "n": 3, "none": None}
    structure, moving = pack(value)
    assert [id(t) for t in moving] == [id(x), id(y)]
    again = unpack(structure, moving)
    assert again["a"][1][1] is x and again["n"] == 3 and len(tensors(again)) == 3
    with pytest.raises(ValueError, match="a function is handed from one pipeline stage to the next"):
        pack(lambda: None)


class Pairs(nn.Module):
    """Layers that are lists, or dicts, of two modules: nobody calls what holds them."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        pairs = [[nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())] for _ in range(3)]
        held = [nn.ModuleDict({"attention": a, "feed": b}) if named else nn.ModuleList([a, b]) for a, b in pairs]
        self.layers = nn.ModuleList(held)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            attention, feed = layer.values() if isinstance(layer, nn.ModuleDict) else layer
            x = attention(x) + x
            x = feed(x) + x
        return x


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_lists_of_lists_are_cut_between_what_is_called(named: bool, stages: int) -> None:
    module, x = Pairs(named), torch.randn(2, WIDTH)
    output, cut = through(module, x, stages)
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)
    held = [{id(p) for p in stage.parameters()} for stage in cut]
    assert sum(map(len, held)) == len(list(module.parameters())) == len(set().union(*held))


def test_blocks_that_nobody_calls_are_refused() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block[0](x)
            return x

    with pytest.raises(ValueError, match=r"calls none of its blocks \(blocks.0, .* as a module"):
        Skeleton(Parts(), 2, torch.randn(2, WIDTH))


def test_packed_sequences_travel_and_are_stood_in_for() -> None:
    class Heard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [WIDTH, 10, 10]
            self.layers = nn.ModuleList(nn.LSTM(n, 5, batch_first=True, bidirectional=True) for n in sizes)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            for layer in self.layers:
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                x, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])
            return x

    module, batch = Heard(), (torch.randn(3, 6, WIDTH), torch.tensor([4, 6, 1]))
    torch.testing.assert_close(through(module, batch, 3)[0], module(*batch), rtol=0, atol=0)


def test_a_unit_may_be_called_on_a_parameter() -> None:
    class Queries(Loop):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.norm(self.embed.weight).sum()

    module, ids = Queries(), torch.randint(20, (2, 3))
    torch.testing.assert_close(through(module, ids, 2)[0], module(ids), rtol=0, atol=0)


def test_ranks_that_saw_the_forward_go_different_ways_are_told() -> None:
    class Named(Loop):
        kinds = ("near", "far")

        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Identity()

        def forward(self, ids: Tensor) -> Tensor:
            turns = {kind: self.turn(torch.ones(WIDTH) * len(kind)) for kind in self.kinds}  # as over a set
            x = self.embed(ids)
            for block, kind in zip(self.blocks, ("near", "far", "far", "near")):
                x = block(x * turns[kind])
            return x

    here, there, ids = Named(), Named(), torch.zeros(1, 2, dtype=torch.long)
    there.kinds = ("far", "near")
    one, other = Skeleton(here, 2, ids), Skeleton(there, 2, ids)
    one.check([one.order, one.order])
    with pytest.raises(ValueError, match=r"rank 1 of a replica's 2 .* from its call 3 on \(blocks.0\).*PYTHONHASHSEED"):
        one.check([one.order, other.order])


def test_a_parameter_that_blocks_are_given_and_give_back_as_it_is_was_not_made_by_them() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.line(x) + table.to(x.dtype)[0]  # the table itself

    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.table = nn.ModuleList(Given() for _ in range(3)), nn.Embedding(4, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, self.table.weight)
            return x

    module, x = Relative(), torch.randn(2, WIDTH)
    torch.testing.assert_close(through(module, x, 3)[0], module(x), rtol=0, atol=0)
