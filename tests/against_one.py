"""A module cut over the tensor axis, held against the plain one in the same process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import hybridpar as hp
from hybridpar.seeds import Draw
from hybridpar.shard import Spec
from hybridpar.tensor.plan import Applied, apply
from hybridpar.wires.axis import Alone, Axis
from hybridpar.wires.world import World

# fp64: one addition is right to 1e-16, and the sums here have some thousands of terms in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def opened_alone(seed: int = 0) -> World:
    """A world of this process alone, whether or not mpirun has started it."""
    from hybridpar.wires.boot import start_mpi

    start_mpi()  # before mpi4py: an MPI from PyPI has to be told where it is
    from mpi4py import MPI

    return hp.init(comm=MPI.COMM_SELF, seed=seed)


def tensor_axis() -> Axis:
    """All ranks of the test as one tensor axis."""
    from mpi4py import MPI

    from hybridpar.wires.mpi import MpiAxis

    torch.set_num_threads(1)
    return MpiAxis(MPI.COMM_WORLD.Dup(), "tensor", synchronous=True)


def whole(shard: Tensor, spec: Spec, axis: Axis) -> Tensor:
    """The whole tensor whose parts, or of a partial one whose shares, lie along `axis`."""
    x = torch.zeros(spec.shape, dtype=shard.dtype)
    if spec.dim is None:
        return axis.allreduce(x.copy_(shard)) if spec.partial else x.copy_(shard)
    held = spec.held(axis.index)
    for (start, stop), piece in zip(held, shard.split([b - a for a, b in held], spec.dim)):
        x.narrow(spec.dim, start, stop - start).copy_(piece)
    return axis.allreduce(x)


Run = Callable[[nn.Module, Applied, Axis], Tensor]


def compare(model: nn.Module, plan: Mapping[str, str], axis: Axis, run: Run, sequence: bool = False) -> None:
    """`run` gives one number for a model; it, all gradients and all parameters must equal those of one process.

    `run` sees the plain model too, with its dropouts replaced: masks are the same on one rank and on many.
    """
    results = []
    for one, along, cut in ((deepcopy(model), Alone("tensor"), False), (deepcopy(model), axis, sequence)):
        draw = Draw(seed=5)
        applied = apply(one, plan, along, draw, cut)
        draw.samples = torch.tensor([11, 4, 7])
        value = run(one, applied, along)
        value.backward()
        results.append((value.detach(), dict(one.named_parameters()), applied))
    (value, plain, _), (cut_value, sharded, applied) = results
    torch.testing.assert_close(cut_value, value, **CLOSE)
    assert set(sharded) == set(plain) == set(applied.specs)
    for name, p in plain.items():
        spec = applied.specs[name]
        assert tuple(sharded[name].shape) == spec.local_shape(axis.index), name
        told = f"gradient of {name}: {{}}".format
        torch.testing.assert_close(whole(sharded[name].grad, spec, axis), p.grad, **CLOSE, msg=told)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal fp64 numbers, the same on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(make: Callable[[], Any], seed: int = 0) -> Any:
    """A module in fp64 with the same weights on every rank."""
    torch.manual_seed(seed)
    return make().double()
