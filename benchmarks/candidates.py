"""The candidates, and the bars that hybridpar's have to clear: data only."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = "limit"


@dataclass(frozen=True)
class Candidate:
    """`builder` is `module:function` in this package, called in each rank; `launcher` is python or mpirun."""

    name: str
    what: str
    builder: str
    ranks: int = 2
    launcher: str = "python"
    all_cores: bool = False
    learns_alone: bool = False  # its ranks never meet, so that only the first loss can be compared


@dataclass(frozen=True)
class Bar:
    """`ours` must be at least `speed` times as fast as `rival`; `bubble` says to count the rival's idle share too."""

    ours: str
    rival: str
    speed: float
    bubble: bool = False


CANDIDATES = (
    Candidate(LIMIT, "2 processes, half the batch each, no communication", "torch_sides:alone", learns_alone=True),
    Candidate(
        "limit-kept", "the same, freed memory kept as hybridpar does", "torch_sides:alone_kept", learns_alone=True
    ),
    Candidate("one", "1 process, all cores", "torch_sides:alone", ranks=1, all_cores=True),
    Candidate("data", "hybridpar, data 2 (Horovod)", "hybridpar_sides:data", launcher="mpirun"),
    Candidate("ddp", "torch DDP, default settings", "torch_sides:ddp"),
    Candidate("ddp-tuned", "torch DDP, bucket views, 8 MB buckets", "torch_sides:ddp_tuned"),
    Candidate("ddp-kept", "the same, freed memory kept as hybridpar does", "torch_sides:ddp_kept"),
    Candidate("zero1", "hybridpar, data 2, ZeRO 1", "hybridpar_sides:zero1", launcher="mpirun"),
    Candidate("zero2", "hybridpar, data 2, ZeRO 2", "hybridpar_sides:zero2", launcher="mpirun"),
    Candidate("zero3", "hybridpar, data 2, ZeRO 3", "hybridpar_sides:zero3", launcher="mpirun"),
    Candidate("fsdp2-kept", "torch FSDP2, weights kept until the backward", "torch_sides:fsdp2_kept"),
    Candidate("fsdp2", "torch FSDP2, default settings", "torch_sides:fsdp2"),
    Candidate("tensor", "hybridpar, tensor 2", "hybridpar_sides:tensor", launcher="mpirun"),
    Candidate("dtensor", "torch DTensor, loss_parallel", "torch_sides:dtensor"),
    Candidate("dtensor-seq", "the same with sequence parallelism", "torch_sides:dtensor_sequence"),
    Candidate("pipeline", "hybridpar, pipeline 2, 1F1B", "hybridpar_sides:pipeline", launcher="mpirun"),
    Candidate("interleaved", "the same, 2 stages a rank", "hybridpar_sides:interleaved", launcher="mpirun"),
    Candidate("torch-1f1b", "torch pipelining, Schedule1F1B", "torch_sides:one_f_one_b"),
    Candidate("torch-interleaved", "torch pipelining, 2 stages a rank", "torch_sides:interleaved"),
    Candidate("torch-gpipe", "torch pipelining, ScheduleGPipe", "torch_sides:gpipe"),
)

BARS = (
    Bar("data", "ddp", 1.1),
    Bar("data", LIMIT, 0.95),
    Bar("tensor", "dtensor", 1.7),
    Bar("pipeline", "torch-1f1b", 1.05),
    Bar("interleaved", "torch-1f1b", 1.05),
    Bar("pipeline", LIMIT, 0.9, bubble=True),
)
