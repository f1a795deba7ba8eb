"""Big models never materialise whole: built on the meta device, each rank's shards are filled, from seeds and files.

Everything is compared bit by bit: values are drawn per leaf module and copied, so there is nothing to round.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.fill.allocate import allocate
from hybridpar.fill.fill import fill
from hybridpar.fill.names import resolve
from hybridpar.fill.recipe import record
from hybridpar.fill.source import Files
from hybridpar.mesh import Mesh
from hybridpar.models.gpt import GPT
from hybridpar.shard import Spec, cut
from tests.jobs import run
from tests.models import VOCABULARY, gpt, tokens
from tests.ranks import ranks

SEED = 11
DEGREES = {
    1: [Mesh(1, 1, 1)],
    2: [Mesh(1, 1, 2), Mesh(1, 2, 1)],
    4: [Mesh(1, 2, 2), Mesh(2, 1, 2), Mesh(2, 2, 1)],
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def filled(module: nn.Module, weights: Any, init: Any = None) -> nn.Module:
    """`module`, whole, filled in this process without a mesh."""
    recipes = record(module)
    allocate([module], torch.device("cpu"))
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    fill(recipes, {name: (x, Spec(name, tuple(x.shape))) for name, x in named}, 0, weights, init)
    return module


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def small_gpt(tied: bool = True) -> GPT:
    return GPT(VOCABULARY, 24, 4, 12, 10, kv_heads=4, tied=tied)


def llama(layers: int = 2, tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def opened(degrees: Mesh) -> Any:
    torch.set_num_threads(1)
    return hp.init(data=degrees.data, pipeline=degrees.pipeline, tensor=degrees.tensor)


# ---- seeds


@ranks(1, 2, 4)
@pytest.mark.parametrize("make", [small_gpt, lambda: small_gpt(tied=False), convolutional], ids=["tied", "gpt", "conv"])
def test_a_seed_gives_the_same_bits_on_every_mesh(rank_count: int, make: Callable[[], nn.Module]) -> None:
    wanted = filled(on_meta(make), SEED).state_dict()
    for degrees in DEGREES[rank_count]:
        mesh = opened(degrees)
        model = hp.parallelize(on_meta(make), mesh, weights=SEED)
        assert_same(model.full_state_dict(), wanted)
        mesh.close()


@ranks(4)
def test_what_a_seed_has_filled_trains_as_in_one_process() -> None:
    from mpi4py import MPI

    losses = []
    for comm, degrees in ((MPI.COMM_SELF, Mesh()), (MPI.COMM_WORLD, Mesh(1, 2, 2))):
        torch.set_num_threads(1)
        mesh = hp.init(comm=comm, pipeline=degrees.pipeline, tensor=degrees.tensor)
        model = hp.parallelize(on_meta(lambda: small_gpt().double()), mesh, hp.CrossEntropy(), weights=SEED)
        optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6), model)
        for step in range(3):
            losses.append(model.train_step(tokens(step), microbatches=4))
            optimizer.step()
            optimizer.zero_grad()
        mesh.close()
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-10)  # other order of summation, as in test_equality


def test_initial_values_have_the_distribution_of_the_constructor() -> None:
    found, built = filled(on_meta(lambda: GPT(500, 64, 4, 4, 16)), SEED), GPT(500, 64, 4, 4, 16)
    for (name, x), y in zip(found.named_parameters(), built.parameters()):
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.1), name
    assert found.blocks[0].mlp.down.weight.std() < found.blocks[0].mlp.up.weight.std() / 2
    assert found.head.project.weight is found.embed.token.weight


def test_parents_initialise_their_children_and_one_leaf_depends_on_its_name_alone() -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "norm": nn.LayerNorm(16)})

    both, one = filled(on_meta(make), SEED), filled(on_meta(lambda: nn.ModuleDict({"norm": nn.Linear(16, 2)})), SEED)
    assert both["attention"].out_proj.bias.eq(0).all(), "by MultiheadAttention._reset_parameters"
    other = filled(on_meta(lambda: nn.ModuleDict({"first": nn.Linear(2, 2), "norm": nn.Linear(16, 2)})), SEED)
    assert torch.equal(other["norm"].weight, one["norm"].weight)
    others = filled(on_meta(make), SEED + 1)
    assert not torch.equal(others["attention"].in_proj_weight, both["attention"].in_proj_weight)


def test_the_generator_is_left_where_it_was() -> None:
    before = torch.get_rng_state()
    filled(on_meta(convolutional), SEED)
    assert torch.equal(torch.get_rng_state(), before)


def test_recurrent_layers_and_shared_parameters_keep_their_objects() -> None:
    module = on_meta(lambda: nn.ModuleList([nn.LSTM(3, 4, 2, bidirectional=True), nn.Linear(3, 3), nn.Linear(3, 3)]))
    module[2].weight = module[1].weight
    held = dict(module.named_parameters())
    filled(module, SEED)
    assert all(x is held[name] and not x.is_meta for name, x in module.named_parameters())
    assert module[2].weight is module[1].weight
    assert module[0](torch.ones(5, 2, 3))[0].isfinite().all()


class Scaled(nn.Module):
    """Parameters and a buffer of its own, no reset_parameters."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, device=device))
        self.register_buffer("mask", torch.tril(torch.ones(4, 4, device=device)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale @ self.mask


class Plain(nn.Module):
    """Its tensor is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.ramp = nn.Linear(4, 4), torch.arange(4)


class Further(nn.Sequential):
    """Its constructor does more than its layers' reset_parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        nn.init.normal_(self[1].weight, std=0.02)


def test_init_sets_what_no_reset_parameters_does() -> None:
    def init(name: str, module: nn.Module) -> None:
        if name == "":
            module.scale.fill_(2.0)
            module.mask.copy_(torch.tril(torch.ones(4, 4)))

    module = filled(on_meta(Scaled), SEED, init)
    assert module.scale.eq(2).all() and torch.equal(module.mask, torch.tril(torch.ones(4, 4)))


def test_what_is_real_within_a_meta_module_keeps_its_values() -> None:
    module = filled(on_meta(lambda: Scaled(device="cpu")), SEED)
    assert module.scale.eq(1).all() and torch.equal(module.mask, torch.tril(torch.ones(4, 4)))


# ---- stored weights


@ranks(1, 2, 4)
def test_slices_of_files_and_a_state_dict_give_what_load_state_dict_gives(rank_count: int, tmp_path: Path) -> None:
    plain = gpt(kv_heads=4, dtype=torch.float32)
    state = plain.state_dict()
    for degrees in DEGREES[rank_count]:
        mesh = opened(degrees)
        if mesh.rank == 0:
            store(state, tmp_path)
        mesh.everyone.objects(None)  # all wait until it is written
        for weights in (state, tmp_path / "one" / "model.safetensors", tmp_path / "one", str(tmp_path / "many")):
            model = hp.parallelize(on_meta(lambda: gpt(kv_heads=4)), mesh, weights=weights)
            assert_same(model.full_state_dict(), {name: x.double() for name, x in state.items()})
        mesh.close()


def store(state: Mapping[str, Tensor], folder: Path) -> None:
    """`state` as one file, and as two with an index; tied tensors once, as Hugging Face does."""
    once = {name: x for name, x in state.items() if name != "head.project.weight"}
    for name in ("one", "many"):
        (folder / name).mkdir(exist_ok=True)
    save_file(once, folder / "one" / "model.safetensors")
    shards = {f"model-{i}.safetensors": dict(list(once.items())[i::2]) for i in range(2)}
    for file, part in shards.items():
        save_file(part, folder / "many" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "many" / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_the_wanted_slices_of_a_file_are_read(tmp_path: Path) -> None:
    rows, columns = 1 << 20, 1 << 10  # 4 GiB, of which nothing is on the disk
    header = {
        "tall": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]},
        "wide": {"dtype": "F32", "shape": [columns, rows], "data_offsets": [4 * rows * columns, 8 * rows * columns]},
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "sparse.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 8 * rows * columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tall = cut("tall", (rows, columns), 0, [((0, 3), (8, 9)), ((3, 8), (9, rows))])
    wide = cut("wide", (columns, rows), 1, [((5, 9),), ((0, 5), (9, rows))])
    found = {spec.name: x for (_, spec), x in Files(tmp_path).parts([("tall", tall), ("wide", wide)], 0)}
    assert {name: tuple(x.shape) for name, x in found.items()} == {"tall": (4, columns), "wide": (columns, 4)}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@ranks(1, 2, 4)
def test_a_hugging_face_model_is_loaded_by_slices(rank_count: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = llama()
    frequencies = dict(plain.named_buffers())
    plan = {"model.layers.*.mlp.gate_proj": "column", "model.layers.*.mlp.up_proj": "column"}
    plan |= {"model.layers.*.mlp.down_proj": "row", "model.layers.*.mlp.act_fn": "partial"}
    for degrees in DEGREES[rank_count]:
        mesh = opened(degrees)
        if mesh.rank == 0:
            plain.save_pretrained(tmp_path)
        mesh.everyone.objects(None)
        model = hp.parallelize(on_meta(llama), mesh, plan=plan, weights=tmp_path)
        assert_same(model.full_state_dict(), plain.state_dict())
        for stage in model._stages.values():
            for name, x in stage.named_buffers():
                found = [y for other, y in frequencies.items() if name.endswith(other.rpartition(".")[2])]
                assert any(torch.equal(x, y) for y in found), name
        mesh.close()


def test_the_prefix_of_a_base_model_is_put_before_and_taken_away(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = llama(tied=True)
    whole.model.save_pretrained(tmp_path / "base")
    whole.save_pretrained(tmp_path / "whole")
    loaded = filled(on_meta(lambda: llama(tied=True)), tmp_path / "base")
    assert_same(loaded.state_dict(), whole.state_dict())
    assert torch.equal(loaded.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    assert_same(filled(on_meta(lambda: llama().model), tmp_path / "whole").state_dict(), whole.model.state_dict())


def test_a_seed_fills_what_the_stored_weights_lack(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = llama()
    whole.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight is missing .* weights=.weights, seed. would draw"):
        filled(on_meta(llama), tmp_path)
    loaded, seeded = filled(on_meta(llama), (tmp_path, SEED)), filled(on_meta(llama), SEED)
    assert_same(loaded.model.state_dict(), whole.model.state_dict())
    assert torch.equal(loaded.lm_head.weight, seeded.lm_head.weight)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "ViT", "T5", "Swin"])
def test_hugging_face_models_initialise_leaf_by_leaf_as_whole(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    size |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    own = {"T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 300}}
    own["GPT2"] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    own["Swin"] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 4}
    config = getattr(transformers, f"{kind}Config")(**own.get(kind, size))
    built = transformers.AutoModel.from_config(config)
    found = filled(on_meta(lambda: transformers.AutoModel.from_config(config)), SEED)
    assert_same(dict(found.named_buffers()), dict(built.named_buffers()))
    for (name, x), y in zip(found.named_parameters(), built.parameters()):
        if x.numel() > 500:
            assert x.std().item() == pytest.approx(y.std().item(), rel=0.25), name
    built.save_pretrained(tmp_path)  # under the names of older formats, for some
    loaded = filled(on_meta(lambda: transformers.AutoModel.from_config(config)), tmp_path)
    assert_same(loaded.state_dict(), built.state_dict())


# ---- refusals


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, bias=False))


STATE = linear().state_dict()


@pytest.mark.parametrize(
    ("make", "weights", "sentence"),
    [
        (linear, None, "0.weight is on the meta device and has no values: give .* weights="),
        (linear, True, "weights=True: give a seed"),
        (linear, "/nowhere", "there is no /nowhere on this host"),
        (linear, {"0.weight": STATE["0.weight"]}, "0.bias and 1 more are missing in the weights"),
        (linear, {**STATE, "2.weight": STATE["0.bias"]}, "2.weight is in the weights and not in the model"),
        (linear, {**STATE, "0.bias": torch.ones(3)}, r"0.bias has shape \[2\] in this model and \[3\]"),
        (linear, {**STATE, "0.bias": torch.ones(2).long()}, "0.bias is torch.float32 in this model and torch.int64"),
        (Scaled, SEED, "scale is a parameter on the meta device which no initialiser sets .* init="),
        (lambda: nn.Sequential(Plain()), SEED, "0.ramp is a tensor on the meta device and neither a parameter"),
        (Further, SEED, "1.weight was written 2 times while the model was built and 1 times by Linear.reset_param"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), SEED, "0.weight is lazy"),
    ],
    ids=lambda x: "" if not isinstance(x, str) else "".join(c if c.isalnum() else "-" for c in x[:30]),
)
def test_what_cannot_be_filled_is_refused(make: Callable[[], nn.Module], weights: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        filled(on_meta(make), weights)


def test_a_seed_for_a_real_module_is_refused() -> None:
    with pytest.raises(ValueError, match="weights=11 is a seed and fills what is on the meta device"):
        filled(linear(), SEED)


def test_a_call_under_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="called under torch.device"), torch.device("meta"):
        record(linear())


def test_a_buffer_that_nobody_computes_is_refused() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(4), persistent=False)

    with pytest.raises(ValueError, match='mask is a buffer on the meta device .* device="cpu"'):
        filled(on_meta(Masked), SEED)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"model.bin": b"x"}, "has no safetensors .it has model.bin."),
        ({"model.safetensors": b"not one"}, "model.safetensors is not a safetensors file"),
        ({"model.safetensors.index.json": b"{}"}, "is not an index of safetensors"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b"}}'}, "speaks of b, which is not beside it"),
    ],
)
def test_a_folder_without_usable_files_is_refused(files: Mapping[str, bytes], sentence: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        filled(on_meta(linear), tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="0.bias is in a.safetensors and in b.safetensors|0.weight is in"):
        filled(on_meta(linear), tmp_path)


def test_names_are_resolved_without_reading_anything() -> None:
    module = on_meta(small_gpt)
    found = resolve(record(module), [name for name in module.state_dict() if name != "embed.token.weight"])
    assert found["embed.token.weight"] == "head.project.weight", "either name of a tied parameter will do"


@ranks(2)
def test_ranks_with_different_seeds_are_refused() -> None:
    mesh = opened(Mesh(1, 1, 2))
    with pytest.raises(ValueError, match="were given different weights="):
        hp.parallelize(on_meta(small_gpt), mesh, weights=mesh.rank)
    mesh.close()


# ---- memory

_LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (930 << 20, 930 << 20))
from hybridpar.models.gpt import GPT
mesh = hp.init(tensor=TENSOR, pipeline=PIPELINE)
with torch.device("meta"):
    module = GPT(8192, 512, 8, 8, 32)
model = hp.parallelize(module, mesh, hp.CrossEntropy(), weights=1)
optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
ids = torch.arange(64).view(2, 32)
losses = []
for _ in range(3):
    losses.append(model.train_step((ids, ids + 1), microbatches=2))
    optimizer.step()
    optimizer.zero_grad()
if mesh.rank == 0:
    print("trained", losses[0] > losses[1] > losses[2])
mesh.close()
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_a_model_too_big_for_one_process_trains_on_a_mesh(tensor: int, pipeline: int, tmp_path: Path) -> None:
    """29 million parameters: 118 MB, four times that with gradients and AdamW's state, beside 590 MB of torch (75 its
    meta device), MPI and reserved stacks. The limit is on private writable memory (setrlimit(2), RLIMIT_DATA): Linux
    does not enforce one on resident memory, and one on addresses counts libraries and files."""
    body = _LIMITED.replace("TENSOR", str(tensor)).replace("PIPELINE", str(pipeline))
    job = run(tmp_path, body, ranks=tensor * pipeline, seconds=200)
    if tensor * pipeline == 1:
        assert job.code != 0 and "can't allocate memory" in job.said
    else:
        assert (job.code, job.out.strip()) == (0, "trained True"), job.said
