"""Planted bugs: `hp.verify` finds each of them, and names the module and the cause.

Each is a wrong reduction, mask, slice or the like in our own code, or a mistake that users make, put in place by
pytest's monkeypatch on every rank. All run in fp32, as users do, with the fp64 run beside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hybridpar as hp
from hybridpar.proof.report import Report
from hybridpar.proof.verify import verify
from tests.ranks import ranks
from tests.trainings import changing, gpt, norms, plain_adam, training

TENSOR, PIPELINE, DATA = {"tensor": 2}, {"pipeline": 2}, {"data": 2}


def found(train: Any, cause: str, module: str, *words: str, steps: int = 1) -> Report:
    """The report on `train`, which must tell of `cause` at `module` in these words."""
    torch.set_num_threads(1)
    report = verify(train, steps)
    assert not report.equal, "the bug was not found"
    told = (report.finding.cause, report.finding.module)
    assert told == (cause, module), report.sentence
    for word in words:
        assert word in report.sentence
    return report


# ---- reductions over the tensor axis


@ranks(2)
def test_a_column_layer_that_does_not_sum_its_inputs_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.tensor import collectives

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None

    monkeypatch.setattr(collectives._Copy, "backward", staticmethod(backward))
    found(training(init=TENSOR), "missing reduction", "head.project", "never summed over the tensor axis")


@ranks(2)
def test_a_row_layer_that_does_not_sum_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.tensor import collectives, linear

    unsummed = type("Unsummed", (), {**vars(collectives), "sum_": staticmethod(lambda x, axis, fresh=False: x)})
    monkeypatch.setattr(linear, "collectives", unsummed)
    report = found(training(init=TENSOR), "missing reduction", "blocks.0.attention.out", "each rank has its own share")
    assert (report.finding.microbatch, report.finding.step) == (0, 0)


@ranks(2)
def test_a_sum_over_the_tensor_axis_that_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.tensor import collectives

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.axis.allreduce(ctx.axis.allreduce(grad.clone())), None, None

    monkeypatch.setattr(collectives._Copy, "backward", staticmethod(backward))
    found(training(init=TENSOR), "doubled reduction", "head.project", "2 times too large")


@ranks(2)
def test_shares_of_a_gradient_that_are_never_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.optim import partial

    monkeypatch.setattr(partial._Chunk, "_sum", lambda self, place: self._summed.add(place))
    train = training(init=TENSOR, sequence=True, stepper=plain_adam)
    found(train, "missing reduction", "head.norm", "never summed over the tensor axis")


@ranks(2)
def test_a_gradient_that_is_summed_where_every_rank_has_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.tensor.linear import RowLinear

    specs = RowLinear.specs
    partial = lambda self: {n: s if n == "weight" else hp.Spec(n, s.shape, partial=True) for n, s in specs(self).items()}  # noqa: E731, E501
    monkeypatch.setattr(RowLinear, "specs", partial)
    found(training(init=TENSOR, stepper=plain_adam), "doubled reduction", "blocks.1.mlp.down", "tensor axis")


@ranks(2)
def test_a_cross_entropy_that_forgets_the_other_rank_s_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.tensor.loss import CrossEntropy
    from hybridpar.wires.axis import Alone

    cut = CrossEntropy.cut

    def alone(self: Any, axis: Any, vocabulary: Any) -> Any:
        loss = cut(self, axis, vocabulary)
        quiet = Alone("tensor")
        quiet.index = axis.index
        loss._axis = quiet
        return loss

    monkeypatch.setattr(CrossEntropy, "cut", alone)
    found(training(init=TENSOR), "scaled", "", "the modules' outputs are right and the loss is")


# ---- reductions over the data axis


@ranks(2)
def test_gradients_that_are_not_averaged_over_the_replicas() -> None:
    train = training(init=DATA, stepper=plain_adam)
    found(train, "missing reduction", "head.norm", "not averaged over the data axis")


@ranks(2)
def test_gradients_that_are_summed_over_the_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.optim.compression import Wire

    monkeypatch.setattr(Wire, "start", lambda self, axis, flat, name: axis.start_allreduce(flat, "sum", name))
    found(training(init=DATA, stepper=unclipped), "doubled reduction", "head.norm", "summed over the data axis")


def unclipped(model: Any) -> torch.optim.Optimizer:
    return hp.DistributedOptimizer(plain_adam(model), model)


def _noise(gradient: torch.Tensor) -> torch.Tensor:
    return gradient + 0.01 * torch.randn_like(gradient)


@ranks(2)
def test_a_hook_that_changes_a_gradient_on_one_replica() -> None:
    def hooked(model: Any) -> None:
        if model.world.rank == 1:
            dict(model.named_parameters())["blocks.1.mlp.up.weight"].register_hook(_noise)

    words = "blocks.1.mlp.up.weight is wrong on this rank before it is averaged, and right on the others"
    report = found(training(init=DATA, prepared=hooked, stepper=unclipped), "one replica", "blocks.1.mlp.up", words)
    assert report.finding.rank == 1
    clipped = training(init=DATA, prepared=hooked)
    found(clipped, "scaled", "head.norm", "or another gradient is wrong, and with it the norm that all are clipped by")


@ranks(2)
def test_a_hook_that_changes_what_has_come_to_a_gradient() -> None:
    def added(p: torch.Tensor) -> None:
        p.grad.copy_(_noise(p.grad))

    def hooked(model: Any) -> None:
        dict(model.named_parameters())["blocks.1.mlp.up.weight"].register_post_accumulate_grad_hook(added)

    words = "give the right gradient of blocks.1.mlp.up.weight on every rank, and it is changed before"
    train = training(init=DATA, prepared=hooked, stepper=unclipped)
    found(train, "changed gradient", "blocks.1.mlp.up", words)


@ranks(2)
def test_noise_in_what_a_module_gives_on_one_replica() -> None:
    def hooked(model: Any) -> None:
        if model.world.rank == 1:
            stage = next(iter(model._stages.values()))
            block = dict(stage.named_modules())["units.0.blocks.1.mlp"]
            block.register_forward_hook(lambda module, args, output: _noise(output))

    report = found(training(init=DATA, prepared=hooked), "unknown", "blocks.1.mlp", "no signature fits")
    assert report.finding.rank == 1


@ranks(2)
def test_a_loss_that_is_averaged_over_unequal_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.loss import WeightedLoss

    monkeypatch.setattr(WeightedLoss, "weight", lambda self, targets, samples: 1.0)
    report = found(norms(init=PIPELINE, microbatches=3), "unequal microbatches", "", "count 3, 2, 2")
    assert report.finding.kind == "loss"


@ranks(2)
def test_replicas_that_count_the_same_whatever_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.company import Company

    count = Company.count

    def even(self: Any, samples: int, micros: int, weight: float) -> tuple[int, float]:
        before, _ = count(self, samples, micros, weight)
        return before, weight * self.size  # as if each replica divided by its own weight alone

    monkeypatch.setattr(Company, "count", even)
    report = verify(norms(init=DATA, microbatches=1), 1)
    assert not report.equal and report.finding.kind == "loss", report.sentence


# ---- microbatches, ties and messages


@ranks(2)
def test_a_microbatch_whose_backward_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.loss import WeightedLoss

    total, calls = WeightedLoss.total, []

    def forgetful(self: Any, output: Any, targets: Any, weight: float) -> torch.Tensor:
        calls.append(0)
        value = total(self, output, targets, weight)
        return value.detach() + 0 * value if len(calls) % 2 == 0 else value

    monkeypatch.setattr(WeightedLoss, "total", forgetful)
    report = found(training(init=PIPELINE), "missing microbatch", "head.project", "microbatch 1 is missing")
    assert report.finding.microbatch == 1


@ranks(2)
def test_a_tied_copy_whose_gradient_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.pipeline.ties import Ties

    def give(self: Any, stage: int) -> None:
        for tie in self._ties:
            if tie.copied is not None and tie.copy_stage == stage and tie.owned is None:
                self._mailbox.post(tie.owner_rank, tie.tag, [None])
                tie.copied.grad = None

    monkeypatch.setattr(Ties, "give", give)
    train = training(init=PIPELINE, stepper=plain_adam)
    report = found(train, "tied weight", "embed.token", "head.project.weight is missing")
    assert "embed.token.weight is tied to head.project.weight" in report.sentence


@ranks(2)
def test_a_tied_copy_whose_gradient_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.pipeline.ties import Ties

    give = Ties.give

    def doubled(self: Any, stage: int) -> None:
        for tie in self._ties:
            if tie.copied is not None and tie.copy_stage == stage and tie.copied.grad is not None:
                tie.copied.grad.mul_(2)
        give(self, stage)

    monkeypatch.setattr(Ties, "give", doubled)
    train = training(init=PIPELINE, stepper=plain_adam)
    found(train, "tied weight", "embed.token", "head.project.weight counts twice")


@ranks(2)
def test_a_gradient_that_is_not_sent_back_to_the_stage_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.pipeline.action import Kind
    from hybridpar.pipeline.executor import _Run

    post = _Run._post

    def zeros(self: Any, kind: Any, stage: int, micro: int, tensors: Any, value: Any) -> None:
        if kind is Kind.BACKWARD:
            tensors = [None if t is None else torch.zeros_like(t) for t in tensors]
        post(self, kind, stage, micro, tensors, value)

    monkeypatch.setattr(_Run, "_post", zeros)
    train = training(lambda: gpt(tied=False), init=PIPELINE, stepper=plain_adam)
    report = verify(train, 1)
    assert not report.equal and report.finding.rank == 0
    assert report.finding.cause == "missing" and "blocks" in report.finding.module, report.sentence


# ---- dropout


@ranks(2)
def test_replicas_that_draw_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.seeds import Draw

    local = property(lambda self: self._samples, lambda self, ids: _set(self, ids))

    def _set(self: Any, ids: torch.Tensor) -> None:
        self._samples = torch.arange(len(ids))  # each microbatch counts its samples from 0
        self._turn += 1

    monkeypatch.setattr(Draw, "samples", local)
    report = verify(training(lambda: gpt(dropout=0.3), init=DATA), 1)
    assert not report.equal and report.finding.cause == "same dropout mask", report.sentence
    assert report.finding.module == "embed.dropout"


@ranks(2)
def test_tensor_ranks_that_draw_the_same_mask_for_different_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.seeds import Draw

    keep = Draw.keep

    def blind(self: Any, site: str, shape: Any, p: float, dim: Any = None, parts: Any = (), device: Any = None) -> Any:
        return keep(self, site, shape, p, None, (), device)

    monkeypatch.setattr(Draw, "keep", blind)
    report = verify(training(lambda: gpt(dropout=0.3), init=TENSOR), 1)
    assert not report.equal and report.finding.cause == "same dropout mask", report.sentence
    assert report.finding.module == "blocks.0.attention.dropout" and "ranks 0 and 1" in report.sentence


@ranks(2)
def test_tensor_ranks_that_draw_different_masks_for_what_both_hold() -> None:
    def other_seed(model: Any) -> None:
        model._draw.seed += model.world.rank

    report = verify(training(lambda: gpt(dropout=0.3), init=TENSOR, prepared=other_seed), 1)
    assert not report.equal and report.finding.cause == "different dropout masks", report.sentence
    assert report.finding.module == "embed.dropout"


# ---- what is loaded and what is kept


@ranks(2)
def test_a_shard_that_is_cut_from_the_wrong_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.tensor import linear

    def wrong(whole: torch.Tensor, spec: hp.Spec, index: int) -> torch.Tensor:
        return take(whole, spec, (index + 1) % 2 if whole.shape == (16, 64) else index)

    take = linear.take
    monkeypatch.setattr(linear, "take", wrong)
    words = "row 0 of dim 1 should be there, and it is 32"
    report = found(training(init=TENSOR), "wrong slice", "blocks.0.mlp.down", words)
    assert report.finding.kind == "weights at the start"


@ranks(2)
def test_weights_that_begin_unequal() -> None:
    def changed(model: Any) -> None:
        if model.world.rank == 1:
            with torch.no_grad():
                dict(model.named_parameters())["blocks.1.mlp.up.weight"].add_(1e-4)

    report = found(training(init=DATA, prepared=changed), "unequal start", "blocks.1.mlp.up", "rank 1 begins")
    assert report.finding.rank == 1


@ranks(2)
@pytest.mark.parametrize("axis", ["tensor", "data"])
def test_weights_that_one_rank_changes_between_steps(axis: str) -> None:
    def pulled(model: Any) -> None:
        if model.world.rank == 1:
            with torch.no_grad():
                dict(model.named_parameters())["blocks.1.mlp.up.weight"].mul_(0.999)

    words = "rank 1 has changed blocks.1.mlp.up.weight between steps 0 and 1, and rank 0 has not"
    train = training(init={axis: 2}, stepper=changing(pulled))
    report = found(train, "unequal change of weights", "blocks.1.mlp.up", words, steps=2)
    assert (report.finding.kind, report.finding.step, report.finding.rank) == ("weights at the start", 1, 1)


@ranks(2)
def test_a_weight_that_one_rank_freezes() -> None:
    def half(model: Any) -> None:
        if model.world.rank == 1:
            dict(model.named_parameters())["blocks.0.mlp.down.weight"].requires_grad_(False)

    words = "blocks.0.mlp.down.weight is frozen on rank 1 and trained on rank 0"
    found(training(init=TENSOR, prepared=half), "unequal options", "blocks.0.mlp.down", words)


@ranks(2)
def test_a_buffer_that_is_not_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(model: Any) -> None:
        def moved(module: nn.Module, *_: Any) -> None:
            module.running_mean.data.add_(0.01)

        for stage in model._stages.values():
            for module in stage.modules():
                if isinstance(module, nn.BatchNorm1d) and model.world.rank == 1:
                    module.register_forward_hook(moved)

    found(norms(init=TENSOR, prepared=noisy), "buffer", "norm", "norm.running_mean is not synchronised: rank 1 of 2")


# ---- data and optimizers


@ranks(2)
def test_ranks_of_one_replica_that_are_given_different_batches() -> None:
    from tests.trainings import tokens

    def by_rank(step: int) -> Any:
        from mpi4py import MPI

        return tokens(step + 10 * MPI.COMM_WORLD.rank)

    report = verify(training(init=TENSOR, batches=by_rank), 1)
    assert report.finding.cause == "unequal data order"
    assert "ranks 0 and 1 are in one replica (data index 0) and were given different batches" in report.sentence


@ranks(2)
def test_a_rank_that_makes_fewer_steps() -> None:
    def train() -> None:
        from tests.trainings import tokens

        mesh = hp.init(data=2)
        model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
        optimizer = plain_adam(model)
        for step in range(2 - mesh.rank):
            model.train_step(tokens(step))
            optimizer.step()

    report = verify(train)
    assert report.finding.cause == "unequal number of steps"
    assert "rank 1 has ended its training and rank 0 goes on to step 1" in report.sentence


@ranks(2)
def test_replicas_that_are_given_the_same_samples_are_noted() -> None:
    def same(step: int) -> Any:
        from tests.trainings import tokens

        half = tuple(x[:3] for x in tokens(step))
        return tuple(torch.cat([x, x]) for x in half)

    report = verify(training(init=DATA, batches=same), 1)
    assert report.equal and "replicas 0, 1 were given the same samples" in report.notes[0]


@ranks(2)
def test_a_parameter_that_the_optimizer_never_saw() -> None:
    def forgetful(model: Any) -> Any:
        some = [p for n, p in model.named_parameters() if n != "blocks.1.mlp.down.bias"]
        return torch.optim.AdamW(some, lr=1e-2)

    train = training(init=TENSOR, stepper=forgetful)
    words = "the optimizer never saw blocks.1.mlp.down.bias"
    found(train, "parameter not in the optimizer", "blocks.1.mlp.down", words)


@ranks(2)
def test_gradients_that_are_clipped_by_the_norm_of_what_a_rank_holds() -> None:
    def clipped(model: Any, step: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    train = training(init=TENSOR, stepper=plain_adam, before_step=clipped)
    found(train, "local clipping", "head.norm", "clipped by the norm of what the rank holds")


@ranks(2)
def test_learning_rates_that_differ_between_ranks() -> None:
    def uneven(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1 * (1 + model.world.rank))

    report = verify(training(init=PIPELINE, stepper=uneven), 1)
    assert not report.equal and report.finding.cause == "unequal options", report.sentence
    assert "different learning rates: 0.1 on rank 0 and 0.2 on rank 1" in report.sentence


@ranks(2)
def test_an_optimizer_that_misses_a_step_on_one_rank() -> None:
    class Lazy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            return None

    def lazy(model: Any) -> Any:
        kind = Lazy if model.world.rank == 1 else torch.optim.SGD
        made = kind(model.parameters(), lr=0.1)
        if model.world.rank == 1:
            made.step = lambda: None
        return made

    report = verify(training(init=PIPELINE, stepper=lazy), 2)
    assert not report.equal and report.finding.cause == "no optimizer step", report.sentence
    assert report.finding.rank == 1


@ranks(2)
def test_an_optimizer_that_looks_at_whole_tensors_and_is_given_shards() -> None:
    class Normed(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad / p.grad.norm().clamp(min=1e-3), alpha=group["lr"])

    def normed(model: Any) -> Any:
        return Normed(model.parameters(), lr=0.1)

    report = verify(training(init=TENSOR, stepper=normed), 1)
    assert not report.equal and report.finding.cause == "update", report.sentence
    assert report.finding.kind == "updated parameters"


@ranks(4, timeout=120)
def test_bugs_are_found_on_meshes_of_two_axes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridpar.optim import partial

    both = {"tensor": 2, "pipeline": 2}
    found(training(init={"data": 2, "tensor": 2}, stepper=plain_adam), "missing reduction", "head.norm", "data axis")
    with monkeypatch.context() as patched:
        patched.setattr(partial._Chunk, "_sum", lambda self, place: self._summed.add(place))
        train = training(init=both, sequence=True, stepper=plain_adam)
        found(train, "missing reduction", "head.norm", "never summed over the tensor axis")
