"""The candidates that use torch alone: no communication, DDP, FSDP2, DTensor, pipelines.

torch.distributed runs on gloo. Model, batches, microbatches and optimizer are those of `work`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard, parallel
from torch.nn.parallel import DistributedDataParallel

from benchmarks.side import Seat, Side, accumulating, nobody
from benchmarks.work import Work, cross_entropy, optimizer
from hybridpar.wires.memory import keep_freed_memory


def alone(work: Work, seat: Seat) -> Side:
    """The whole batch in one process; or half of it in each of two that never meet, which is the limit."""
    return Side(seat.rank, accumulating(work, work.model(), seat.rank, seat.ranks), nobody)


def alone_kept(work: Work, seat: Seat) -> Side:
    """The same with the allocator as `hp.init` sets it."""
    keep_freed_memory()
    return alone(work, seat)


def ddp(work: Work, seat: Seat, **options: object) -> Side:
    """DistributedDataParallel; gradients are reduced in the last microbatch's backward only (`no_sync` before it)."""
    _meet(seat)
    model = DistributedDataParallel(work.model(), **options)
    return Side(seat.rank, accumulating(work, model, seat.rank, seat.ranks, quiet=model.no_sync), dist.barrier)


def ddp_tuned(work: Work, seat: Seat) -> Side:
    """DDP whose gradients are views of the buckets (no copies), in buckets small enough to overlap."""
    return ddp(work, seat, gradient_as_bucket_view=True, bucket_cap_mb=8)


def ddp_kept(work: Work, seat: Seat) -> Side:
    """DDP, tuned, with the allocator as `hp.init` sets it: what torch's users could have by the same means."""
    keep_freed_memory()
    return ddp_tuned(work, seat)


def fsdp2(work: Work, seat: Seat, keep: bool = False) -> Side:
    """FSDP2: each block and the rest cut over the ranks; gathered for each pass, `keep` from forward to backward."""
    _meet(seat)
    model, mesh = work.model(), init_device_mesh("cpu", (seat.ranks,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep)
    return Side(seat.rank, accumulating(work, model, seat.rank, seat.ranks), dist.barrier)


def fsdp2_kept(work: Work, seat: Seat) -> Side:
    return fsdp2(work, seat, keep=True)


def dtensor(work: Work, seat: Seat, sequence: bool = False) -> Side:
    """Tensor parallelism by `parallelize_module`, the loss over the cut vocabulary by `loss_parallel`.

    Cut: token embedding by vocabulary (rows), queries, keys, values and MLP up by columns, attention out and MLP
    down by rows, head by vocabulary (columns). Whole on each rank: position embedding and norms; with `sequence`
    the norms and residual sums work on half of the tokens each.
    """
    _meet(seat)
    model = work.model()
    for block in model.blocks:
        _group_heads(block.attention, seat.ranks)
    plan = _sequence_plan() if sequence else _plan()
    parallel.parallelize_module(model, init_device_mesh("cpu", (seat.ranks,)), plan)
    return Side(seat.rank, accumulating(work, model, around_loss=parallel.loss_parallel), dist.barrier)


def dtensor_sequence(work: Work, seat: Seat) -> Side:
    return dtensor(work, seat, sequence=True)


def one_f_one_b(work: Work, seat: Seat) -> Side:
    """torch.distributed.pipelining's Schedule1F1B over two stages."""
    return _pipeline(work, seat, Schedule1F1B)


def interleaved(work: Work, seat: Seat) -> Side:
    """ScheduleInterleaved1F1B, two stages on each rank."""
    return _pipeline(work, seat, ScheduleInterleaved1F1B, chunks=2)


def gpipe(work: Work, seat: Seat) -> Side:
    """torch.distributed.pipelining's ScheduleGPipe over two stages."""
    return _pipeline(work, seat, ScheduleGPipe)


def _meet(seat: Seat) -> None:
    dist.init_process_group("gloo", init_method=f"file://{seat.meeting}", rank=seat.rank, world_size=seat.ranks)


def _group_heads(attention: nn.Module, ranks: int) -> None:
    """Reorder the rows of the fused projection to q0 k0 v0 q1 k1 v1, so that a cut in two gives each rank whole heads.

    AdamW works element by element, so training is the same; one fused matrix is the fastest form for DTensor.
    """
    rows = torch.arange(attention.qkv.out_features).view(3, ranks, -1).transpose(0, 1).flatten()
    with torch.no_grad():
        for whole in (attention.qkv.weight, attention.qkv.bias):
            whole.copy_(whole[rows].clone())
    attention.heads //= ranks
    attention.kv_heads //= ranks


def _plan() -> dict[str, parallel.ParallelStyle]:
    return {
        "embed.token": parallel.RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.qkv": parallel.ColwiseParallel(),
        "blocks.*.attention.out": parallel.RowwiseParallel(),
        "blocks.*.mlp.up": parallel.ColwiseParallel(),
        "blocks.*.mlp.down": parallel.RowwiseParallel(),
        "head.project": parallel.ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def _sequence_plan() -> dict[str, parallel.ParallelStyle]:
    tokens = Shard(1)
    return {
        "embed.token": parallel.RowwiseParallel(input_layouts=Replicate()),
        "embed": parallel.PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=tokens),
        "blocks.*.attention_norm": parallel.SequenceParallel(),
        "blocks.*.attention.qkv": parallel.ColwiseParallel(input_layouts=tokens),
        "blocks.*.attention.out": parallel.RowwiseParallel(output_layouts=tokens),
        "blocks.*.mlp_norm": parallel.SequenceParallel(),
        "blocks.*.mlp.up": parallel.ColwiseParallel(input_layouts=tokens),
        "blocks.*.mlp.down": parallel.RowwiseParallel(output_layouts=tokens),
        "head.norm": parallel.SequenceParallel(),
        "head.project": parallel.ColwiseParallel(
            input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False
        ),
    }


def _pipeline(work: Work, seat: Seat, schedule: type, chunks: int = 1) -> Side:
    _meet(seat)
    total = seat.ranks * chunks
    held = {number: _stage(work, number, total) for number in range(seat.rank, total, seat.ranks)}
    stages = [PipelineStage(module, number, total, torch.device("cpu")) for number, module in held.items()]
    one = chunks == 1
    runner = schedule(stages[0] if one else stages, n_microbatches=work.microbatches, loss_fn=cross_entropy)
    adam = optimizer(p for module in held.values() for p in module.parameters())
    first, last = 0 in held, total - 1 in held

    def step(ids: Tensor, targets: Tensor) -> float | None:
        losses: list[Tensor] = []
        runner.step(*([ids] if first else []), target=targets if last else None, losses=losses if last else None)
        adam.step()
        adam.zero_grad()
        return torch.stack(losses).mean().item() if last else None

    return Side(seat.rank, step, dist.barrier)


def _stage(work: Work, number: int, stages: int) -> nn.Sequential:
    """One stage of the model, by the cut that hybridpar makes too."""
    model, cut = work.model(), work.cut(stages)
    return nn.Sequential(*[model.embed, *model.blocks, model.head][cut[number] : cut[number + 1]])
