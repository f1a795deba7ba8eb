"""ZeRO: each replica keeps the optimizer's state, or also gradients and weights, of its share of the parameters only.

    zero=1    gradients add up over the microbatches; the last backward pass sends each bucket to its owners
    zero=2    every backward pass does, and only the owners add up: no replica ever holds all gradients
    zero=3    and the parameters are gathered for the time that they are used (zero/weights.py)

    the last backward of a chunk    b3 ....... b2 ....... b1 ....... b0 |         (b: the gradient of a parameter)
    reduce-scatter                          [b3 b2] --------            |
                                                           [b1 b0]      | flush ---------- wait
    optimizer.step()                pieces step, then allgather of the parameters, bucket by bucket

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models":
https://arxiv.org/abs/1910.02054. The data axis is cut, beside the tensor and pipeline axes.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import Parameter

from hybridpar.optim.bucket import Named, grouped
from hybridpar.optim.model import Parallel
from hybridpar.optim.reduce import TWICE, Phase, agree
from hybridpar.optim.zero.bucket import Bucket
from hybridpar.optim.zero.piece import Piece, keep, piece_of
from hybridpar.optim.zero.weights import Weights
from hybridpar.wires.axis import Axis, Handle

_UNDER_WAY = 4  # buckets: a bucket more waits for the first of them, so that memory stays bounded


class Zero:
    """Cuts the parameters `chunks` of `model` over its data axis and averages their gradients into pieces.

    With stage 3 the pieces lie on the device `home`, None being that of the parameters.

    Example:
        >>> zero = Zero(model, model.chunks(), stage=2)                         # doctest: +SKIP
        >>> optimizer.param_groups[0]["params"] = zero.pieces(parameters)       # doctest: +SKIP
    """

    scattered = True  # no replica has whole gradients

    def __init__(
        self,
        model: Parallel,
        chunks: Sequence[Named],
        stage: int,
        bucket_bytes: int | None = None,
        home: torch.device | None = None,
    ) -> None:
        self.company = model.world.data
        self.stage, self.each_pass, self._model, self._bytes = stage, stage >= 2, model, bucket_bytes
        agree(model.world.data, chunks)
        self._chunks = [_Chunk(f"zero.{i}", model.world.data) for i in range(len(chunks))]
        self._home = home
        self._weights = [Weights(stage, bucket_bytes) for stage in model.parts()] if stage == 3 else []
        self._pieces: dict[Parameter, Piece] = {}
        self.add(chunks)

    def add(self, chunks: Sequence[Named]) -> None:
        """Cut more parameters, as when they are unfrozen."""
        for number, (chunk, named) in enumerate(zip(self._chunks, chunks)):
            if self._weights:
                fleeting, named = self._weights[number].choose(named)
                for members, units in reversed(fleeting):
                    for bucket in self._added(chunk, members, fleeting=True):
                        self._weights[number].add(units, bucket)
            self._added(chunk, named)
        for piece in self._pieces.values():
            keep(piece)

    def _added(self, chunk: _Chunk, named: Named, fleeting: bool = False) -> list[Bucket]:
        """New buckets of `chunk` for the parameters `named`."""
        specs, world = self._model.specs(), self._model.world
        late = [(n, p) for n, p in named if not self.each_pass or (n in specs and specs[n].partial)]
        early = [(n, p) for n, p in named if all(p is not q for _, q in late)]
        added = []
        for members, each_pass in ((early, self.each_pass), (late, False)):
            for group in grouped(members, self._bytes):
                home = (self._home or group[0][1].device) if fleeting else None
                added.append(Bucket(chunk.next_name(), group, world.data, world.peers, each_pass, home))
                chunk.add(added[-1])
        self._pieces |= {piece.whole: piece for bucket in added for piece in bucket.pieces}
        return added

    def pieces(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What the optimizer is to step in the place of `parameters`."""
        return [self._pieces[p].held for p in parameters]

    def piece(self, p: Parameter) -> Piece:
        """The piece of a parameter."""
        return self._pieces[p]

    @property
    def pending(self) -> bool:
        """Whether gradients are on their way, `wait` being due."""
        return any(chunk.phase is not Phase.IDLE for chunk in self._chunks)

    def arm(self, chunk: int) -> None:
        """The next backward pass of `chunk` is the last of this step."""
        self._chunks[chunk].arm()

    def passed(self, chunk: int) -> None:
        """A backward pass of `chunk` is over, and more will come in this step."""
        self._chunks[chunk].passed()
        self._rest(chunk)

    def flush(self, chunk: int) -> None:
        """The last pass is over: send what has not left yet."""
        self._chunks[chunk].flush()
        self._rest(chunk)

    def wait(self) -> None:
        """Return when the pieces have their gradients; at once if nothing is on its way."""
        for chunk in self._chunks:
            chunk.wait()

    @contextmanager
    def evaluating(self, microbatches: int) -> Iterator[None]:
        """Within it, forwards of so many microbatches; all replicas come here together.

        Those with fewer microbatches than others would not take part in all gathers: then the weights stay.
        """
        counts = torch.tensor([microbatches, -microbatches])
        apart = bool(self._weights) and int(self._model.world.peers.allreduce(counts, "max").sum()) != 0
        for one in self._weights if apart else ():
            one.stay(True)
        try:
            yield
        finally:
            for one in self._weights if apart else ():
                one.stay(False)

    def _rest(self, chunk: int) -> None:
        if self._weights:
            self._weights[chunk].rest()

    def publish(self) -> None:
        """Give all replicas what each has made of its pieces, but for what is gathered when it is needed."""
        gathering: deque[tuple[Bucket, Handle]] = deque()
        for bucket in [bucket for chunk in self._chunks for bucket in chunk.changed() if bucket.memory is None]:
            if len(gathering) == _UNDER_WAY:
                _filled(*gathering.popleft())
            gathering.append((bucket, bucket.gather()))
        while gathering:
            _filled(*gathering.popleft())


class _Chunk:
    """The buckets of one chunk of the model, and the hooks that fill them."""

    def __init__(self, name: str, axis: Axis) -> None:
        self._name, self._axis = name, axis
        self._buckets: list[Bucket] = []
        self._places: dict[Parameter, tuple[Bucket, int]] = {}
        self._hooked: set[Parameter] = set()
        self._queue: list[Bucket] = []  # what leaves in this pass, in this order on every replica
        self._launched: deque[Bucket] = deque()
        self._next = 0
        self._in_pass = False
        self._told: Handle | None = None
        self._changed: list[Bucket] = []
        self.phase = Phase.IDLE

    def next_name(self) -> str:
        return f"{self._name}.{len(self._buckets)}"

    def add(self, bucket: Bucket) -> None:
        self._buckets.append(bucket)
        self._places |= {p: (bucket, place) for place, (_, p) in enumerate(bucket.members)}
        self._buckets.sort(key=lambda b: not b.each_pass)  # those that wait for the last pass come last
        self._hook()

    def arm(self) -> None:
        if self.phase is not Phase.IDLE:
            raise ValueError(TWICE)
        self.phase = Phase.ARMED
        self._begin()

    def passed(self) -> None:
        if self.phase is not Phase.IDLE:
            raise ValueError(TWICE)
        self._launch_rest()

    def flush(self) -> None:
        assert self.phase is Phase.ARMED, f"{self._name} is {self.phase.value}, not armed"
        self._launch_rest()
        had = [place in bucket.had for bucket in self._buckets for place in range(len(bucket.members))]
        self._told = self._axis.start_allreduce(torch.tensor(had, dtype=torch.float32), "max", f"{self._name}.had")
        self.phase = Phase.FLUSHED

    def wait(self) -> None:
        if self.phase is Phase.ARMED:
            raise ValueError("optimizer.step() was called before the last backward pass of train_step was over")
        if self.phase is Phase.IDLE:
            return
        had = self._told.wait().ne(0).tolist()
        self._changed = []
        for bucket in self._buckets:
            mine, had = had[: len(bucket.members)], had[len(bucket.members) :]
            bucket.deliver(mine)
            if any(mine):
                self._changed.append(bucket)
        self._launched.clear()
        self.phase = Phase.IDLE

    def changed(self) -> list[Bucket]:
        """The buckets that had gradients since this was last asked."""
        changed, self._changed = self._changed, []
        return changed

    def take(self, p: Parameter) -> None:
        """A gradient is complete, as far as this pass goes."""
        bucket, place = self._places[p]
        if piece_of(p) is not bucket.pieces[place]:
            return  # another optimizer has taken over
        if self.phase is Phase.FLUSHED:
            raise ValueError(TWICE)
        if self.phase is Phase.IDLE and not bucket.each_pass:
            return
        self._begin()
        bucket.take(place)
        while self._next < len(self._queue) and self._queue[self._next].full:
            self._launch()

    def _begin(self) -> None:
        """A pass begins, unless it has: settle what leaves in it, by what is frozen now."""
        if self._in_pass:
            return
        self._queue = [b for b in self._buckets if b.trained and (self.phase is Phase.ARMED or b.each_pass)]
        self._next, self._in_pass = 0, True
        self._hook()  # what was frozen before; until now its gradients stayed where they were

    def _hook(self) -> None:
        this = weakref.ref(self)  # a parameter outlives its optimizer, and must not keep the buckets
        for p in self._places:
            if p.requires_grad and p not in self._hooked:
                p.register_post_accumulate_grad_hook(functools.partial(_deliver, this))
                self._hooked.add(p)

    def _launch_rest(self) -> None:
        """The pass is over: what has not left goes."""
        self._begin()
        while self._next < len(self._queue):
            self._launch()
        self._in_pass = False

    def _launch(self) -> None:
        bucket = self._queue[self._next]
        self._next += 1
        while len(self._launched) >= _UNDER_WAY:
            self._launched.popleft().finish()
        bucket.launch()
        self._launched.append(bucket)


def _deliver(chunk: weakref.ref[_Chunk], p: Parameter) -> None:
    alive = chunk()
    if alive is not None:
        alive.take(p)


def _filled(bucket: Bucket, gathering: Handle) -> None:
    bucket.fill(gathering.wait())
