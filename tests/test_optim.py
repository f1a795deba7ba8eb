"""Gradients, clipping and the optimizer over replicas, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridpar.optim.bucket import grouped
from hybridpar.optim.clip import clip_grad_norm_, grad_norm
from hybridpar.optim.compression import Compression
from hybridpar.optim.distributed import DistributedOptimizer
from hybridpar.optim.model import Averaging
from hybridpar.optim.partial import PartialSums
from hybridpar.optim.reduce import Reducer
from hybridpar.shard import Spec, balanced, cut
from hybridpar.support import Combination
from hybridpar.wires.axis import Alone
from tests.ranks import ranks


class Plain:
    """A module as the engine would show it, and the engine's loop over microbatches."""

    scattered, scaling, asked = False, None, Combination()

    def __init__(self, module: nn.Module, world: Any, specs: dict[str, Spec] | None = None, chunks: int = 1) -> None:
        self.module, self.world, self._specs = module, world, specs or {}
        named = list(module.named_parameters())
        self._chunks = [named[a:b] for a, b in balanced(len(named), chunks)]
        members = [
            [(name, p, self._specs.get(name) or Spec(name, tuple(p.shape))) for name, p in chunk]
            for chunk in self._chunks
        ]
        self.sums = PartialSums(world.tensor, members)
        self._attached: list[Averaging] = []

    def chunks(self) -> list[list[tuple[str, nn.Parameter]]]:
        return self._chunks

    def specs(self) -> dict[str, Spec]:
        return self._specs

    def attach(self, reducer: Averaging) -> None:
        self._attached = [reducer]

    def wait(self) -> None:
        for reducer in self._attached:
            reducer.wait()

    def backward(self, losses: list[Callable[[], Tensor]]) -> None:
        """The backward passes of a step, the last one watched."""
        watchers = [self.sums, *self._attached]
        for chunk in range(len(self._chunks)):
            self.sums.begin(chunk)
        for number, loss in enumerate(losses):
            if number == len(losses) - 1:
                _each(watchers, "arm", len(self._chunks))
            loss().backward()
        _each(watchers, "flush", len(self._chunks))


def _each(watchers: list[Any], verb: str, chunks: int) -> None:
    for chunk in range(chunks):
        for watcher in watchers:
            getattr(watcher, verb)(chunk)


@pytest.fixture
def replicas(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A world in which all ranks are replicas."""
    import hybridpar as hp

    world = hp.init()
    yield world
    world.close()


@pytest.fixture
def shards() -> Iterator[Any]:
    """A world whose tensor axis has two ranks."""
    import hybridpar as hp

    world = hp.init(tensor=2)
    yield world
    world.close()


@pytest.fixture
def alone() -> Any:
    return SimpleNamespace(data=Alone("data"), tensor=Alone("tensor"), replica=Alone("replica"), sync=None)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def mine(x: Tensor, world: Any) -> Tensor:
    start, stop = world.data.piece(len(x))
    return x[start:stop]


def mean_losses(module: nn.Module, x: Tensor, microbatches: int) -> list[Callable[[], Tensor]]:
    """The microbatches' shares of a mean over `x`."""
    return [lambda part=part: module(part).square().sum() / len(x) for part in x.chunk(microbatches)]


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


# ---- averages over the data axis


@ranks(2, 4)
def test_averaged_gradients_are_those_of_one_process(replicas: Any) -> None:
    module, reference, x = network(), network(), batch(24)
    module_losses = mean_losses(module, mine(x, replicas), 3)
    for loss in mean_losses(reference, x, 1):
        loss().backward()
    for bucket_bytes in (1, 300, None):
        model = Plain(module, replicas, chunks=2)
        reducer = Reducer(replicas.data, model.chunks(), bucket_bytes)
        model.attach(reducer)
        for _ in range(2):  # the second step finds buckets in use
            module.zero_grad()
            model.backward(module_losses)
            reducer.wait()
            for p, q in zip(module.parameters(), reference.parameters()):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@ranks(2)
def test_gradients_kept_in_place_between_steps_stay_right(replicas: Any) -> None:
    module, reference, x = network(), network(), batch(8)
    model = Plain(module, replicas)
    reducer = Reducer(replicas.data, model.chunks())
    model.attach(reducer)
    for _ in range(3):
        for p in module.parameters():
            if p.grad is not None:
                p.grad.zero_()  # set_to_none=False: autograd adds into the bucket itself
        model.backward(mean_losses(module, mine(x, replicas), 2))
        reducer.wait()
    model.backward(mean_losses(module, mine(x, replicas), 2))  # and without zeroing, it adds up
    reducer.wait()
    for loss in mean_losses(reference, x, 1) * 2:
        loss().backward()
    for p, q in zip(module.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@ranks(2)
def test_a_gradient_that_one_replica_lacks_counts_as_zeros_and_one_that_all_lack_stays_none(replicas: Any) -> None:
    module = nn.ModuleDict({name: nn.Linear(3, 3).double() for name in ("both", "first", "nobody", "early")})
    model = Plain(module, replicas)
    reducer = Reducer(replicas.data, model.chunks(), bucket_bytes=1)
    model.attach(reducer)
    x = torch.ones(1, 3, dtype=torch.float64)
    for _ in range(2):
        module.zero_grad()

        def last() -> Tensor:
            out = module["both"](x)
            return (module["first"](out) if replicas.data.index == 0 else out).sum()

        model.backward([lambda: module["early"](x).sum(), last])  # the last microbatch does not touch `early`
        reducer.wait()
        assert module["nobody"].weight.grad is None and module["nobody"].bias.grad is None
        assert torch.equal(module["first"].bias.grad, torch.full((3,), 0.5, dtype=torch.float64))
        assert torch.equal(module["early"].bias.grad, torch.ones(3, dtype=torch.float64))
        everywhere = replicas.data.allgather(module["both"].weight.grad.view(1, 9))
        assert torch.equal(everywhere[0], everywhere[1])


@ranks(2)
def test_each_dtype_travels_and_strides_are_kept(replicas: Any) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    module = nn.ParameterDict({f"of_{str(d)[6:]}": nn.Parameter(torch.ones(3, 2, dtype=d)) for d in dtypes})
    module["channels_last"] = nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
    module["transposed"] = nn.Parameter(torch.ones(4, 5).t())
    model = Plain(module, replicas)
    reducer = Reducer(replicas.data, model.chunks())
    model.attach(reducer)
    factor = float(1 + 2 * replicas.data.index)  # 1 and 3: the average is 2
    for _ in range(2):
        model.module.zero_grad()
        model.backward([lambda: sum((p * factor).real.float().sum() for p in module.values())])
        reducer.wait()
        for p in module.values():
            assert p.grad.dtype == p.dtype and p.grad.stride() == p.stride()
            assert torch.equal(p.grad, torch.full_like(p, 2.0))


@ranks(2)
def test_bfloat16_gradients_are_added_in_float32(replicas: Any) -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2)]
    reducer = Reducer(replicas.data, [[("p", p)]])
    reducer.arm(0)
    (p * values[replicas.data.index]).sum().backward()
    reducer.flush(0)
    reducer.wait()
    assert torch.equal(p.grad, torch.stack(values).float().mean(0).bfloat16())


@ranks(2)
def test_sparse_gradients_become_dense(replicas: Any) -> None:
    table = nn.Embedding(6, 2, sparse=True)
    model = Plain(table, replicas)
    reducer = Reducer(replicas.data, model.chunks())
    model.attach(reducer)
    model.backward([lambda: table(torch.tensor([0, 1 + replicas.data.index])).sum()])
    reducer.wait()
    assert table.weight.grad.tolist() == [[1, 1], [0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0], [0, 0]]


@ranks(2)
def test_compression_halves_the_bits_within_its_bound(replicas: Any) -> None:
    values = [torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    exact = torch.stack(values).double().mean(0)
    largest = torch.stack(values).abs().amax(0).double()
    for wire, unit in ((Compression.none, 2.0**-23), (Compression.fp16, 2.0**-11), (Compression.bf16, 2.0**-8)):
        p = nn.Parameter(torch.zeros(5000))
        reducer = Reducer(replicas.data, [[("p", p)]], compression=wire)
        reducer.arm(0)
        (p * values[replicas.data.index]).sum().backward()
        reducer.flush(0)
        reducer.wait()
        assert p.grad.dtype is torch.float32
        error = (p.grad.double() - exact).abs()
        # Each value is rounded when it leaves, and the mean when it returns; 1e-7: half floats have a smallest step.
        assert bool((error <= 2 * unit * largest + 1e-7).all())
        assert wire is Compression.none or error.max() > 0


@ranks(2)
def test_parameters_frozen_and_unfrozen_between_steps_are_followed(replicas: Any) -> None:
    module = network()
    model = Plain(module, replicas)
    reducer = Reducer(replicas.data, model.chunks())
    model.attach(reducer)
    for frozen in ((0,), (), (2, 4)):
        for number, layer in enumerate(module):
            layer.requires_grad_(number not in frozen)
        module.zero_grad()
        model.backward(mean_losses(module, mine(batch(8), replicas), 2))
        reducer.wait()
        reference = network()
        for loss in mean_losses(reference, batch(8), 1):
            loss().backward()
        for (name, p), q in zip(module.named_parameters(), reference.parameters()):
            if int(name[0]) in frozen:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@ranks(2)
def test_two_models_reduce_at_the_same_time_under_the_same_names(replicas: Any) -> None:
    pair = [(Plain(m, replicas), m) for m in (network(), network())]
    reducers = [Reducer(replicas.data, model.chunks()) for model, _ in pair]
    for (model, module), reducer, scale in zip(pair, reducers, (1.0, 2.0)):
        model.attach(reducer)
        model.backward(mean_losses(module, mine(batch(8), replicas) * scale, 1))
    for reducer in reversed(reducers):
        reducer.wait()
    for (_, module), scale in zip(pair, (1.0, 2.0)):
        reference = network()
        for loss in mean_losses(reference, batch(8) * scale, 1):
            loss().backward()
        torch.testing.assert_close(gradients(module), gradients(reference), rtol=1e-12, atol=1e-12)


@ranks(2)
def test_replicas_with_different_parameters_are_refused(replicas: Any) -> None:
    module = nn.Linear(3, 2 + replicas.data.index)
    with pytest.raises(ValueError, match=r"replicas differ: data index . has \('weight', \(., 3\).*same model"):
        Reducer(replicas.data, [list(module.named_parameters())])


@ranks(2)
def test_misuse_between_train_step_and_step_is_refused_with_a_sentence(replicas: Any) -> None:
    module, x = network(), batch(4)
    model = Plain(module, replicas)
    optimizer = DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model)
    model.backward(mean_losses(module, x, 2))
    with pytest.raises(ValueError, match="train_step was called twice"):
        model.backward(mean_losses(module, x, 2))
    optimizer.zero_grad()  # drops what is under way
    module_before = copy.deepcopy(module.state_dict())
    model.backward(mean_losses(module, x, 2))
    module.zero_grad()
    with pytest.raises(ValueError, match="bias: its gradient was removed or replaced"):
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), module_before)


# ---- what is the same on one process


def test_a_second_train_step_without_a_step_is_refused_on_one_process_too(alone: Any) -> None:
    reducer = Reducer(alone.data, Plain(network(), alone).chunks())
    reducer.arm(0)
    reducer.flush(0)
    with pytest.raises(ValueError, match=r"train_step was called twice without optimizer.step\(\).*microbatches"):
        reducer.arm(0)
    reducer.wait()
    reducer.arm(0)
    with pytest.raises(ValueError, match="before the last backward pass"):
        reducer.wait()


def test_with_one_replica_gradients_are_left_where_autograd_put_them(alone: Any) -> None:
    module = network()
    model = Plain(module, alone)
    reducer = Reducer(alone.data, model.chunks())
    model.attach(reducer)
    model.backward(mean_losses(module, batch(4), 1))
    before = [p.grad.data_ptr() for p in module.parameters()]
    reducer.wait()
    assert [p.grad.data_ptr() for p in module.parameters()] == before


def test_buckets_fill_backwards_one_dtype_each_and_leave_in_the_order_in_which_they_are_full() -> None:
    kinds = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float64, torch.float32]
    named = [(str(i), nn.Parameter(torch.zeros(4, dtype=kind))) for i, kind in enumerate(kinds)]  # 16 or 32 bytes

    def names(bucket_bytes: int | None) -> list[list[str]]:
        return [[name for name, _ in bucket] for bucket in grouped(named, bucket_bytes)]

    assert names(32) == [["4"], ["5", "3"], ["2"], ["1", "0"]]
    assert names(1) == [["5"], ["4"], ["3"], ["2"], ["1"], ["0"]]
    assert names(None) == [["5", "3", "1", "0"], ["4", "2"]]


# ---- the optimizer


@ranks(2)
def test_the_optimizer_trains_as_one_process_does_with_clipping_and_momentum(replicas: Any) -> None:
    module, reference, x = network(), network(), batch(12)
    model = Plain(module, replicas, chunks=2)
    optimizer = DistributedOptimizer(torch.optim.AdamW(module.parameters(), lr=0.05), model, clip=0.3, bucket_bytes=200)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.05)
    for _ in range(5):
        model.backward(mean_losses(module, mine(x, replicas), 3))
        optimizer.step()
        optimizer.zero_grad()
        for loss in mean_losses(reference, x, 1):
            loss().backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(optimizer.norm, norm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-12, atol=1e-12)


@ranks(2)
def test_clipping_right_after_the_backward_passes_waits_for_the_averages(replicas: Any) -> None:
    module, reference, x = network(), network(), batch(8)
    model = Plain(module, replicas)
    optimizer = DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model)
    for loss in mean_losses(reference, x, 1):
        loss().backward()
    model.backward(mean_losses(module, mine(x, replicas), 1))
    norm = clip_grad_norm_(model, 0.1)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1), rtol=1e-12, atol=0)
    optimizer.step()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-12, atol=1e-12)


@ranks(2)
def test_the_users_optimizer_keeps_its_class_and_state_and_schedules_see_it(replicas: Any) -> None:
    module, x = network(), batch(4)
    adam = torch.optim.Adam(module.parameters(), lr=0.1)
    module(x).sum().backward()
    adam.step()
    module.zero_grad()
    model = Plain(module, replicas)
    optimizer = DistributedOptimizer(adam, model)
    assert optimizer.inner is adam and type(optimizer.inner) is torch.optim.Adam
    assert optimizer.state[module[0].weight]["step"] == 1
    assert optimizer.defaults["lr"] == 0.1 and isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=5)
    model.backward(mean_losses(module, x, 1))
    optimizer.step()
    schedule.step()
    assert adam.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    assert adam.state[module[0].weight]["step"] == 2
    stateful = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(stateful)
    torch.testing.assert_close(optimizer.state_dict()["state"], adam.state_dict()["state"])


@ranks(2)
def test_a_grad_scaler_sees_averages_and_all_ranks_skip_the_same_steps(replicas: Any) -> None:
    module, reference, x = network(torch.float32), network(torch.float32), batch(8, torch.float32)
    model = Plain(module, replicas)
    optimizer = DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for loss in mean_losses(reference, x, 1):
        loss().backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    model.backward([lambda loss=loss: scaler.scale(loss()) for loss in mean_losses(module, mine(x, replicas), 1)])
    scaler.step(optimizer)  # unscales, and must not do so before the averages are there
    scaler.update()
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    optimizer.zero_grad()
    spoilt = torch.inf if replicas.data.index == 0 else 1.0
    model.backward([lambda loss=loss: scaler.scale(loss()) * spoilt for loss in mean_losses(module, x, 1)])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    torch.testing.assert_close(module.state_dict(), reference.state_dict())


@ranks(2)
def test_an_overflow_on_one_tensor_rank_is_shared(shards: Any) -> None:
    module = nn.Linear(2, 2)
    model = Plain(module, shards)
    optimizer = DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model)
    for overflow in (False, True):
        model.backward([lambda: module(torch.ones(1, 2)).sum()])
        if overflow and shards.tensor.index == 1:
            module.bias.grad[0] = torch.nan
        optimizer.share_overflow()
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters()) is not overflow
        optimizer.zero_grad()


@ranks(2)
def test_a_new_optimizer_for_the_same_model_takes_over_and_frees_the_old_ones_buckets(replicas: Any) -> None:
    module, x = network(), batch(8)
    model = Plain(module, replicas)
    for _ in range(3):
        optimizer = DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model)
        model.backward(mean_losses(module, mine(x, replicas), 1))
        optimizer.synchronize()
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in module.parameters())
        optimizer.zero_grad()


def test_what_cannot_be_right_is_refused_with_a_sentence(alone: Any) -> None:
    module, other = network(), nn.Linear(2, 9)
    model = Plain(module, alone)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(sgd, model)
    with pytest.raises(ValueError, match=r"step\(closure\) is not possible.*model.train_step"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        DistributedOptimizer(torch.optim.LBFGS(module.parameters()), model)
    with pytest.raises(ValueError, match="DistributedOptimizer already"):
        DistributedOptimizer(optimizer, model)
    with pytest.raises(ValueError, match=r"parameter 1 of group 1, of shape \(9,\).*after hp.parallelize"):
        both = [{"params": list(module.parameters())}, {"params": [module[0].bias, other.bias][1:]}]
        both[1]["params"].insert(0, both[0]["params"].pop())
        DistributedOptimizer(torch.optim.SGD(both, lr=0.1), model)
    with pytest.raises(ValueError, match=r"lacks 2 of the model's parameters \(4.weight, 4.bias\)"):
        DistributedOptimizer(torch.optim.SGD(module[:4].parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="hybridpar's own Compression"):
        DistributedOptimizer(sgd, model, compression="fp16")
    with pytest.raises(ValueError, match="clip=0: the largest norm is positive"):
        DistributedOptimizer(sgd, model, clip=0)


def test_frozen_parameters_may_stay_out_and_come_in_later(alone: Any) -> None:
    module = network()
    module[4].requires_grad_(False)
    model = Plain(module, alone)
    optimizer = DistributedOptimizer(torch.optim.SGD(module[:4].parameters(), lr=0.1), model)
    module[4].requires_grad_(True)
    optimizer.add_param_group({"params": module[4].parameters(), "lr": 0.5})
    assert optimizer.inner.param_groups[1]["lr"] == 0.5
    before = module[4].bias.clone()
    model.backward(mean_losses(module, batch(4), 1))
    optimizer.step()
    torch.testing.assert_close(module[4].bias, before - 0.5 * module[4].bias.grad)
    with pytest.raises(ValueError, match="parameter 0 of group 0"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2))})


# ---- Horovod's own optimizer


@ranks(2)
def test_horovods_own_optimizer_over_microbatches_trains_as_one_process_does(replicas: Any) -> None:
    import horovod.torch as hvd

    module, reference, x = network(), network(), batch(12)
    model = Plain(module, replicas)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        named_parameters=list(module.named_parameters()),
        backward_passes_per_step=3,
    )
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model.backward(mean_losses(module, mine(x, replicas), 3))
        optimizer.synchronize()
        norm = clip_grad_norm_(model, 0.3)
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
        for loss in mean_losses(reference, x, 1):
            loss().backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.3), rtol=1e-12, atol=0)
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-12, atol=1e-12)


# ---- the tensor axis: shares of gradients, and norms of what is cut

SPECS = {
    "rows": cut("rows", (7, 3), 0, [[(0, 4)], [(4, 7)]]),
    "columns": cut("columns", (2, 6), 1, [[(0, 2), (4, 5)], [(2, 4), (5, 6)]]),
    "shared": cut("shared", (6, 2), 0, [[(0, 4)], [(2, 6)]]),
    "whole": Spec("whole", (5,)),
    "partial": Spec("partial", (4,), partial=True),
}


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(spec.shape, dtype=torch.float64, generator=generator) for name, spec in SPECS.items()}


def part(x: Tensor, spec: Spec, index: int) -> Tensor:
    if spec.dim is None:
        return x
    return torch.cat([x.narrow(spec.dim, a, b - a) for a, b in spec.held(index)], spec.dim)


def sharded(index: int) -> nn.ParameterDict:
    return nn.ParameterDict({n: nn.Parameter(part(x, SPECS[n], index).clone()) for n, x in wholes().items()})


@ranks(2)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, float("inf")])
def test_the_norm_over_shards_is_torchs_norm_of_the_whole(shards: Any, norm_type: float) -> None:
    module = sharded(shards.tensor.index)
    model = Plain(module, shards, SPECS)
    reference = nn.ParameterDict({name: nn.Parameter(x) for name, x in wholes().items()})
    for p in [*module.values(), *reference.values()]:
        p.grad = p.detach().clone()
    want = nn.utils.clip_grad_norm_(reference.values(), 0.5, norm_type)
    torch.testing.assert_close(clip_grad_norm_(model, 0.5, norm_type), want, rtol=1e-12, atol=0)
    for name, p in module.items():
        clipped = part(reference[name].grad, SPECS[name], shards.tensor.index)
        torch.testing.assert_close(p.grad, clipped, rtol=1e-12, atol=0)


@ranks(2)
def test_norms_that_are_not_finite_are_known_to_all_ranks(shards: Any) -> None:
    module = sharded(shards.tensor.index)
    model = Plain(module, shards, SPECS)
    for bad in (torch.inf, torch.nan):
        for norm_type in (2.0, float("inf")):
            for p in module.values():
                p.grad = torch.ones_like(p)
            if shards.tensor.index == 1:
                module["rows"].grad[0, 0] = bad
            norm = clip_grad_norm_(model, 1.0, norm_type)
            assert not norm.isfinite() and bool(norm.isnan()) == (bad != torch.inf)
            assert bool((module["whole"].grad == 0).all()) == (bad == torch.inf)  # as torch: zero, or undefined
    for p in module.values():
        p.grad = None
    assert grad_norm(model) == 0
    with pytest.raises(ValueError, match="norm_type=0: a norm's exponent is positive"):
        grad_norm(model, 0)


def share(module: nn.ParameterDict, name: str, index: int) -> Tensor:
    """A loss whose gradient at `index` is a share of 3 (partial) or of each holder's (overlap)."""
    return (module[name] * (1.0 + index)).sum()


@ranks(4)
@pytest.mark.parametrize("horovods", [False, True])
def test_shares_are_summed_along_the_tensor_axis_before_replicas_are_averaged(shards: Any, horovods: bool) -> None:
    import horovod.torch as hvd

    index, replica = shards.tensor.index, shards.data.index
    module = sharded(index)
    model = Plain(module, shards, SPECS)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    named = list(module.named_parameters())
    optimizer: Any = (
        hvd.DistributedOptimizer(sgd, named_parameters=named, backward_passes_per_step=2)
        if horovods
        else DistributedOptimizer(sgd, model)
    )
    losses = [lambda: (1 + replica) * sum(share(module, name, index) for name in SPECS)] * 2  # replicas: 1, 2
    for kept in (1, 2):
        model.backward(losses)
        optimizer.synchronize()
        torch.testing.assert_close(module["partial"].grad, torch.full((4,), kept * 2 * 3 * 1.5).double())
        rows = [3.0, 3.0, 9.0, 9.0] if index == 0 else [9.0, 9.0, 6.0, 6.0]  # the middle is held by both
        torch.testing.assert_close(module["shared"].grad[:, 0], kept * torch.tensor(rows).double())
        torch.testing.assert_close(module["whole"].grad[0], torch.tensor(kept * 2 * 1.5 * (1.0 + index)).double())


@ranks(4)
@pytest.mark.parametrize("horovods", [False, True])
def test_a_share_that_one_tensor_rank_lacks_is_zeros_and_nobody_waits_for_ever(shards: Any, horovods: bool) -> None:
    import horovod.torch as hvd

    index = shards.tensor.index
    names = ["a", "b", "c", "d", "e"]
    specs = {name: Spec(name, (3,), partial=True) for name in names}
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(3)) for name in names})
    model = Plain(module, shards, specs)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    named = list(module.named_parameters())
    optimizer: Any = (
        hvd.DistributedOptimizer(sgd, named_parameters=named, backward_passes_per_step=2)
        if horovods
        else DistributedOptimizer(sgd, model)
    )
    used = {0: ["a", "b", "e"], 1: ["b", "c"]}[index]  # in the last microbatch

    def chained(first: list[str]) -> Tensor:
        x = torch.ones(3)
        for name in first:
            x = x + module[name]
        return x.sum()

    for _ in range(2):
        optimizer.zero_grad()
        model.backward([lambda: chained(["e"]), lambda: chained(used)])
        optimizer.synchronize()
        got = {name: None if p.grad is None else p.grad[0].item() for name, p in module.items()}
        assert got == {"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.0 if horovods else None, "e": 3.0}
