"""Puts pieces into the user's optimizer in the place of parameters, if it treats each element by itself.

Whether it does is tried: three steps on a small matrix must give what three steps on the two halves of its memory give.
SGD, Adam, AdamW, Adagrad, RMSprop and their like pass; Muon, Adafactor and other optimizers of matrices do not.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hybridpar.optim.zero.piece import Piece

_ROWS, _COLUMNS, _STEPS = 4, 6, 3


def install(optimizer: torch.optim.Optimizer, piece: Callable[[Parameter], Piece]) -> None:
    """Let `optimizer` step the pieces of its parameters; what it knows of them already is cut too.

    Raises ValueError for a state that is neither of its parameter's shape nor a number.
    """
    for group in optimizer.param_groups:
        pieces = [piece(p) for p in group["params"]]
        group["params"] = [one.held for one in pieces]
        for one in pieces:
            if one.whole in optimizer.state:
                state = optimizer.state.pop(one.whole)
                optimizer.state[one.held] = {key: _cut(value, one, key, optimizer) for key, value in state.items()}


def check_elementwise(optimizer: torch.optim.Optimizer, stage: int) -> None:
    """Raise ValueError unless a piece of a parameter is stepped as it would be in the whole."""
    for group in optimizer.param_groups:
        first = next((p for p in group["params"] if p.is_floating_point()), None)
        if first is None:
            continue
        try:
            right = alike(optimizer, group, first)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{_refusal(optimizer, stage)} ({error})") from error
        if not right:
            raise ValueError(_refusal(optimizer, stage))


def check_states(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError where a state dict for `optimizer` is not of its pieces."""
    pieces = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(pieces):
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                raise ValueError(
                    f"{key} of parameter {number} has shape {list(value.shape)} and this rank's piece has "
                    f"{p.numel()} elements: state_dict() of ZeRO is of one rank and one mesh; use hp.save and hp.load"
                )


def _cut(value: Any, piece: Piece, key: str, optimizer: torch.optim.Optimizer) -> Any:
    if not isinstance(value, Tensor) or key == "step" or (not value.dim() and piece.whole.dim()):
        return value
    if value.shape != piece.whole.shape:
        raise ValueError(
            f"{key} of {type(optimizer).__name__} has shape {list(value.shape)} and its parameter "
            f"{list(piece.whole.shape)}: ZeRO cuts states of the parameter's shape; leave out zero="
        )
    return piece.part(value).to(piece.held.device)


def _refusal(optimizer: torch.optim.Optimizer, stage: int) -> str:
    return (
        f"zero={stage} gives the optimizer pieces of parameters, and {type(optimizer).__name__} does not treat each "
        "element by itself: use one that does (SGD, Adam, AdamW, ...), or leave out zero="
    )


def alike(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: Parameter) -> bool:
    """Whether halves are stepped as the whole is."""
    count = _ROWS * _COLUMNS
    made = {"dtype": torch.float32, "device": like.device}
    start = torch.linspace(-1, 2, count, **made).sin()
    halves = [slice(0, count // 2 + 1), slice(count // 2 + 1, count)]
    whole = Parameter(start.view(_ROWS, _COLUMNS).clone())
    parts = [Parameter(start[half].clone()) for half in halves]
    known = optimizer.state.get(like, {})
    trials = [
        _trial(optimizer, group, [whole], [_small(known, like, slice(0, count), (_ROWS, _COLUMNS))]),
        _trial(optimizer, group, parts, [_small(known, like, half, (-1,)) for half in halves]),
    ]
    for step in range(_STEPS):
        gradient = (torch.arange(count, **made) * (step + 1.7)).cos()
        whole.grad = gradient.view(_ROWS, _COLUMNS).clone()
        for part, half in zip(parts, halves):
            part.grad = gradient[half].clone()
        for trial in trials:
            unhooked(type(optimizer))(trial)  # a scheduler may have wrapped the step of the object
    return bool(torch.allclose(whole.detach().view(-1), torch.cat([part.detach() for part in parts])))


def unhooked(kind: type[torch.optim.Optimizer]) -> Callable[[torch.optim.Optimizer], Any]:
    """The step of `kind` without what torch puts around it, which tells whoever listens to all optimizers."""
    step = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _trial(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[Parameter], states: Sequence[Any]
) -> torch.optim.Optimizer:
    """A copy of `optimizer` that trains `parameters` only."""
    trial = copy.copy(optimizer)
    options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
    trial.param_groups = [{**options, "params": list(parameters)}]
    trial.state = defaultdict(dict, {p: state for p, state in zip(parameters, states) if state})
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    return trial


def _small(known: dict[str, Any], like: Parameter, part: slice, shape: tuple[int, ...]) -> dict[str, Any]:
    """The state of `like`, for the small matrix or a part of it."""
    count, small = _ROWS * _COLUMNS, {}
    for key, value in known.items():
        if isinstance(value, Tensor) and key != "step" and value.shape == like.shape:
            memory = value.detach().float().reshape(-1)
            value = memory.repeat(-(-count // max(len(memory), 1)))[:count][part].reshape(shape).clone()
        small[key] = value.clone() if isinstance(value, Tensor) else value
    return small
