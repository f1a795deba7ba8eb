"""Rules of a region for functions that move no rows: each works on the rows here alone.

elementwise    add, relu, ...        whole operands are narrowed to the rows here
by itself      softmax, linear, ...  must not work along the rows
shape          size, permute, ...    answers for the whole tensor
reductions     mean, sum             over the rows too, by a sum over the axis
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from hybridpar.tensor.region import Region, Rows, Rule
from hybridpar.tensor.rows import total

# Names of torch's functions, methods and operators.
ELEMENTWISE = """
    abs add addcdiv addcmul bfloat16 bitwise_and bitwise_or ceil celu celu_ clamp clamp_max clamp_min clone contiguous
    cos cpu cuda detach div double elu elu_ empty_like eq erf exp expm1 float floor full_like ge gelu glu gt half
    hardshrink hardsigmoid hardswish hardtanh hardtanh_ isfinite isnan le leaky_relu leaky_relu_ lerp log log1p log2
    logical_and logical_not logical_or logit logsigmoid lt masked_fill maximum minimum mish mul multiply nan_to_num ne
    neg negative ones_like pow prelu reciprocal relu relu6 relu_ requires_grad_ round rsqrt selu selu_ sigmoid sign silu
    sin softplus softshrink softsign sqrt square sub subtract tanh tanhshrink threshold threshold_ to true_divide type
    type_as where zeros_like __abs__ __add__ __and__ __div__ __eq__ __ge__ __gt__ __invert__ __le__ __lt__ __mul__
    __ne__ __neg__ __or__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__
"""
IN_PLACE = "add_ clamp_ div_ mul_ sigmoid_ silu_ sub_ tanh_ __iadd__ __imul__ __isub__ __itruediv__"
ASKED = """
    device dim dtype element_size grad_fn is_complex is_contiguous is_cpu is_cuda is_floating_point is_leaf is_meta
    is_mkldnn is_nested is_quantized is_sparse itemsize layout ndim ndimension requires_grad __hash__
"""
DRAWING = """
    alpha_dropout bernoulli bernoulli_ dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout
    multinomial normal normal_ rand rand_like randint randn randn_like randperm rrelu uniform_
"""


def elementwise(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Cut operands must be cut alike; whole ones meet them by broadcasting."""
    rows = region.same((args, kwargs))
    if func.__name__ == "prelu":  # its weight is one for each channel, whatever the shape
        return region.cut(func(*args, **kwargs), rows)
    if func.__name__ == "glu" and _dim(args, kwargs, 1, -1, args[0]) == rows.dim:
        region.refuse("glu along the rows")
    args = tuple(region.here(x, rows) for x in args)
    kwargs = {key: region.here(x, rows) for key, x in kwargs.items()}
    return region.cut(func(*args, **kwargs), rows)


def in_place(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What is changed must be cut as well."""
    if region.rows(args[0]) is None:
        region.refuse(f"{func.__name__} into a whole tensor, from one whose rows are cut,")
    return elementwise(region, func, args, kwargs)


def asked(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The same for the rows here as for all."""
    return func(*args, **kwargs)


def size(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The whole tensor's shape."""
    x = args[0]
    shape = whole_shape(region, x)
    wanted = args[1] if len(args) > 1 else kwargs.get("dim")
    return shape if wanted is None else shape[wanted]


def length(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> int:
    return whole_shape(region, args[0])[0]


def numel(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> int:
    return prod(whole_shape(region, args[0]))


def fresh(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """new_zeros and the like: the shape is told, so it is a whole tensor."""
    return region.whole(func(*args, **kwargs))


def cat(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    tensors = list(args[0] if args else kwargs["tensors"])
    rows = region.same(tensors)
    if _dim(args, kwargs, 1, 0, tensors[0]) == rows.dim:
        region.refuse("cat along the rows")
    parts = [region.here(x, rows) for x in tensors]
    return region.cut(torch.cat(parts, _dim(args, kwargs, 1, 0, tensors[0])), rows)


def pieces(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """chunk, split, softmax: (x, something, dim), not along the rows."""
    rows = region.same((args, kwargs))
    place = 1 if func.__name__ in ("softmax", "log_softmax") else 2
    if _dim(args, kwargs, place, 0, args[0]) == rows.dim:
        region.refuse(f"{func.__name__} along the rows")
    return region.cut(func(*args, **kwargs), rows)


def channelwise(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """channel_shuffle, local_response_norm: of the channels at one place."""
    rows = region.same((args, kwargs))
    if rows.dim == 1 - args[0].dim():
        region.refuse(f"{func.__name__} where the channels are cut")
    return region.cut(func(*args, **kwargs), rows)


def linear(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    rows = region.same((args, kwargs))
    if rows.dim == -1:
        region.refuse("linear along the rows")
    return region.cut(func(*args, **kwargs), rows)


def permute(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    x = args[0]
    rows, dims = region.rows(x), kwargs.get("dims", args[1:])
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    place = [d % x.dim() for d in dims].index(x.dim() + rows.dim)
    return region.cut(func(*args, **kwargs), Rows(place - x.dim(), rows.length))


def transpose(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    x, first, second = bound(args, kwargs, ("input", "dim0", "dim1"), {})
    rows, pair = region.rows(x), [first % x.dim() - x.dim(), second % x.dim() - x.dim()]
    moved = pair[1 - pair.index(rows.dim)] if rows.dim in pair else rows.dim
    return region.cut(func(*args, **kwargs), Rows(moved, rows.length))


def item(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """x[...]: slices of the dims that are not cut."""
    x, index = args
    rows = region.rows(x)
    index = index if isinstance(index, tuple) else (index,)
    for gap in [i for i, one in enumerate(index) if one is Ellipsis]:
        index = (*index[:gap], *(slice(None),) * (x.dim() - len(index) + 1), *index[gap + 1 :])
    index = (*index, *(slice(None),) * (x.dim() - len(index)))
    if not all(isinstance(i, slice) for i in index) or index[rows.dim] != slice(None):
        region.refuse("an index other than slices of the dims that are not cut")
    return region.cut(x[index], rows)


def reduced(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """mean and sum; over the rows the result is whole."""
    x, dims, keep, dtype = bound(args, kwargs, ("input", "dim", "keepdim", "dtype"), {})
    rows = region.same((args, kwargs))
    dims = tuple(range(x.dim())) if dims is None or dims == () else (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(d % x.dim() - x.dim() for d in dims)
    if rows.dim not in dims:
        out = func(x, dims, keepdim=bool(keep), dtype=dtype)
        return region.cut(out, rows if keep else Rows(rows.dim + sum(d > rows.dim for d in dims), rows.length))
    out = total(torch.sum(x, dims, keepdim=bool(keep), dtype=dtype), region.axis)
    shape = whole_shape(region, x)
    return region.whole(out / prod(shape[d] for d in dims) if func.__name__ == "mean" else out)


def drawing(region: Region, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Functions that draw from torch's generator: refused, unless they are dropouts that drop nothing."""
    off = kwargs.get("training", args[2] if len(args) > 2 else True) is False
    if "dropout" in func.__name__ and off or func.__name__ == "rrelu" and kwargs.get("training") is False:
        out = func(*args, **kwargs)
        return region.cut(out, region.rows(args[0]))
    region.refuse(f"{func.__name__}, which draws other numbers in every layout (use nn.Dropout for masks),")


def whole_shape(region: Region, x: Tensor) -> torch.Size:
    """The shape that a cut tensor pretends to have."""
    rows = region.rows(x)
    shape = list(x.shape)
    if rows is not None:
        shape[rows.dim] = rows.length
    return torch.Size(shape)


def bound(args: tuple, kwargs: dict[str, Any], names: tuple[str, ...], defaults: dict[str, Any]) -> list[Any]:
    """The arguments by position, as a function with these parameter names has them."""
    given = defaults | dict(zip(names, args)) | kwargs
    return [given.get(name) for name in names]


def _dim(args: tuple, kwargs: dict[str, Any], place: int, default: int, x: Tensor) -> int:
    """The argument `dim`, counted from the end."""
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    return (default if dim is None else dim) % x.dim() - x.dim()


POINTWISE: dict[str, Rule] = (
    dict.fromkeys(ELEMENTWISE.split(), elementwise)
    | dict.fromkeys(IN_PLACE.split(), in_place)
    | dict.fromkeys(ASKED.split(), asked)
    | dict.fromkeys(DRAWING.split(), drawing)
    | {f"whole {name}": drawing for name in DRAWING.split()}
    | dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"), fresh)
    | dict.fromkeys(("chunk", "split", "softmax", "log_softmax", "unsafe_chunk"), pieces)
    | dict.fromkeys(("cat", "concat", "concatenate"), cat)
    | dict.fromkeys(("channel_shuffle", "native_channel_shuffle", "local_response_norm"), channelwise)
    | dict.fromkeys(("mean", "sum"), reduced)
    | dict.fromkeys(("size", "shape"), size)
    | dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose)
    | {"permute": permute, "__getitem__": item, "linear": linear, "__len__": length, "numel": numel}
)
