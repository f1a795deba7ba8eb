"""`hp.parallelize`: an unmodified module becomes this rank's part of a parallel model.

same weights everywhere?  ->  costs, boundaries  ->  tensor plan  ->  stages  ->  ties  ->  ParallelModel
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hybridpar.budgeted import fit, planned
from hybridpar.engine import Named, ParallelModel
from hybridpar.fill.allocate import allocate
from hybridpar.fill.fill import Weights, agree, fill, held
from hybridpar.fill.recipe import record
from hybridpar.fill.seed import Init
from hybridpar.loss import LossFunction, WeightedLoss
from hybridpar.optim.precision import casting
from hybridpar.pipeline.budget import Budget
from hybridpar.pipeline.executor import Executor
from hybridpar.pipeline.partition import level, partition
from hybridpar.pipeline.schedule import build, read
from hybridpar.pipeline.ties import Tie, Ties
from hybridpar.proof.point import listener
from hybridpar.seeds import Draw
from hybridpar.skeleton.cut import Skeleton
from hybridpar.skeleton.stage import SkeletonStage
from hybridpar.split import Chain, Stage
from hybridpar.support import Combination
from hybridpar.support import check as supported
from hybridpar.tensor.derive import derive
from hybridpar.tensor.patterns import regions
from hybridpar.tensor.plan import Applied, apply
from hybridpar.tensor.recompute import kind, recomputed, switched
from hybridpar.tensor.recurrent import unstacked
from hybridpar.tensor.synced import synchronise
from hybridpar.tensor.uncompiled import check, leave_out
from hybridpar.wires.axis import Axis
from hybridpar.wires.message import Mailbox

if TYPE_CHECKING:
    from hybridpar.wires.world import World


def parallelize(
    module: nn.Module,
    mesh: World,
    loss: LossFunction | None = None,
    *,
    schedule: str = "1f1b",
    chunks: int | None = None,
    plan: Mapping[str, str] | None = None,
    chain: Sequence[str] | None = None,
    stages: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    example: Any = None,
    sequence: bool = False,
    weights: Weights | None = None,
    init: Init | None = None,
    precision: str | None = None,
    recompute: str | Sequence[str] | Budget | None = None,
) -> ParallelModel:
    """Spread `module`, built alike on every rank, over the mesh.

    `loss(output, targets)` returns the mean over the samples, or is `hp.CrossEntropy()`.
    `schedule` is "gpipe", "1f1b", "interleaved" (with `chunks` stages on each rank, 2 by default) or the path of a CSV
    file. `plan` says what is cut along the tensor axis and `chain` in which order the parts call one another; both
    default to the module's attributes `tensor_plan` and `chain`. Stages are balanced over `costs` (one number per part
    of the chain), or over seconds measured on `example` inputs, or over an estimate; `stages` gives the number of parts
    in each stage instead. `sequence` also cuts what lies between the cut layers, along the tokens.
    `precision` is "bf16" or "fp16": what torch's autocast computes in, with fp32 weights (docs/precision.md).
    `recompute` names modules that keep their inputs only until the backward pass: "full" (every block), a pattern such
    as "blocks.*.mlp", or several; `hp.Budget("2 GB")` chooses blocks, by watching an `example` that is one microbatch's
    inputs (docs/recompute.md).

    A module built under `torch.device("meta")` is given its values here, each rank its own shards only: `weights` is a
    seed, a state dict, or the path of safetensors (a file, a folder or an index), or (one of these, a seed for what it
    lacks). `init(name, module)` initialises what the module's own reset_parameters do not (docs/big.md).

    Raises ValueError, with the numbers and a way out, for what cannot be cut.

    Example:
        >>> mesh = hp.init(tensor=2, pipeline=2)                                    # doctest: +SKIP
        >>> model = hp.parallelize(GPT(...), mesh, loss=hp.CrossEntropy())          # doctest: +SKIP
        >>> print(model.report)                                                     # doctest: +SKIP
    """
    check(module, mesh.pipeline.size)
    degrees = mesh.mesh
    asked = Combination(degrees.tensor, degrees.pipeline, degrees.data, kind(recompute), precision=precision)
    supported(asked)
    _same_everywhere(module, mesh.everyone)
    cast = casting(precision, module, mesh.device)
    module, loss, example = listener().parallelizes(module, loss, example, mesh, weights, init)
    agree(weights, mesh.everyone)
    recipes = record(module)
    chunks = chunks or (2 if schedule == "interleaved" else 1)
    custom = schedule.endswith(".csv")
    if mesh.pipeline.size == 1 and not custom:
        build(schedule, 1, 1, chunks)  # refuses here what it would refuse on many ranks
        schedule, chunks = "1f1b", 1  # one rank, one stage
    homes = (read(schedule) if custom else build(schedule, mesh.pipeline.size, 1, chunks)).stage_ranks
    draw = Draw(mesh.seed)
    plan = plan if plan is not None else getattr(module, "tensor_plan", None)
    pieces = _pieces(module, len(homes), chain, example, plan, draw)
    if isinstance(pieces, Skeleton):
        pieces.check(mesh.replica.objects(pieces.order))
    bounds, spent = _bounds(pieces, homes, mesh, stages, costs, example)
    plan = _plan(module, plan, mesh.tensor.size, sequence)
    applied = apply(module, plan, mesh.tensor, draw, sequence)
    synced = synchronise(module, mesh.peers)
    leave_out(module)
    budget = recompute if isinstance(recompute, Budget) else None
    step = None if budget is None else planned(budget, schedule, mesh.pipeline.size, chunks)
    switch = None if budget is None else switched(module, len(homes))
    again = () if isinstance(recompute, Budget) else recomputed(module, recompute, len(homes))  # budgets choose later
    all_stages = pieces.stages(module, bounds)
    mailbox = Mailbox(mesh.pipeline, mesh.device)
    mine = {s: stage for s, stage in enumerate(all_stages) if homes[s] == mesh.pipeline.index}
    first, ties = _tie(all_stages, homes, mesh.pipeline.index, applied.tied)
    allocate(mine.values(), mesh.device)
    fill(recipes, held(mine.values(), applied), mesh.tensor.index, weights, init)
    owned = [_owned(stage, first, applied.tied) for stage in mine.values()]
    executor = Executor(mine, mailbox, mesh.pipeline.index, Ties(ties, mailbox), draw, len(ties), cast)
    model = ParallelModel(
        world=mesh,
        stages=mine,
        owned=owned,
        applied=applied,
        homes={name: homes[s] for s, name in sorted(first.values(), key=lambda owner: owner[0])},
        buffers={name: homes[s] for s, stage in reversed([*enumerate(all_stages)]) for name, _ in stage.kept()},
        executor=executor,
        schedules=lru_cache(lambda m: build(schedule, mesh.pipeline.size, m, chunks).validate()),
        draw=draw,
        loss=None if loss is None else WeightedLoss(loss, mesh.tensor, lambda: applied.logits),
        report=_report(all_stages, homes, spent, bounds, applied, mesh, again),
        in_step=synced > 0,
        asked=asked,
        reads_batches=any(s in (0, len(homes) - 1) or isinstance(stage, SkeletonStage) for s, stage in mine.items()),
    )
    if budget is not None and step is not None and switch is not None:
        model.report += "\n" + fit(budget, switch, mine, executor, step, mesh, example)
    listener().parallelized(model)
    return model


def _same_everywhere(module: nn.Module, everyone: Axis) -> None:
    """Raise where ranks have built different modules, or the same with other weights."""
    mine = {name: (tuple(t.shape), _hash(t)) for name, t in module.state_dict().items()}
    for rank, other in enumerate(everyone.objects(mine)):
        if other.keys() != mine.keys():
            name = sorted(other.keys() ^ mine.keys())[0]
            raise ValueError(f"ranks {everyone.index} and {rank} have built different modules: only one has {name}")
        for name, (shape, value) in mine.items():
            if other[name] != (shape, value):
                raise ValueError(
                    f"{name} differs between ranks {everyone.index} and {rank}: build the module after "
                    "hp.init(seed=...) and alike on all ranks, or load the same weights before hp.parallelize"
                )


def _hash(t: torch.Tensor) -> int:
    if t.is_meta:
        return 0
    flat = t.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0


def _plan(module: nn.Module, plan: Mapping[str, str] | None, tensor: int, sequence: bool) -> Mapping[str, str]:
    """What is cut over the tensor axis: what the user or the module says in `plan`, else what is sure to be right."""
    if plan is not None or tensor == 1:
        return plan or {}
    if sequence:
        raise ValueError(
            f"sequence=True needs a tensor plan that says what sees a piece of the tokens, and {type(module).__name__} "
            "brings none: give plan={...}, or leave sequence out"
        )
    return derive(module, tensor)


def _pieces(
    module: nn.Module,
    stages: int,
    chain: Sequence[str] | None,
    example: Any,
    plan: Mapping[str, str] | None,
    draw: Draw,
) -> Chain | Skeleton:
    """How the module can be cut: by its chain, if it or the user names one, else by watching its forward."""
    closed = regions(plan or {}, [name for name, _ in module.named_modules(remove_duplicate=False)])
    if stages > 1 and chain is None and not isinstance(module, nn.Sequential) and not hasattr(module, "chain"):
        return Skeleton(module, stages, example, closed)
    found = Chain(module, stages, chain, lambda units: unstacked(units, draw))
    for unit, name in product(found.labels, closed):
        if unit != name and unit.startswith(f"{name}.".lstrip(".")):
            raise ValueError(
                f'the tensor plan has {name or "the model itself"} run as one piece (style "space"), and a pipeline '
                f"stage may begin at its part {unit}: give the style to smaller modules, or set pipeline=1"
            )
    return found


def _bounds(
    pieces: Chain | Skeleton,
    homes: Sequence[int],
    mesh: World,
    stages: Sequence[int] | None,
    costs: Sequence[float] | None,
    example: Any,
) -> tuple[tuple[int, ...], list[float]]:
    """Where each stage begins among the parts, with the end; and what each part costs."""
    count, parts = len(homes), len(pieces.labels)
    if count == 1:
        return (0, 1), [1.0]
    if stages is not None:
        if len(stages) != count or sum(stages) != parts or min(stages) < 1:
            raise ValueError(
                f"stages={list(stages)} must be {count} numbers of at least 1 that add up to the {parts} parts that "
                f"can be cut: {', '.join(pieces.labels)}"
            )
        return tuple(sum(stages[:s]) for s in range(count + 1)), pieces.costs
    if costs is not None and len(costs) != parts:
        raise ValueError(f"costs has {len(costs)} numbers and there are {parts} parts: {', '.join(pieces.labels)}")
    if costs is not None:
        found = [float(c) for c in costs]
    elif example is not None and isinstance(pieces, Chain) and not pieces.empty:
        # One rank measures: two on one machine would slow each other, and all must cut alike.
        found = mesh.everyone.objects(pieces.measured(example) if mesh.rank == 0 else None)[0]
    else:
        found = pieces.costs
    exact = partition(found, count)
    return (level(found, exact, homes) if count > mesh.pipeline.size else exact), found


AnyStage = Stage | SkeletonStage
Owner = tuple[int, str]  # the first stage that uses a parameter, and the parameter's name


def _tie(
    all_stages: Sequence[AnyStage], homes: Sequence[int], here: int, tied: Mapping[str, str]
) -> tuple[dict[int, Owner], list[Tie]]:
    """The owner of each parameter, by id, and a tie for each later stage that uses it too.

    Later stages of this rank are given copies. Of a parameter's several names `tied` tells the one it goes by.
    """
    first: dict[int, Owner] = {}
    ties: list[Tie] = []
    for s, stage in enumerate(all_stages):
        for name, _, p in list(stage.named()):
            owner, _ = first.setdefault(id(p), (s, tied.get(name, name)))
            if owner == s or any(t.copy_stage == s and t.owner_name == first[id(p)][1] for t in ties):
                continue
            _not_one_module(stage, p, all_stages[owner])
            copied = _replaced(stage, p) if homes[s] == here else None
            owned = p if homes[owner] == here else None
            ties.append(Tie(len(ties), first[id(p)][1], owner, s, homes[owner], homes[s], owned, copied))
    return first, ties


def _not_one_module(stage: AnyStage, p: nn.Parameter, owner: AnyStage) -> None:
    """Raise, on every rank, where it is one module that both stages call: it cannot hold both `p` and a copy."""
    others = set(map(id, owner.modules()))
    for module in stage.modules():
        if id(module) in others and any(q is p for q in module._parameters.values()):
            raise ValueError(
                f"stages {owner.number} and {stage.number} both call the same {type(module).__name__}: share its "
                "parameters between two modules instead, or cut the chain so that one stage has both calls"
            )


def _replaced(stage: AnyStage, p: nn.Parameter) -> nn.Parameter:
    """A copy of `p`, put in its place in `stage`."""
    copied = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    for module in stage.modules():
        for name, q in module._parameters.items():
            if q is p:
                module._parameters[name] = copied
    return copied


def _owned(stage: AnyStage, first: Mapping[int, Owner], tied: Mapping[str, str]) -> Named:
    """The parameters whose first use is in `stage`, each once."""
    found = {tied.get(name, name): p for name, _, p in stage.named() if id(p) in first}
    return [(name, p) for name, p in found.items() if first[id(p)] == (stage.number, name)]


def _report(
    all_stages: Sequence[AnyStage],
    homes: Sequence[int],
    costs: Sequence[float],
    bounds: Sequence[int],
    applied: Applied,
    mesh: World,
    again: Sequence[str],
) -> str:
    """How the model was cut, in words."""
    total = sum(costs)
    lines = [f"{mesh.mesh}: {len(all_stages)} stage{'s' * (len(all_stages) > 1)}"]
    for s, stage in enumerate(all_stages):
        share = sum(costs[bounds[s] : bounds[s + 1]]) / total
        numbers = sum(p.numel() for p in {id(p): p for p in stage.parameters()}.values())
        names = f"{stage.names[0] or 'the whole module'}" + (f" to {stage.names[-1]}" if len(stage.names) > 1 else "")
        place = f"  stage {s} on pipeline index {homes[s]}"
        lines.append(f"{place}: {names}; {numbers:,} parameters per rank, {share:.0%} of the cost")
    if mesh.tensor.size > 1:
        lines += [f"  whole on each tensor rank: {name} ({reason})" for name, reason in applied.replicated]
    if again:
        lines.append(f"  recomputed in the backward pass: {', '.join(again)}")
    return "\n".join(lines)
