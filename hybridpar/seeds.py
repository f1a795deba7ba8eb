"""Randomness as a function of what is drawn for, never of who draws it: every layout gets the same bits.

    mask[b, i, j] = f(seed, site, step, sample id of row b, i, j)      Draw.keep
    weight[i, j]  = f(seed, name, i, j)                                normal, uniform

i and j are global indices, so a rank that holds a part computes that part of the same numbers. There is no state to
keep in step between ranks: the index is the counter, as in "Parallel random numbers: as easy as 1, 2, 3" (Salmon et
al. 2011, https://doi.org/10.1145/2063384.2063405).

Leading dims are folded one after another into 64 bits per row by the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
A mask needs little per element, so its last dim is mixed in 32 bits by triple32 (Wellons 2018,
https://nullprogram.com/blog/2018/07/31/), the row's two words entering at its start and after each round.

Integers wrap around; torch has signed ones only, so a logical shift is an arithmetic one and a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from hybridpar.shard import Range

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((17, 0xED5AD4BB - 2**32), (11, 0xAC4C1B51 - 2**32), (15, 0x31848BAB))  # triple32
_BLOCK = 1 << 16  # elements worked on at once on a CPU: two int32 buffers of this length stay in its cache


class Draw:
    """What the masks of this moment depend on: the seed, the training step and the samples of the microbatch.

    The engine moves `step` and `samples` before each forward; modules only ask.

    Example:
        >>> draw = Draw(seed=0, step=3, samples=torch.tensor([17, 4]))
        >>> whole = draw.keep("blocks.0.dropout", (2, 6, 8), p=0.1)
        >>> half = draw.keep("blocks.0.dropout", (2, 3, 8), p=0.1, dim=1, parts=((3, 6),))
        >>> torch.equal(half, whole[:, 3:])
        True
    """

    def __init__(self, seed: int, step: int = 0, samples: Tensor | None = None) -> None:
        self.seed, self.step = seed, step
        self._samples, self._turn = samples, 0

    @property
    def samples(self) -> Tensor | None:
        """The ids, int64 [b], of the rows of the microbatch at hand."""
        return self._samples

    @samples.setter
    def samples(self, ids: Tensor | None) -> None:
        self._samples = ids
        self._turn += 1

    @property
    def turn(self) -> tuple[int, int]:
        """Changes whenever a forward for another microbatch begins, or one begins again."""
        return self.step, self._turn

    def keep(
        self,
        site: str,
        shape: Sequence[int],
        p: float,
        dim: int | None = None,
        parts: Sequence[Range] = (),
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A mask, bool of `shape` [b, ...], whose elements are False with probability `p`.

        `shape` is local: its dim `dim` holds the global indices `parts`, one range after another; the other dims are
        whole. Row i is that of `samples[i]`. ValueError where samples were not given or do not fit.
        """
        samples, shape = self._samples, tuple(shape)
        if samples is None or shape[:1] != tuple(samples.shape):
            known = "no samples are known" if samples is None else f"{len(samples)} samples are known"
            raise ValueError(
                f"{site}: a mask of shape {list(shape)} has one row per sample, but {known}; "
                f"set Draw.samples to the ids of the rows of the first dim"
            )
        device = torch.device(device or samples.device)
        columns = _indices(shape, dim, parts, site, device)[1:] or [torch.zeros(1, dtype=torch.int64, device=device)]
        rows = _mix(_fold(_key(self.seed, self.step, site), samples.to(device, torch.int64)))
        for indices in columns[:-1]:
            rows = _mix(_fold(rows, indices))
        return _threshold(rows.flatten(), columns[-1], p).view(shape)


def uniform(
    seed: int,
    name: str,
    shape: Sequence[int],
    dim: int | None = None,
    parts: Sequence[Range] = (),
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in [low, high) for the parameter `name` of whole shape `shape`, or the `parts` of its `dim`.

    Computed in fp64 and rounded once; the same bits for every cut.

    Example:
        >>> torch.equal(uniform(0, "w", (4, 3), 0, ((1, 3),)), uniform(0, "w", (4, 3))[1:3])
        True
    """
    return _fill(seed, name, shape, dim, parts, dtype, device, lambda bits: _unit(bits) * (high - low) + low)


def normal(
    seed: int,
    name: str,
    shape: Sequence[int],
    dim: int | None = None,
    parts: Sequence[Range] = (),
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers for the parameter `name` of whole shape `shape`, or the `parts` of its `dim`.

    Box and Muller 1958, in fp64 from operations that IEEE 754 rounds exactly: a library's log and cos differ in the
    last bit between vector bodies and tails, so a slice would not equal the slice of the whole.

    Example:
        >>> torch.equal(normal(0, "w", (4, 3), 1, ((0, 2),)), normal(0, "w", (4, 3))[:, :2])
        True
    """
    return _fill(seed, name, shape, dim, parts, dtype, device, lambda bits: _gauss(bits) * std + mean)


def _key(*what: object) -> Tensor:
    """64 bits, int64 [], that stand for `what`; not Python's `hash`, which differs between processes."""
    digest = blake2b("\0".join(map(str, what)).encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _indices(
    shape: tuple[int, ...], dim: int | None, parts: Sequence[Range], place: str, device: torch.device
) -> list[Tensor]:
    """For each dim of the local `shape` the global indices it holds."""
    indices = [torch.arange(n, device=device) for n in shape]
    if dim is not None:
        held = torch.cat([torch.arange(start, stop, device=device) for start, stop in parts])
        if len(held) != shape[dim]:
            raise ValueError(f"{place}: dim {dim} of {list(shape)} cannot be the {len(held)} indices of {list(parts)}")
        indices[dim] = held
    return indices


def _fold(state: Tensor, indices: Tensor) -> Tensor:
    """[...] and [n] -> [..., n]: a distinct number for each state and index, still to be mixed."""
    return state.to(indices.device)[..., None] + (indices + 1) * _GOLDEN


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    x ^= (x >> 30) & (1 << 34) - 1
    x *= 0xBF58476D1CE4E5B9 - 2**64
    x ^= (x >> 27) & (1 << 37) - 1
    x *= 0x94D049BB133111EB - 2**64
    return x.bitwise_xor_((x >> 31) & (1 << 33) - 1)


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows, few enough at a time for a CPU's cache; all at once elsewhere."""
    step = max(1, _BLOCK // max(columns, 1)) if device.type == "cpu" else max(rows, 1)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _threshold(rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """rows int64 [r], columns [c] -> bool [r, c], False with probability p.

    triple32 ends by stirring high bits into the low ones. The comparison looks at the high ones, so that is left out.
    """
    keep = torch.empty(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    low, high = rows.view(torch.int32).unflatten(0, (-1, 2)).unsqueeze(-1).unbind(1)  # [r, 1] each
    columns = columns.to(torch.int32)
    bound = round(p * 2**32) - 2**31
    if bound >= 2**31:
        return keep.fill_(False)
    buffers: tuple[Tensor, Tensor] | None = None
    for some in _blocks(*keep.shape, rows.device):
        count = some.stop - some.start
        if buffers is None:
            buffers = tuple(torch.empty(count, len(columns), dtype=torch.int32, device=rows.device) for _ in range(2))
        x, y = (buffer[:count] for buffer in buffers)
        torch.bitwise_xor(columns, low[some], out=x)
        for shift, factor in _ROUNDS:
            torch.bitwise_right_shift(x, shift, out=y)
            x.bitwise_xor_(y.bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
            x.bitwise_xor_(high[some])
        torch.ge(x, bound, out=keep[some])
    return keep


def _fill(
    seed: int,
    name: str,
    shape: Sequence[int],
    dim: int | None,
    parts: Sequence[Range],
    dtype: torch.dtype,
    device: torch.device | str,
    numbers: Callable[[Tensor], Tensor],
) -> Tensor:
    """`numbers` of the 64 bits of each element of the parameter, block by block."""
    local, device = list(shape), torch.device(device)
    if dim is not None:
        local[dim] = sum(stop - start for start, stop in parts)
    indices = _indices(tuple(local), dim, parts, name, device) or [torch.zeros(1, dtype=torch.int64, device=device)]
    rows = _key(seed, name).to(device)
    for some in indices[:-1]:
        rows = _mix(_fold(rows, some))
    rows = rows.reshape(-1)
    out = torch.empty(len(rows), len(indices[-1]), dtype=dtype, device=device)
    for some in _blocks(*out.shape, device):
        out[some] = numbers(_mix(_fold(rows[some], indices[-1])))
    return out.view(local)


def _unit(bits: Tensor) -> Tensor:
    """int64 -> fp64 in [0, 1), a multiple of 2^-53."""
    return ((bits >> 11) & (1 << 53) - 1).double() * 2.0**-53


def _gauss(bits: Tensor) -> Tensor:
    """int64 -> normal fp64 numbers: radius sqrt(-2 log u), angle 2 pi v."""
    u = 1 - _unit(bits)  # in (0, 1]
    v = _unit(_mix(bits ^ _GOLDEN))
    quarter = (v - 0.5) * (math.pi / 2)  # a fourth of an angle in [-pi, pi)
    square = quarter * quarter
    cosine = _horner(square, [(-1) ** n / math.factorial(2 * n) for n in range(9)])
    for _ in range(2):  # cos 2x = 2 cos^2 x - 1
        cosine = cosine * cosine * 2 - 1
    return torch.sqrt(_log(u) * -2) * cosine


def _log(u: Tensor) -> Tensor:
    """The natural logarithm of u in (0, 1]: u = m 2^e, log m = 2 atanh((m - 1) / (m + 1)) as a series."""
    m, e = torch.frexp(u)
    small = m < math.sqrt(0.5)
    m, e = torch.where(small, m * 2, m), torch.where(small, e - 1, e)
    s = (m - 1) / (m + 1)
    return e.double() * math.log(2) + s * _horner(s * s, [2 / (2 * n + 1) for n in range(11)])


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum of coefficients[n] x^n."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
