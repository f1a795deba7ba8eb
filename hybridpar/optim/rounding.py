"""Weights in bf16 without a copy in fp32: a step is computed in fp32, and rounded up or down by chance.

    1.0 and a step of 0.001       bf16 has 1.0 and 1.0078 next to each other
    to the nearest                1.0, in this step and in all others
    by chance                     1.0078 in 13 of 100 steps, 1.0 in the others: 1.001 on average

So nothing that the optimizer does is lost, in the mean (Gupta et al. 2015, https://arxiv.org/abs/1502.02551; Zamirai et
al. 2020, https://arxiv.org/abs/2010.06192). Its states are kept in bf16 in the same way. Some parameters at a time are
widened to fp32, for as long as their step takes.

What is drawn depends on the seed, the step and the place in the model, so ranks that hold the same round it alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.model import Parallel
from hybridpar.optim.zero import inside
from hybridpar.optim.zero.piece import Piece, piece_of, stepped
from hybridpar.shard import Spec

_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True)
class _Place:
    """What a parameter that the optimizer steps is in the model: its name, how it is cut, its piece (ZeRO)."""

    name: str
    spec: Spec | None
    piece: Piece | None


class Rounding:
    """Steps `optimizer`, of the bf16 weights of `model`; `step` takes the place of the optimizer's own.

    Raises ValueError where there are no such weights, and in `step` for an optimizer that counts in its groups.

    Example:
        >>> hp.DistributedOptimizer(adamw, model, rounding="stochastic")        # doctest: +SKIP
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: Parallel) -> None:
        self._optimizer, self._model = optimizer, model
        dtypes = {p.dtype for chunk in model.chunks() for _, p in chunk}
        if dtypes and torch.bfloat16 not in dtypes:
            raise ValueError(
                f'rounding="stochastic" is for weights in bf16, and these are {", ".join(map(str, dtypes))}: build '
                'the module with .bfloat16(), or leave out rounding; precision="bf16" keeps weights in fp32'
            )

    @torch.no_grad()
    def step(self) -> None:
        """A step of the optimizer."""
        groups = self._optimizer.param_groups
        own, places = [group["params"] for group in groups], self._places()
        options = _options(groups)
        try:
            for number, some in enumerate(_portions(own)):
                if number and _options(groups) != options:
                    raise ValueError(
                        f"{type(self._optimizer).__name__} counts its steps in its groups, and rounding steps some "
                        "parameters at a time: use an optimizer that counts for each parameter, or leave out rounding"
                    )
                self._portion(some, places, number == 0)
        finally:
            for group, params in zip(groups, own):
                group["params"] = params

    def _portion(self, some: list[list[Parameter]], places: dict[Parameter, _Place], first: bool) -> None:
        optimizer = self._optimizer
        wide = {p: _widened(p) for params in some for p in params}
        narrow = [(p, w) for p, w in wide.items() if w is not p]
        for group, params in zip(optimizer.param_groups, some):
            group["params"] = [wide[p] for p in params]
        for p, w in narrow:
            if p in optimizer.state:
                state = optimizer.state.pop(p)
                optimizer.state[w] = {key: x.float() if _kept(key, x, p) else x for key, x in state.items()}
        if first:
            optimizer.step()  # hooks and schedules see one step
        else:
            inside.unhooked(type(optimizer))(optimizer)
        for p, w in narrow:
            p.copy_(self._rounded(w, places[p], "weight"))
            state = optimizer.state.pop(w, {})
            kept = {key: self._rounded(x, places[p], key) if _kept(key, x, p) else x for key, x in state.items()}
            if kept:
                optimizer.state[p] = kept

    def _rounded(self, x: Tensor, place: _Place, what: str) -> Tensor:
        """`x` in bf16: the lower half of its bits is carried into the upper one by chance."""
        index, start = self._model.world.tensor.index, 0
        shape: tuple[int, ...] = tuple(x.shape)
        overlaps = place.spec is not None and place.spec.overlaps
        if overlaps:
            index, shape = 0, place.spec.shape  # tensor ranks hold some of the same: they draw the whole
        elif place.spec is None or place.spec.dim is None:
            index = 0
        if place.piece is not None and not overlaps:
            start = place.piece.mine[0]
        words = (self._model.world.seed, self._model.steps, place.name, what, index, start)
        digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=7).digest()
        chance = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "little"))
        drawn = torch.randint(1 << 16, shape, generator=chance, dtype=torch.int32, device=x.device)
        if overlaps:
            held = place.spec.held(self._model.world.tensor.index)
            drawn = torch.cat([drawn.narrow(place.spec.dim, a, b - a) for a, b in held], place.spec.dim)
            drawn = drawn if place.piece is None else place.piece.part(drawn)
        bits = drawn.add_(x.detach().contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
        return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)

    def _places(self) -> dict[Parameter, _Place]:
        specs = self._model.specs()
        named = [pair for chunk in self._model.chunks() for pair in chunk]
        return {stepped(p): _Place(name, specs.get(name), piece_of(p)) for name, p in named}


def _portions(groups: list[list[Parameter]]) -> Iterator[list[list[Parameter]]]:
    """The parameters with a gradient, by group, some at a time; at least once, so that the optimizer steps."""
    some: list[list[Parameter]] = [[] for _ in groups]
    count = 0
    for number, params in enumerate(groups):
        for p in (p for p in params if p.grad is not None):
            if count and count + p.numel() > _AT_ONCE:
                yield some
                some, count = [[] for _ in groups], 0
            some[number].append(p)
            count += p.numel()
    yield some


def _widened(p: Parameter) -> Parameter:
    """`p` and its gradient in fp32; itself if it is no bf16."""
    if p.dtype is not torch.bfloat16:
        return p
    wide = Parameter(p.detach().float())
    wide.grad = p.grad.float()
    return wide


def _kept(key: str, x: Any, p: Parameter) -> bool:
    """Whether a state is one of as many floats as the parameter has."""
    return isinstance(x, Tensor) and key != "step" and x.is_floating_point() and x.shape == p.shape


def _options(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]
