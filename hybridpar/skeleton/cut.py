"""Cut a module that nobody has described: its own forward is watched once, and every stage runs it in part.

    anatomy    which modules may be handed to a stage
    observe    in which order they are called, and what uses what
    parts      where it may be cut
    stage      what runs on a rank
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import pairwise
from typing import Any

from torch import nn

from hybridpar.skeleton.anatomy import dissect
from hybridpar.skeleton.observe import Result, observe
from hybridpar.skeleton.parts import homes, live, parts
from hybridpar.skeleton.reads import check_asked
from hybridpar.skeleton.stage import SkeletonStage

Order = list[tuple[Result, list[Result], list[str]]]  # each call, the results that it uses, and the weights


class Skeleton:
    """How `module` can be cut into `stages` or more; `costs` has one number for each part, `labels` its name.

    `example` are inputs like those of training; a Hugging Face model has `dummy_inputs` of its own.
    What is in the modules named in `closed` stays together. Raises ValueError where it cannot be cut.

    Example:
        >>> import torch
        >>> body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = body
        ...     def forward(self, x):
        ...         return self.body(x).sum(-1)
        >>> Skeleton(Net(), stages=2, example=torch.zeros(1, 4)).labels
        ['body.0', 'body.1', 'body.2']
    """

    def __init__(self, module: nn.Module, stages: int, example: Any = None, closed: Set[str] = frozenset()) -> None:
        self._anatomy = dissect(module, stages, closed=closed)
        example = example if example is not None else getattr(module, "dummy_inputs", None)
        if example is None:
            raise ValueError(
                f"{type(module).__name__} names no chain, so its forward must be watched once to cut it into "
                f"{stages} stages: give inputs of one small batch as parallelize(..., example=inputs)"
            )
        check_asked(module, example)
        observation = observe(module, self._anatomy, example)
        self._shadow = observation.shadow
        blocks = self._anatomy.blocks
        if blocks.isdisjoint(call.result[0] for call in observation.calls):
            raise ValueError(
                f"the forward of {type(module).__name__} calls none of its blocks ({', '.join(sorted(blocks)[:3])}, ..)"
                " as a module, so there is nothing to cut it by: write block(x) where it calls a method of a block or "
                "takes its layers one by one, or use pipeline=1"
            )
        self._parts = parts(observation.calls, blocks)
        self.order: Order = [(call.result, sorted(call.uses), sorted(call.weights)) for call in observation.calls]
        self.labels = [part.label for part in self._parts]
        self.costs = [sum(call.work for call in part.calls) or 1.0 for part in self._parts]

    def check(self, orders: Sequence[Order]) -> None:
        """Raise where a rank of the replica, of which each has one of `orders`, saw the forward go another way: a stage
        knows the results of earlier stages by their turn alone."""
        for index, order in enumerate(orders):
            for turn, (mine, other) in enumerate(zip(self.order, order)):
                if mine != other:
                    raise ValueError(
                        f"rank {index} of a replica's {len(orders)} saw the forward go another way than other ranks, "
                        f"from its call {turn} on ({mine[0][0] or 'the output'}): give all the same example= inputs; "
                        "where the forward loops over a set of names, whose order differs between processes, start "
                        "with `hybridpar run` or set PYTHONHASHSEED=0 on all ranks"
                    )

    def stages(self, module: nn.Module, bounds: Sequence[int]) -> list[SkeletonStage]:
        """The stages of `module`, as observed or with sharded layers in it, that begin at `bounds` (and the end)."""
        calls = [[call for part in self._parts[a:b] for call in part.calls] for a, b in pairwise(bounds)]
        where = homes(calls)
        found = []
        for number, own in enumerate(calls):
            before = [call for stage in calls[: number + 1] for call in stage]
            after = [call for stage in calls[number + 1 :] for call in stage]
            weights = frozenset[str]().union(*(call.weights for call in own))
            leaving = live(before, after) if after else None
            names = self.labels[bounds[number] : bounds[number + 1]]
            found.append(SkeletonStage(number, names, module, self._shadow, self._anatomy, where, weights, leaving))
        return found
