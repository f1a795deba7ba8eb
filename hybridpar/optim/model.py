"""What optimizers ask of a parallel model; the engine's model answers, and so does a few lines in a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn
from torch.nn import Parameter

from hybridpar.shard import Spec
from hybridpar.support import Combination

if TYPE_CHECKING:
    from hybridpar.optim.precision import Scaling
    from hybridpar.wires.axis import Axis
    from hybridpar.wires.world import World

Chunks = list[list[tuple[str, Parameter]]]  # per chunk, its parameters in order of registration


class Reducing(Protocol):
    """Something that handles gradients while a chunk's last backward pass runs."""

    def arm(self, chunk: int) -> None:
        """The next backward pass of `chunk` is the last one of this step."""

    def flush(self, chunk: int) -> None:
        """That pass is over."""


@runtime_checkable
class Passing(Protocol):
    """Something that handles gradients after every backward pass of a chunk."""

    def passed(self, chunk: int) -> None:
        """A pass is over that is not the last one of this step."""


class Averaging(Reducing, Protocol):
    """Something that averages them over the replicas of `company`: all of them, unless a sync policy says otherwise."""

    company: Axis

    def wait(self) -> None:
        """Return when the gradients are averages; at once if none are on their way."""


class Parallel(Protocol):
    """A model cut over ranks, as optimizers see it."""

    world: World
    asked: Combination  # what the model was made for; the optimizer adds the rest
    scaling: Scaling | None  # that of fp16's losses
    steps: int  # training steps so far
    scattered: bool  # whether each replica has its piece of the gradients only

    @property
    def on_their_own(self) -> bool:
        """Whether replicas train for themselves, so that their weights may differ."""

    def chunks(self) -> Chunks:
        """The parameters that this rank holds and owns, chunk by chunk."""

    def parts(self) -> list[nn.Module]:
        """The module of each chunk."""

    def specs(self) -> dict[str, Spec]:
        """The spec of each parameter, by its name in `chunks`; one without a spec is whole on every tensor rank."""

    def attach(self, reducer: Averaging) -> None:
        """Tell `reducer` of each chunk's last backward pass from now on, in place of the one before."""

    def wait(self) -> None:
        """Wait for the attached reducer, if there is one."""
