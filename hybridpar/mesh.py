"""The mesh: ranks laid out along the axes `data`, `pipeline` and `tensor`.

The tensor axis varies fastest (neighbours share a node), then pipeline, then data:

    data=2, pipeline=2, tensor=2        tensor 0   tensor 1
        data 0    pipeline 0               0          1
                  pipeline 1               2          3
        data 1    pipeline 0               4          5
                  pipeline 1               6          7

A `Mesh` is a value: no process is needed to ask who is where, so 4,096 ranks are as cheap as 4.
"""

from __future__ import annotations

from dataclasses import dataclass

AXES = ("data", "pipeline", "tensor")


@dataclass(frozen=True)
class Place:
    """Where one rank stands: its index along each axis."""

    data: int
    pipeline: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """How many ranks stand along each axis.

    Example:
        >>> mesh = Mesh(data=2, pipeline=2, tensor=2)
        >>> mesh.size, mesh.place(5)
        (8, Place(data=1, pipeline=0, tensor=1))
        >>> mesh.group("tensor", 5)
        (4, 5)
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if not isinstance(degree, int) or degree < 1:
                raise ValueError(f"{axis}={degree!r}: a degree is a whole number of at least 1")

    @classmethod
    def fit(cls, size: int, data: int | None = None, pipeline: int | None = None, tensor: int | None = None) -> Mesh:
        """The mesh of `size` ranks: `pipeline` and `tensor` default to 1, `data` to the rest.

        Raises ValueError where the degrees do not multiply to `size`.

        Example:
            >>> Mesh.fit(8, tensor=2)
            Mesh(data=4, pipeline=1, tensor=2)
        """
        model = Mesh(1, 1 if pipeline is None else pipeline, 1 if tensor is None else tensor)
        if size % model.size:
            raise ValueError(
                f"{size} ranks cannot be laid out as pipeline={model.pipeline} x tensor={model.tensor}: "
                f"{model.size} does not divide {size}; start {_nearest(size, model.size)} ranks or change the degrees"
            )
        mesh = Mesh(size // model.size if data is None else data, model.pipeline, model.tensor)
        if mesh.size != size:
            raise ValueError(
                f"{mesh} needs {mesh.size} ranks and {size} were started; "
                f"leave data out (it would be {size // model.size}) or start {mesh.size}"
            )
        return mesh

    @property
    def size(self) -> int:
        return self.data * self.pipeline * self.tensor

    def place(self, rank: int) -> Place:
        """The indices of `rank` along the three axes."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside {self}, which has ranks 0 to {self.size - 1}")
        rest, tensor = divmod(rank, self.tensor)
        data, pipeline = divmod(rest, self.pipeline)
        return Place(data, pipeline, tensor)

    def rank(self, data: int = 0, pipeline: int = 0, tensor: int = 0) -> int:
        """The rank that stands at these indices."""
        for axis, index in zip(AXES, (data, pipeline, tensor)):
            if not 0 <= index < getattr(self, axis):
                raise ValueError(f"index {index} is outside the {axis} axis of {self}")
        return (data * self.pipeline + pipeline) * self.tensor + tensor

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` only, `rank` among them, in order of their index."""
        if axis not in AXES:
            raise ValueError(f"there is no axis {axis!r}: the axes are {', '.join(AXES)}")
        place = self.place(rank)
        return tuple(self.rank(**{**place.__dict__, axis: i}) for i in range(getattr(self, axis)))

    def replica(self, rank: int) -> tuple[int, ...]:
        """The ranks that together hold one copy of the model, the one that `rank` is part of."""
        first = self.place(rank).data * self.pipeline * self.tensor
        return tuple(range(first, first + self.pipeline * self.tensor))

    def __str__(self) -> str:
        return f"data={self.data} x pipeline={self.pipeline} x tensor={self.tensor}"


def _nearest(size: int, model: int) -> str:
    below = size // model * model
    return f"{below} or {below + model}" if below else f"{model}"
