"""Modules on rows: every layer and whole networks equal plain ones; the facts of halos; what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hybridpar as hp
from hybridpar.seeds import Draw
from hybridpar.shard import balanced
from hybridpar.tensor import rows, space
from hybridpar.tensor.halo import Spread, Window, bordered, pooled, runs, trade, windows
from hybridpar.tensor.plan import apply
from hybridpar.wires.axis import Alone, Axis
from tests.against_one import CLOSE, made, numbers, tensor_axis, whole
from tests.ranks import ranks
from tests.test_conv import RESNET, compare_channels, resnet

ALONE = Alone("tensor")
small = st.integers(1, 5)


# ---- facts


@given(small, small, st.integers(0, 4), small, st.integers(1, 30), st.integers(1, 6), st.booleans())
def test_windows_read_what_their_outputs_are_made_of(
    kernel: int, stride: int, padding: int, dilation: int, length: int, degree: int, ceil: bool
) -> None:
    window = Window(kernel, stride, padding, dilation)
    count = window.outputs(length, padding, ceil)
    assume(count > 0 and padding * 2 <= kernel)
    pool = nn.MaxPool1d(kernel, stride, padding, dilation, ceil_mode=ceil)
    assert count == pool(torch.zeros(1, 1, length)).shape[-1]
    for (first, stop), ((begin, end),) in zip(balanced(count, degree), windows(window, count, degree)):
        read = {o * stride - padding + i * dilation for o in range(first, stop) for i in range(kernel)}
        assert not read and begin == end or (begin, end - 1) == (min(read), max(read))


@given(small, small, st.integers(0, 4), small, st.integers(1, 12), st.integers(0, 4), st.integers(1, 6))
def test_spreads_read_all_rows_that_add_to_their_outputs(
    kernel: int, stride: int, padding: int, dilation: int, length: int, after: int, degree: int
) -> None:
    spread = Spread(kernel, stride, padding, dilation)
    count = spread.outputs(length, after)
    assume(count > 0 and after < max(stride, dilation))
    for (first, stop), ((begin, end),) in zip(balanced(count, degree), windows(spread, count, degree)):
        adds = [
            row for row in range(length) for j in range(kernel) if first <= spread.begins(row) + j * dilation < stop
        ]
        assert all(begin <= row < end for row in adds)
        if first < stop:  # what these rows make covers the outputs
            assert spread.begins(begin) <= first and stop <= spread.begins(end - 1) + spread.span


@given(st.integers(1, 20), st.integers(1, 5), st.data())
def test_each_wanted_row_is_held_or_comes_from_its_holder(length: int, degree: int, data: st.DataObject) -> None:
    bound = st.lists(st.integers(-3, length + 3), max_size=6).map(runs)
    wanted = tuple(data.draw(bound) for _ in range(degree))
    trades = [trade(length, wanted, index) for index in range(degree)]
    for index, one in enumerate(trades):
        came = [(i, row) for i, ranges in one.receives for a, b in ranges for row in range(a, b)]
        own = [row for a, b in one.own for row in range(a, b)]
        within = [row for a, b in wanted[index] for row in range(a, b) if 0 <= row < length]
        assert sorted(own + [row for _, row in came]) == within
        assert all(trades[i].held[0] <= row < trades[i].held[1] for i, row in came)
        assert all((index, ranges) in trades[i].sends for i, ranges in one.receives)
        assert all((index, ranges) in trades[j].receives for j, ranges in one.sends)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_borders_are_torchs(mode: str) -> None:
    for before, after in ((0, 0), (2, 1), (4, 4)):
        x = torch.arange(5.0)[None, None]
        assert F.pad(x, (before, after), mode=mode)[0, 0].tolist() == bordered(mode, 5, before, after)


def test_adaptive_pools_read_what_torch_reads() -> None:
    for length in range(1, 12):
        for count in range(1, 9):
            x = torch.arange(float(length))[None, None]
            means = [x[..., a:b].mean().item() for a, b in pooled(length, count)]
            assert F.adaptive_avg_pool1d(x, count)[0, 0].tolist() == pytest.approx(means)


@ranks(2, 4)
def test_fetching_and_giving_back_are_conjugate() -> None:
    axis = tensor_axis()
    for length in (9, 3):
        wanted = tuple(((a - 4, b + 3),) for a, b in balanced(length, axis.size))
        one = trade(length, wanted, axis.index)
        x = numbers(2, one.held[1] - one.held[0], 3, seed=axis.index).requires_grad_()
        y = rows.fetch(x, 1, one, axis)
        weights = numbers(*y.shape, seed=9 + axis.index)
        (grad,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        left, right = (y.detach() * weights).sum(), (x * grad).sum().detach()
        torch.testing.assert_close(axis.allreduce(left), axis.allreduce(right), **CLOSE)


# ---- layers


def compare_space(model: nn.Module, x: Tensor, axis: Axis) -> None:
    """The whole model on rows."""
    compare_channels(model, {"": "space"}, x, axis)


LAYERS: dict[str, Callable[[Callable[[str], type[nn.Module]]], nn.Module]] = {
    "3, padded": lambda of: of("Conv")(3, 4, 3, padding=1),
    "4, stride 2, dilated": lambda of: of("Conv")(3, 4, 4, stride=2, padding=2, dilation=2),
    "even, same": lambda of: of("Conv")(3, 4, 4, padding="same"),
    "reflect": lambda of: of("Conv")(3, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda of: of("Conv")(3, 4, 5, padding=2, padding_mode="circular", bias=False),
    "replicate": lambda of: of("Conv")(3, 4, 5, padding=2, padding_mode="replicate"),
    "depthwise, stride 3": lambda of: of("Conv")(3, 3, 2, stride=3, groups=3),
    "transposed 2, 2": lambda of: of("ConvTranspose")(3, 4, 2, 2),
    "transposed 3, 2": lambda of: of("ConvTranspose")(3, 4, 3, 2, padding=1, output_padding=1),
    "transposed with gaps": lambda of: of("ConvTranspose")(3, 4, 2, 4, padding=1),
    "max": lambda of: of("MaxPool")(3, 2, 1),
    "max, ceil": lambda of: of("MaxPool")(2, ceil_mode=True),
    "average": lambda of: of("AvgPool")(3, 2, 1),
    "average, ceil, unpadded": lambda of: of("AvgPool")(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "to one": lambda of: of("AdaptiveAvgPool")(1),
    "maximum to one": lambda of: of("AdaptiveMaxPool")(1),
    "to three": lambda of: of("AdaptiveAvgPool")(3),
    "batch norm": lambda of: of("BatchNorm")(3),
    "instance norm": lambda of: of("InstanceNorm")(3, affine=True, track_running_stats=True),
    "group norm": lambda of: nn.GroupNorm(3, 3),
    "nearest": lambda of: nn.Upsample(scale_factor=2),
    "nearest 1.7": lambda of: nn.Upsample(scale_factor=1.7),
    "rest": lambda of: nn.Sequential(nn.PReLU(3), nn.SiLU(), nn.ReLU(inplace=True), nn.Dropout(0.4)),
}


@ranks(2, 3, 4)
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of the plain layer
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_on_rows_equals_the_plain_one(layer: str, dims: int) -> None:
    axis, model = tensor_axis(), made(lambda: LAYERS[layer](lambda kind: getattr(nn, f"{kind}{dims}d")))
    length = 11 if axis.size < 4 else 5  # where strides leave some without a row
    compare_space(model, numbers(3, 3, length, *(6, 5)[: dims - 1]), axis)


@ranks(2, 3)
@pytest.mark.parametrize("mode, corners", [("bilinear", False), ("bilinear", True), ("nearest-exact", None)])
def test_resampling_of_rows_equals_the_plain_one(mode: str, corners: bool | None) -> None:
    for options in ({"scale_factor": 2}, {"scale_factor": 0.6}, {"size": (17, 3)}):
        model = made(lambda options=options: nn.Upsample(**options, mode=mode, align_corners=corners))
        compare_space(model, numbers(3, 2, 7, 6), tensor_axis())


@ranks(2, 3)
def test_other_layers_on_rows_equal_plain_ones() -> None:
    others = (nn.PixelShuffle(2), nn.ZeroPad2d((1, 2, 3, -1)), nn.Softmax2d())
    for layer in (nn.LayerNorm([4, 7, 6]), nn.LayerNorm(6), *others):
        compare_space(made(lambda layer=layer: layer), numbers(3, 4, 7, 6), tensor_axis())


# ---- networks


class UNet(nn.Module):
    """Two resolutions with a skip, after Ronneberger et al. 2015."""

    def __init__(self, dims: int, pooled: bool) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        norm, pool = getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"MaxPool{dims}d")
        self.first = nn.Sequential(conv(2, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True))
        self.down = pool(2) if pooled else conv(4, 4, 3, 2, 1)
        self.bottom = nn.Sequential(conv(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Dropout(0.2))
        self.up = up(6, 4, 2, 2)
        self.last = conv(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        y = self.up(self.bottom(self.down(skip)))
        if y.shape != skip.shape:
            y = F.interpolate(y, size=skip.shape[2:], mode="nearest")
        return self.last(torch.cat([skip, y], dim=1))


@ranks(2, 3, 4)
@pytest.mark.parametrize("dims, pooled, length", [(2, True, 12), (2, False, 11), (3, True, 8), (3, False, 5)])
def test_a_u_net_on_rows_equals_one_process(dims: int, pooled: bool, length: int) -> None:
    compare_space(made(lambda: UNet(dims, pooled)), numbers(3, 2, length, *(6,) * (dims - 1)), tensor_axis())


@ranks(2, 3, 4)
@pytest.mark.parametrize("plan", [{"": "space"}, {"0": "space", "1": "space"}, {"1.*": "space"}], ids=str)
def test_a_resnet_on_rows_equals_one_process(plan: Mapping[str, str]) -> None:
    model = made(resnet)
    model[3] = Pooled()
    if "" not in plan:
        model[3] = nn.Flatten()
    compare_channels(model, plan, numbers(3, 3, 13, 10), tensor_axis())


class Pooled(nn.Module):
    """Flattens what has one place left."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0] if x.dim() == 4 else x


class Excited(nn.Module):
    """Channels scaled by what is seen of all rows (Hu et al. 2018), channels last (Liu et al. 2022), an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.restore, self.inside = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Linear(4, 4)
        self.norm, self.place = nn.LayerNorm(4), nn.Parameter(torch.randn(1, 4, 7, 1))
        self.time = nn.Linear(3, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.place + self.time(time)[:, :, None, None]
        scale = torch.sigmoid(self.restore(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        y = self.inside(self.norm((x * scale).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        first, second = y.chunk(2, 1)
        return torch.cat([first * second, x[:, 1:]], 1) / x.square().mean()


@ranks(2, 3)
def test_whole_tensors_inside_of_a_region_have_whole_gradients() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.time = Excited(), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, time=self.time(x[:, :2, 0, 0])).square()

    compare_channels(made(Around), {"net": "space"}, numbers(3, 4, 7, 5), tensor_axis())


@ranks(2)
def test_a_region_can_be_checkpointed_as_a_whole() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    axis, x = tensor_axis(), numbers(2, 3, 7, 5).requires_grad_()
    plain, cut = made(Kept), made(Kept)
    apply(cut, {"net": "space"}, axis, Draw(0))
    (one,), (two,) = (torch.autograd.grad(model(x).pow(3).sum(), x) for model in (plain, cut))
    torch.testing.assert_close(two, one, **CLOSE)


class Residual(nn.Module):
    """Blocks in a loop, each a region; nothing says how to cut it into stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@ranks(4)
def test_regions_in_stages_train_and_evaluate_as_one_process() -> None:
    torch.set_num_threads(1)
    x, wanted, found = numbers(4, 3, 6, 5), numbers(4, 2, 6, 5), []
    for degrees in ({"pipeline": 2, "tensor": 2}, {"data": 4}):  # replicas with the same samples are one process
        mesh = hp.init(**degrees)
        model = hp.parallelize(made(Residual), mesh, loss=nn.MSELoss(), example=x, plan={"blocks.*": "space"})
        optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        for _ in range(2):
            loss = model.train_step((x, wanted))
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss)
        found.append(model.eval_step((x, wanted)))
        mesh.close()
    torch.testing.assert_close(found[:3], found[3:], **CLOSE)


# ---- refusals


class Calls(nn.Module):
    """Calls what it is given on the output of a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


HIDDEN = torch.ones(1, 2, 1, 1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: x.flatten(1), "net.1: torch's flatten of a tensor whose rows are cut is not known"),
        (lambda x: x.view(2, -1), "torch's view of a tensor whose rows are cut"),
        (lambda x: torch.cat([x, x], 2), "cat along the rows"),
        (lambda x: x.softmax(2), "softmax along the rows"),
        (lambda x: x[:, :, 1:], "an index other than slices of the dims that are not cut"),
        (lambda x: x + x.transpose(2, 3), "one function of tensors of 5 rows"),
        (lambda x: x + torch.zeros(1, 1, 3, 1), r"a tensor of shape \[1, 1, 3, 1\] beside one of 5 rows along dim -2"),
        (lambda x: F.dropout(x, 0.5), "dropout, which draws other numbers in every layout"),
        (lambda x: x + torch.rand(1), "rand, which draws other numbers"),
        (lambda x: Doubled.apply(x) + 1, "the autograd function Doubled, whose backward would see the rows here"),
        (lambda x: Doubled.apply(x), "net: the autograd function Doubled"),
        (lambda x: x * HIDDEN, r"a tensor of shape \[1, 2, 1, 1\] whose origin is not seen .an attribute"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "interpolate with mode='bicubic'"),
        (
            lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
            "torch's max_pool2d_with_indices of a tensor whose rows are cut",
        ),
        (lambda x: F.conv2d(x, torch.zeros(1, 2, 9, 1)), "a window of 9 rows .padding 0. on 5 rows"),
        (lambda x: F.adaptive_max_pool2d(x, 2), "adaptive_max_pool2d to 2 rows .1 is."),
    ],
)
@ranks(2)
def test_what_has_no_rule_is_refused(function: Callable[[Tensor], Tensor], words: str) -> None:
    model = nn.ModuleDict({"net": nn.Sequential(nn.ReLU(), Calls(function))})
    apply(model, {"net": "space"}, tensor_axis(), Draw(0))
    with pytest.raises(ValueError, match=words):
        model["net"](torch.zeros(2, 2, 5, 5))


def test_what_cannot_be_a_region_is_refused_before_it_runs() -> None:
    for inner, plan, words in (
        (nn.LSTM(4, 4), {"net": "space"}, 'net.0 is a LSTM, which is not known to style "space"; give the style to'),
        (nn.Conv2d(2, 2, 1), {"net": "space", "net.0": "space"}, 'net.0 has the style "space" inside of a module of'),
        (nn.Conv2d(2, 2, 1), {"net": "space", "*.0": "conv row"}, 'net.0 has the style "conv row" inside'),
    ):
        with pytest.raises(ValueError, match=words):
            apply(nn.ModuleDict({"net": nn.Sequential(inner)}), plan, ALONE, Draw(0))
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    space.shard(model, ALONE, "net")
    with pytest.raises(ValueError, match="net.0 was called outside of the region net"):
        model[0](torch.zeros(1, 2, 5, 5))
    with pytest.raises(ValueError, match=r"net: .* cuts inputs \[b, c, rows, ..\], and one of shape \[2, 3\]"):
        model(torch.zeros(2, 3))


@ranks(2, 4)
@pytest.mark.parametrize("plan", [{"0": "space", "1": "space"}, {"1.*": "space"}, RESNET], ids=str)
def test_a_step_of_a_cut_resnet_equals_one_process(plan: Mapping[str, str], rank_count: int) -> None:
    world = hp.init(tensor=2, seed=0)
    plain, targets = made(resnet), torch.arange(6) % 4
    model = hp.parallelize(made(resnet), world, loss=nn.CrossEntropyLoss(), plan=plan)
    x = numbers(6, 3, 9, 8)
    here = slice(3 * world.place.data, 3 * world.place.data + 3) if rank_count == 4 else slice(None)
    loss = model.train_step((x[here], targets[here]), microbatches=1)
    scores = [plain(x[part]) for part in ((slice(0, 3), slice(3, 6)) if rank_count == 4 else (slice(None),))]
    expected = F.cross_entropy(torch.cat(scores), targets)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for chunk in model.chunks():
        for name, p in chunk:  # each replica's gradient is averaged by an optimizer; here by hand
            mean = world.peers.allreduce(p.grad.clone()) / world.peers.size
            spec = model.specs()[name]
            found = whole(mean, replace(spec, partial=False), world.tensor) if spec.dim is not None else mean
            torch.testing.assert_close(found, plain.get_parameter(name).grad, **CLOSE)
    world.close()


@ranks(2)
def test_a_region_is_not_cut_into_stages() -> None:
    mesh = hp.init(pipeline=2)
    convs = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    words = r'has the model itself run as one piece \(style "space"\), and a pipeline stage may begin at its part 0'
    with pytest.raises(ValueError, match=words):
        hp.parallelize(convs, mesh, F.mse_loss, plan={"": "space"})
    for plan, name in (({"body": "space"}, "body"), ({"": "space"}, "the model itself")):
        net = nn.ModuleDict({"body": convs})
        with pytest.raises(ValueError, match=f"outside of {name}, which the tensor plan has run as one piece"):
            hp.parallelize(net, mesh, F.mse_loss, plan=plan, example=torch.zeros(1, 1, 4, 4))
    mesh.close()
