"""Actions: what one rank does at one position of a pipeline schedule, and what each must wait for.

    2F0   stage 2 runs microbatch 0 forward        waits for 1F0
    2B0   stage 2 runs microbatch 0 backward       waits for 2F0 and 3B0
    2R    the data-parallel reduction of stage 2's gradients begins, after its last backward

The text form is that of torch.distributed.pipelining, with R added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"
    REDUCE = "R"


@dataclass(frozen=True)
class Action:
    """One step of one rank; a REDUCE has no microbatch.

    Example:
        >>> str(Action(Kind.FORWARD, stage=2, micro=0)), Action.parse("2R")
        ('2F0', Action(kind=<Kind.REDUCE: 'R'>, stage=2, micro=None))
    """

    kind: Kind
    stage: int
    micro: int | None = None

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action of a text such as `2F0`, `2B0` or `2R`. Raises ValueError on any other."""
        match = re.fullmatch(r"(\d+)(?:([FB])(\d+)|R)", text)
        if match is None:
            raise ValueError(f"{text!r} is not an action; actions are a stage, F or B and a microbatch (2F0), or 2R")
        stage, kind, micro = match.groups()
        return cls(Kind(kind), int(stage), int(micro)) if kind else cls(Kind.REDUCE, int(stage))

    def needs(self, stages: int, microbatches: int) -> tuple[Action, ...]:
        """The actions, on any rank, that must be done before this one can be."""
        match self.kind:
            case Kind.FORWARD:
                return (Action(Kind.FORWARD, self.stage - 1, self.micro),) if self.stage else ()
            case Kind.BACKWARD:
                own = Action(Kind.FORWARD, self.stage, self.micro)
                return (own, Action(Kind.BACKWARD, self.stage + 1, self.micro)) if self.stage + 1 < stages else (own,)
            case Kind.REDUCE:
                return tuple(Action(Kind.BACKWARD, self.stage, micro) for micro in range(microbatches))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.micro is None else self.micro}"
