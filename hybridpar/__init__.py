"""Hybrid parallelism for PyTorch on MPI and Horovod.

    mesh = hp.init(tensor=2, pipeline=2)
    model = hp.parallelize(MyModel(), mesh, loss=loss_fn)
    optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters()), model)
    for batch in hp.DataLoader(dataset, mesh, batch_size=64):
        loss = model.train_step(batch, microbatches=8)
        optimizer.step()
        optimizer.zero_grad()

This page is the public API; each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Budget": "hybridpar.pipeline.budget",
    "Checkpoints": "hybridpar.checkpoint.runs",
    "Compression": "hybridpar.optim.compression",
    "CrossEntropy": "hybridpar.tensor.loss",
    "DataLoader": "hybridpar.data",
    "DistributedOptimizer": "hybridpar.optim.distributed",
    "EMA": "hybridpar.optim.ema",
    "Mesh": "hybridpar.mesh",
    "ParallelModel": "hybridpar.engine",
    "Skip": "hybridpar.pipeline.skip",
    "Spec": "hybridpar.shard",
    "Watch": "hybridpar.watch.watch",
    "World": "hybridpar.wires.world",
    "clip_grad_norm_": "hybridpar.optim.clip",
    "init": "hybridpar.start",
    "load": "hybridpar.checkpoint.load",
    "parallelize": "hybridpar.assemble",
    "run": "hybridpar.launch.function",
    "save": "hybridpar.checkpoint.save",
    "verify": "hybridpar.proof.verify",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hybridpar' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
