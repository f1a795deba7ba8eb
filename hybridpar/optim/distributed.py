"""The optimizer of a model that has replicas: the user's own, stepped when the gradients are averaged.

    train_step          gradients leave, bucket by bucket, while the backward passes go on
    optimizer.step()    wait for them, clip if asked, then the user's optimizer steps

Horovod's wrapper makes a new optimizer of a new class and loses the state; this one keeps the user's object as `inner`
and hands it everything but what concerns gradients. It is a `torch.optim.Optimizer` by name, since learning rate
schedules and `GradScaler` insist on that, and never initialises the base class: the state is `inner`'s alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hybridpar.optim.clip import clip_grad_norm_
from hybridpar.optim.compression import Compression, Wire
from hybridpar.optim.matrix import check_cut
from hybridpar.optim.model import Parallel
from hybridpar.optim.probe import probe
from hybridpar.optim.reduce import Reducer
from hybridpar.optim.rounding import Rounding
from hybridpar.optim.sync.policy import Policy, Together, policy
from hybridpar.optim.sync.wish import called, parse
from hybridpar.optim.zero import inside
from hybridpar.optim.zero.piece import forget
from hybridpar.optim.zero.zero import Zero
from hybridpar.support import check


class DistributedOptimizer(torch.optim.Optimizer):
    """Wraps `optimizer` for `model`: averages gradients over the replicas before each step.

    `clip` is the largest norm of the whole model's gradient. `compression` is one of `Compression`. `bucket_bytes`
    is the size at which gathered gradients leave; "probe" tries some sizes and Horovod cycle times for about a second,
    and `probed` says what it chose and why. `norm` is the last gradient norm, where `clip` is given. `sync` is
    how replicas keep together: "allreduce" unless given, or one of docs/sync.md; `hybridpar run --sync` overrules it.
    `zero` cuts over the replicas what each would hold as well: 1 the optimizer's state, 2 also the gradients, 3 also
    the weights. The optimizer then steps pieces of the parameters, and gradients lie there and not in `p.grad`
    (docs/zero.md). With `offload` and zero=3 these pieces, with the optimizer's state, lie in the memory of the CPU.
    `rounding` "stochastic" is for weights in bf16: steps are rounded by chance, not to the nearest (docs/precision.md).

    Raises ValueError if the optimizer's parameters are not the model's, if the optimizer needs closures, and at once
    in `step(closure)`: a closure's gradients would never be averaged.

    Example:
        >>> optimizer = hp.DistributedOptimizer(torch.optim.AdamW(model.parameters()), model)   # doctest: +SKIP
        >>> loss = model.train_step(batch, microbatches=8)                                      # doctest: +SKIP
        >>> optimizer.step(); optimizer.zero_grad()                                             # doctest: +SKIP
    """

    _step_supports_amp_scaling = False  # else GradScaler would leave the scale to us, and `inner` would not see it

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Parallel,
        compression: Wire | None = None,
        clip: float | None = None,
        bucket_bytes: int | Literal["probe"] | None = None,
        sync: str | None = None,
        zero: int = 0,
        rounding: str | None = None,
        offload: bool = False,
    ) -> None:
        _check(optimizer, compression, clip)
        _check_offload(zero, offload)
        if rounding not in (None, "stochastic"):
            raise ValueError(f'rounding={rounding!r}: choose "stochastic", or None for torch\'s own, to the nearest')
        compression = compression or Compression.none
        wish = parse(model.world.sync or sync or "allreduce")
        check(replace(model.asked, sync=called(wish), zero=zero, compression=compression.name))
        if zero:
            inside.check_elementwise(optimizer, zero)
        self.inner, self.clip, self.norm = optimizer, clip, None
        self._model = model
        self._policy = policy(wish, model, compression)
        self._check_parameters(optimizer.param_groups)
        self._check_complete()
        check_cut(optimizer, model)
        for _, p in (named for chunk in model.chunks() for named in chunk):
            forget(p)  # an earlier optimizer may have cut it
        self.probed: str | None = None
        if bucket_bytes == "probe":
            bucket_bytes = self._probe()
        home = torch.device("cpu") if offload else None
        self._zero = Zero(model, self._chosen(optimizer.param_groups), zero, bucket_bytes, home) if zero else None
        if self._zero is not None:
            inside.install(optimizer, self._zero.piece)
        self._reducer = self._zero or Reducer(self._policy.company, model.chunks(), bucket_bytes, compression)
        if isinstance(self._policy, Together) and isinstance(self._reducer, Reducer):
            self._policy.reducer = self._reducer
        model.attach(self._reducer)
        self._rounding = Rounding(optimizer, model) if rounding else None
        if model.scaling is not None:
            model.scaling.watch(self._gradients)

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Wait for the averages, clip, and step."""
        if closure is not None:
            raise ValueError(
                "step(closure) is not possible: gradients made inside a closure are not averaged over the replicas; "
                "call model.train_step(...) and then optimizer.step()"
            )
        self.synchronize()
        scaling = self._model.scaling
        if scaling is not None and not scaling.agree(self._model.world.everyone):
            return  # on all ranks: a gradient overflowed on one
        if self.clip is not None:
            self.norm = clip_grad_norm_(self._model, self.clip)
        self._policy.before()
        (self._rounding or self.inner).step()
        if self._zero is not None:
            self._zero.publish()
        self._policy.after()

    def synchronize(self) -> None:
        """Return when all `p.grad` are averages, ready to be looked at or changed; `step` then need not wait."""
        self._reducer.wait()
        if self._model.scaling is not None:
            self._model.scaling.unscale()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Here for scripts written for Horovod: after `synchronize()`, `step()` has nothing left to wait for."""
        if self._reducer.pending:
            raise ValueError("skip_synchronize() with gradients still on their way: call synchronize() before it")
        yield

    @property
    def policy(self) -> Policy:
        """How the replicas keep together."""
        return self._policy

    def meet(self) -> None:
        """Make all replicas hold the same weights, as before an evaluation; all ranks call it together.

        Under "allreduce" they always do. Where a round is under way it ends here.
        """
        self.synchronize()
        self._policy.meet()

    def share_overflow(self) -> None:
        """Make a gradient that is not finite on one rank of the replica known to all, for a `GradScaler`.

        All ranks must agree on whether to skip a step and how to scale the next one; replicas do, by the average.

        Example:
            >>> optimizer.synchronize(); optimizer.share_overflow()     # doctest: +SKIP
            >>> scaler.step(optimizer); scaler.update()                 # doctest: +SKIP
        """
        self.synchronize()
        grads = [p.grad for group in self.inner.param_groups for p in group["params"] if p.grad is not None]
        bad = torch.tensor([0.0 if all(bool(g.isfinite().all()) for g in grads) else 1.0])
        world = self._model.world
        # Replicas that do not average their gradients would skip different steps, and their rounds would not match.
        averaged = self._policy.company.size == world.data.size
        ranks = world.replica if self._zero is None and averaged else world.everyone
        grads = [g for g in grads if g.numel()]
        if ranks.notes.allreduce(bad, "max")[0] and grads:
            grads[0].fill_(torch.inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those still on their way included."""
        self.synchronize()
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the optimizer more of the model's parameters, as when they are unfrozen."""
        given = param_group["params"]
        param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
        self._check_parameters([param_group])
        if self._zero is not None:
            self._zero.add(self._chosen([param_group]))
            param_group["params"] = self._zero.pieces(param_group["params"])
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The user's optimizer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the user's optimizer. Raises ValueError where its pieces (ZeRO) are others than those of the states."""
        if self._zero is not None:
            inside.check_states(self.inner, state_dict)
        self.inner.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's optimizer's. Reading them waits for the averages: `GradScaler` then changes the gradients."""
        self.synchronize()
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        """The user's optimizer's."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The user's optimizer's."""
        return self.inner.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet, as while being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.inner!r})"

    def _probe(self) -> int | None:
        """The size of buckets by a short probe."""
        count = sum(p.numel() * p.element_size() for chunk in self._model.chunks() for _, p in chunk if p.requires_grad)
        choice = probe(self._model.world, count)
        self.probed = choice.why
        return choice.bucket_bytes

    def _check_parameters(self, groups: list[dict[str, Any]]) -> None:
        """Every parameter in `groups` is the model's."""
        owned = {p for chunk in self._model.chunks() for _, p in chunk}
        for number, group in enumerate(groups):
            for place, p in enumerate(group["params"]):
                if p not in owned:
                    raise ValueError(
                        f"parameter {place} of group {number}, of shape {tuple(p.shape)}, is not one that this rank's "
                        "part of the model owns: make the optimizer from model.parameters() after hp.parallelize(...)"
                    )

    def _gradients(self) -> list[Tensor]:
        """What there is of the gradients of what the optimizer steps."""
        return [p.grad for group in self.inner.param_groups for p in group["params"] if p.grad is not None]

    def _chosen(self, groups: list[dict[str, Any]]) -> list[list[tuple[str, torch.nn.Parameter]]]:
        """The parameters in `groups`, chunk by chunk, in the model's order."""
        given = {p for group in groups for p in group["params"]}
        return [[(name, p) for name, p in chunk if p in given] for chunk in self._model.chunks()]

    def _check_complete(self) -> None:
        """Every parameter of the model is trained by the optimizer, or frozen."""
        given = {p for group in self.inner.param_groups for p in group["params"]}
        missing = [n for chunk in self._model.chunks() for n, p in chunk if p.requires_grad and p not in given]
        if missing:
            raise ValueError(
                f"the optimizer lacks {len(missing)} of the model's parameters ({', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}): one optimizer trains them all, with a parameter group for "
                "each kind, [{'params': ..., 'lr': ...}, ...]; freeze the rest with requires_grad_(False)"
            )


def _check(optimizer: torch.optim.Optimizer, compression: Wire | None, clip: float | None) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS needs a closure, whose gradients would not be averaged over the replicas; use another")
    if isinstance(optimizer, DistributedOptimizer):
        raise ValueError("this optimizer is a DistributedOptimizer already: wrap the optimizer that it was made from")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{type(optimizer).__name__} is no torch.optim.Optimizer: call it as (optimizer, model)")
    if compression is not None and not isinstance(compression, Wire):
        ours = "Compression.none, .fp16, .bf16 or .power_sgd(4)"
        raise ValueError(f"compression={compression!r}: choose hybridpar's own {ours}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: the largest norm is positive; leave it out for no clipping")


def _check_offload(zero: int, offload: bool) -> None:
    if offload and zero != 3:
        raise ValueError(
            f"offload=True and zero={zero}: what goes to the CPU's memory are the pieces of the weights, which zero=3 "
            "makes; use zero=3, or leave out offload"
        )
