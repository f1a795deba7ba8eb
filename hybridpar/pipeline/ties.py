"""Parameters that two stages share, such as an embedding and the head that reads it backwards.

The first stage that uses the parameter owns it. Any other holds a copy:

    step begins               owner ---- the value ----> copy       (and whether it is frozen)
    copy's last backward      owner <-- its gradient --- copy
    owner's last backward     adds to the sum, and only then is the gradient complete and reduced

So `parameters()`, the optimizer's state, clipping and checkpoints see each parameter once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hybridpar.optim.zero.piece import value
from hybridpar.wires.message import Mailbox


@dataclass(frozen=True)
class Tie:
    """One shared parameter. `tag` names its messages; `owned` and `copied` are what this rank has of the two."""

    tag: int
    owner_name: str
    owner_stage: int
    copy_stage: int
    owner_rank: int
    copy_rank: int
    owned: nn.Parameter | None
    copied: nn.Parameter | None


class Ties:
    """All shared parameters that touch this rank of the pipeline."""

    def __init__(self, ties: Sequence[Tie], mailbox: Mailbox) -> None:
        self._ties, self._mailbox = ties, mailbox

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date; both sides call it as a step begins."""
        for tie in self._ties:
            if tie.owned is not None and tie.copied is not None:
                tie.copied.copy_(value(tie.owned)).requires_grad_(tie.owned.requires_grad)
            elif tie.owned is not None:
                self._mailbox.post(tie.copy_rank, tie.tag, [value(tie.owned)], tie.owned.requires_grad)
        for tie in self._ties:
            if tie.copied is not None and tie.owned is None:
                (now,), trained = self._mailbox.take(tie.owner_rank, tie.tag)
                tie.copied.copy_(now).requires_grad_(trained)

    def give(self, stage: int) -> None:
        """After the last backward of `stage`: its copies' gradients go to their owners."""
        for tie in self._ties:
            if tie.copied is not None and tie.copy_stage == stage and tie.owned is None:
                self._mailbox.post(tie.owner_rank, tie.tag, [tie.copied.grad])
                tie.copied.grad = None

    def collect(self, stage: int) -> None:
        """Before the last backward of `stage`: add to its parameters what their copies gathered."""
        for tie in self._ties:
            if tie.owned is None or tie.owner_stage != stage:
                continue
            if tie.copied is not None:
                gradient, tie.copied.grad = tie.copied.grad, None
            else:
                (gradient,), _ = self._mailbox.take(tie.copy_rank, tie.tag)
            if gradient is not None:
                tie.owned.grad = gradient if tie.owned.grad is None else tie.owned.grad.add_(gradient)
