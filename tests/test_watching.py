"""Watching: reports without processes, then what ranks report of a training, and what they warn of."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybridpar.watch import writers
from hybridpar.watch.drift import checksum
from hybridpar.watch.finite import Finite
from hybridpar.watch.metrics import Metrics
from hybridpar.watch.progress import Line
from hybridpar.watch.traffic import Traffic
from hybridpar.watch.work import Work, compiled
from hybridpar.watch.writers import JsonLines, TensorBoard
from hybridpar.wires.axis import Alone
from tests.models import SAMPLES, TOKENS, gpt, layers, mine, numbers, tokens
from tests.ranks import ranks

REPORT = Metrics(
    12, 5.25, seconds=0.5, samples=32.0, tokens=4096.0, norm=1.5, flops=2e9, peak=0.4, bubble=0.25,
    sent={"data": 3.1e6, "tensor": 0.0}, memory=512_000_000, more={"lr": 0.001}, warnings=("too hot",),
)  # fmt: skip


# ---- reports


def test_a_report_is_one_line_of_words() -> None:
    assert REPORT.words(total=300) == (
        "step 12/300  loss 5.250  norm 1.50  4,096 tokens/s  2 GFLOP/s (40% of peak)  bubble 25%  data 3.1 MB  "
        "memory 512 MB  lr 0.001  left 2:24"
    )
    assert Metrics(1, 2.0).words() == "step 1  loss 2.000"
    assert "3.0 samples/s" in Metrics(1, 2.0, samples=3.0).words()


def test_json_lines_hold_each_report_and_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    for _ in range(2):  # a run that goes on adds to the file
        writer = JsonLines(path)
        writer.write(REPORT)
        writer.write(Metrics(13, math.nan))
        writer.close()
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert told[:2] == told[2:] and told[1] == {"step": 13, "loss": None}
    assert told[0]["sent.data"] == 3.1e6 and told[0]["lr"] == 0.001 and told[0]["warnings"] == ["too hot"]


def test_a_checksum_of_tensorboards_files_is_that_of_the_standard() -> None:
    masked = struct.unpack("<I", writers._checksum(b"123456789"))[0]
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (turned << 15 | turned >> 17) & 0xFFFFFFFF == 0xE3069283  # the check value of CRC-32C (RFC 3720)


def test_tensorboard_finds_every_number_in_its_file(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path)
    writer.write(REPORT)
    writer.write(Metrics(300, 4.5))
    writer.close()
    (path,) = tmp_path.iterdir()
    first, *events = [dict(fields(event)) for event in records(path.read_bytes())]
    assert first[3] == b"brain.Event:2"
    found = [(event[2], value_of(one)) for event in events for _, one in fields(event[5])]
    assert found[-1] == (300, ("loss", 4.5))
    told = dict(value for step, value in found if step == 12)
    assert told["sent/data"] == pytest.approx(3.1e6) and told["norm"] == 1.5 and len(told) == len(REPORT.numbers())


def records(data: bytes) -> Iterator[bytes]:
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, whole = data[12 : 12 + length], 16 + length
        assert writers.record(event) == data[:whole]
        yield event
        data = data[whole:]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer."""
    while message:
        number, kind, message = message[0] >> 3, message[0] & 7, message[1:]
        if kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield number, struct.unpack("<d" if kind == 1 else "<f", message[:size])[0]
        else:
            length, shift = 0, 0
            while True:
                byte, message = message[0], message[1:]
                length, shift = length | (byte & 0x7F) << shift, shift + 7
                if byte < 0x80:
                    break
            size = length if kind == 2 else 0
            yield number, message[:size] if kind == 2 else length
        message = message[size:]


def value_of(message: bytes) -> tuple[str, float]:
    parts = dict(fields(message))
    return parts[1].decode(), parts[2]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_of_progress_is_alive_on_a_terminal_and_rare_in_a_file() -> None:
    file = io.StringIO()
    line = Line(300, file)
    for step in range(1, 101):
        line.show(Metrics(step, 2.0))
    line.close()
    assert [text.split()[1] for text in file.getvalue().splitlines()] == ["1/300", "100/300"]
    terminal = _Terminal()
    line = Line(300, terminal)
    line.show(REPORT)
    line.close()
    assert "warning: too hot" in terminal.getvalue() and "loss 5.250" in terminal.getvalue()


# ---- what is counted


def test_work_is_counted_once_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    work = Work([model])
    model(torch.ones(3, 4)).sum().backward()
    with torch.no_grad():
        model(torch.ones(3, 4))
    assert work.stop() == 3 * 2 * 3 * (4 * 6 + 6 * 2)
    model(torch.ones(3, 4))
    assert work.stop() == 3 * 2 * 3 * (4 * 6 + 6 * 2)
    assert not compiled([model])


def test_attention_counts_as_its_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    attention = Attention()
    work = Work([attention])
    attention(torch.ones(2, 3, 8, 16, requires_grad=True))  # [b, heads, l, d]
    assert work.stop() == 3 * 2 * (2 * 2 * 3 * 8 * 8 * 16)


def test_bytes_are_counted_once_however_an_axis_does_it_and_no_more_after_close() -> None:
    axis = Alone("data")
    traffic = Traffic({"data": [axis]})
    axis.allreduce(torch.zeros(4))  # by way of start_allreduce
    axis.send(torch.zeros(2, dtype=torch.float64), 0, 1)
    axis.alltoall([torch.zeros(3)])
    axis.broadcast(torch.zeros(1), 0)
    assert traffic.bytes == {"data": 16 + 16 + 12 + 4}
    traffic.close()
    axis.allreduce(torch.zeros(4))
    assert traffic.bytes == {"data": 48} and not {"allreduce", "send"} & set(vars(axis))


def test_gradients_that_are_not_finite_are_named_and_then_forgotten() -> None:
    model = layers(3, 4, 2)
    finite = Finite(model.named_parameters())
    model(torch.ones(1, 3).double()).sum().backward()
    assert finite.wrong() == []
    (model(torch.ones(1, 3).double()) * torch.tensor([1.0, torch.inf])).sum().backward()
    assert finite.wrong()[-1] == "2.bias"
    assert finite.wrong() == []
    finite.close()
    (model(torch.ones(1, 3).double()) * torch.nan).sum().backward()
    assert finite.wrong() == []


def test_parameters_that_are_unfrozen_later_are_looked_at_too() -> None:
    weight = nn.Parameter(torch.ones(2), requires_grad=False)
    finite = Finite([("w", weight)])
    assert finite.wrong() == []
    weight.requires_grad_(True)
    finite.renew()
    (weight * torch.nan).sum().backward()
    assert finite.wrong() == ["w"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int8])
def test_a_checksum_tells_a_single_bit_and_an_exchange(dtype: torch.dtype) -> None:
    x = torch.arange(24).to(dtype).view(4, 6)
    other, swapped = x.clone(), x.clone()
    other[2, 3] += 1
    swapped[0], swapped[1] = x[1], x[0]
    assert len({checksum(x), checksum(other), checksum(swapped)}) == 3
    assert checksum(x) == checksum(x.t().contiguous().t()) and checksum(x[:0]) == 0


# ---- ranks


def training(mesh: Any, optimizer: str = "ours", clip: float | None = None, **watching: Any) -> tuple[Any, Any, Any]:
    import hybridpar as hp

    model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = hp.DistributedOptimizer(sgd, model, clip=clip) if optimizer == "ours" else sgd
    return model, wrapped, hp.Watch(model, wrapped, progress=False, **watching)


def stepped(model: Any, optimizer: Any, watch: Any, step: int) -> Metrics | None:
    ids, targets = tokens(step)
    data = model.world.data
    batch = mine(ids, data), mine(targets, data)
    loss = model.train_step(batch, 2)
    optimizer.step()
    optimizer.zero_grad()
    return watch.step(loss, batch, lr=0.5)


@ranks(1, 4)
@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"pipeline": 2}, {"data": 4}])
def test_every_layout_reports_the_training_of_one_process(
    degrees: dict[str, int], rank_count: int, tmp_path: Path
) -> None:
    import hybridpar as hp

    torch.set_num_threads(1)
    mesh = hp.init(**(degrees if rank_count > 1 else {}))
    model, optimizer, watch = training(mesh, clip=0.3, jsonl=tmp_path / "m.jsonl", tensorboard=tmp_path / "tb")
    told = [stepped(model, optimizer, watch, step) for step in range(3)]
    watch.close()
    mesh.everyone.barrier()
    plain = gpt()
    for step, metrics in enumerate(told):
        ids, targets = tokens(step)
        loss = nn.functional.cross_entropy(plain(ids).transpose(1, 2), targets)
        plain.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * p.grad
        assert metrics.loss == pytest.approx(loss.item(), abs=1e-10)
        assert metrics.norm == pytest.approx(norm.item(), rel=1e-9), "the norm before clipping"
        assert metrics.warnings == () and metrics.step == step + 1 and metrics.more == {"lr": 0.5}
    last = told[-1]
    assert last.tokens / last.samples == pytest.approx(TOKENS) and last.samples * last.seconds == pytest.approx(SAMPLES)
    assert last.flops > 0 and last.peak > 0 and last.memory > 10**7
    assert (last.bubble is not None) == (mesh.pipeline.size > 1)
    assert {axis for axis, count in last.sent.items() if count} == {
        axis for axis in ("data", "pipeline", "tensor") if getattr(mesh, axis).size > 1
    }
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 3 and len(list((tmp_path / "tb").iterdir())) == 1
    assert len(set(mesh.everyone.objects(json.dumps([m.record() for m in told])))) == 1
    mesh.close()


@ranks(2)
def test_work_of_replicas_adds_up_to_that_of_one_process() -> None:
    import hybridpar as hp

    mesh = hp.init()
    model, optimizer, watch = training(mesh, best=1e9)
    first, second = (stepped(model, optimizer, watch, step) for step in range(2))
    plain = gpt()
    work = Work([plain])
    plain(tokens(1)[0])
    mesh.close()
    assert first.seconds is None and first.flops is None
    assert second.flops * second.seconds == pytest.approx(work.stop())
    assert second.peak == pytest.approx(second.flops / 2e9)


@ranks(2)
def test_replicas_of_a_plain_optimizer_are_told_of_at_the_first_check_and_why() -> None:
    import hybridpar as hp

    mesh = hp.init()
    model, optimizer, watch = training(mesh, "plain")
    (said,) = stepped(model, optimizer, watch, 0).warnings
    assert said.startswith("step 1: replicas 0 and 1 (ranks 0 and 1) differ in") and "by up to" in said
    assert "the optimizer is a plain SGD, which averages no gradients: use hp.DistributedOptimizer" in said
    model, optimizer, watch = training(mesh, "plain", strict=True)
    with pytest.raises(ValueError, match="differ in .* parameters"):
        stepped(model, optimizer, watch, 0)
    mesh.close()


@ranks(4)
@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_weights_that_drift_are_told_at_the_next_check(axis: str) -> None:
    import hybridpar as hp

    torch.set_num_threads(1)
    mesh = hp.init(tensor=2)
    model, optimizer, watch = training(mesh, drift=3)
    told = []
    for step in range(6):
        if step == 3 and mesh.rank == 3:
            whole = axis == "tensor"
            p = next(p for name, p in model.named_parameters() if (model.specs()[name].dim is None) is whole)
            with torch.no_grad():
                p.view(-1)[-1] += 1e-7
        told.append(stepped(model, optimizer, watch, step).warnings)
    mesh.close()
    assert told[:5] == [()] * 5, "a check after steps 1, 3 and 6"
    assert any("replicas 0 and 1 (ranks 1 and 3) differ in" in said for said in told[5])
    assert any("tensor ranks 0 and 1 (ranks 2 and 3) differ in" in said for said in told[5]) or axis == "data"


@ranks(2)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_gradient_that_is_not_finite_is_told_with_its_parameter_and_rank_once(pipeline: int) -> None:
    import hybridpar as hp

    mesh = hp.init(pipeline=pipeline)
    model, optimizer, watch = training(mesh)
    handle = None
    if mesh.rank == 1:
        name, p = list(model.named_parameters())[-2]
        handle = p.register_hook(lambda gradient: gradient * torch.nan)
        watch.close()
        watch = hp.Watch(model, optimizer, progress=False)  # its own look comes after
    else:
        watch.close()
        watch = hp.Watch(model, optimizer, progress=False)
    first, second = (stepped(model, optimizer, watch, step).warnings for step in range(2))
    if handle is not None:
        handle.remove()
    named = mesh.everyone.objects(name if mesh.rank == 1 else None)[1]
    mesh.close()
    place = f"(data {1 if pipeline == 1 else 0}, pipeline {pipeline - 1}, tensor 0)"
    assert f"step 1: the gradient of {named} is not finite on rank 1 {place}, before it is averaged" in first
    assert not any("rank 0" in said for said in first) and not any("gradient" in said for said in second)


@ranks(2)
def test_steps_between_reports_send_nothing() -> None:
    import hybridpar as hp

    mesh = hp.init()
    watch = training(mesh, every=4, drift=None, best=1e9)[2]
    axes = (mesh.everyone, mesh.replica, mesh.data, mesh.peers)
    sent = []
    for step in range(1, 9):
        traffic = Traffic({"all": axes})
        assert (watch.step(1.0) is not None) == (step in (1, 4, 8))
        sent.append(traffic.bytes["all"])
        traffic.close()
    mesh.close()
    assert [step for step, count in enumerate(sent, 1) if count] == [1, 4, 8]
    assert max(sent) < 200


@ranks(2)
def test_a_replica_that_its_policy_lets_go_ahead_is_not_held_back_by_reports() -> None:
    import hybridpar as hp

    mesh = hp.init()
    model = hp.parallelize(gpt(), mesh, loss=hp.CrossEntropy())
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sync="async_ps(3)")
    watch = hp.Watch(model, optimizer, progress=False, drift=1, best=1e9)
    told = [stepped(model, optimizer, watch, step) for step in range(2)]
    if mesh.rank == 1:
        told += [stepped(model, optimizer, watch, step) for step in range(2, 4)]
    mesh.everyone.barrier()
    mesh.close()
    assert all(metrics.warnings == () and 0 <= metrics.staleness <= 3 for metrics in told)


def test_numbers_of_steps_below_one_are_refused() -> None:
    from hybridpar.watch.watch import Watch

    for name in ("every", "drift"):
        with pytest.raises(ValueError, match=f"{name}=0: a number of steps is at least 1"):
            Watch(None, **{name: 0})
    with pytest.raises(ValueError, match="cannot be written"):
        JsonLines("/proc/nowhere/metrics.jsonl")


def test_a_batch_is_counted_in_samples_and_where_it_has_ids_in_tokens() -> None:
    from hybridpar.watch.watch import _sizes

    assert _sizes(tokens(0)) == (SAMPLES, SAMPLES * TOKENS)
    assert _sizes((numbers(5, 3), numbers(5))) == (5, 0)
    assert _sizes(({"ids": tokens(0)[0]}, None)) == (SAMPLES, SAMPLES * TOKENS)
    assert _sizes(None) == (0, 0)


def test_the_line_of_progress_is_alive_at_the_terminal_of_hybridpar_run_too() -> None:
    pipe = io.StringIO()
    line = Line(300, pipe, columns=100)
    line.show(REPORT)
    line.close()
    assert "\x1b[" in pipe.getvalue() and "loss 5.250" in pipe.getvalue()


@ranks(2)
def test_overflows_of_fp16_are_counted_and_told_of_only_where_no_scale_helps() -> None:
    import hybridpar as hp

    mesh = hp.init()
    model = hp.parallelize(gpt(dtype=torch.float32), mesh, loss=hp.CrossEntropy(), precision="fp16")
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model.scaling.scale = 2.0**40
    watch = hp.Watch(model, optimizer, progress=False, strict=True)
    last = [stepped(model, optimizer, watch, step) for step in range(3)][-1]
    assert (last.scale, last.skipped) == (2.0**37, 3) and "skipped 3" in last.words()
    model.scaling.scale = 1.0
    next(model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    watch.close()
    watch = hp.Watch(model, optimizer, progress=False, best=1e9)
    (said,) = set(stepped(model, optimizer, watch, 0).warnings[:1])
    mesh.close()
    assert "is not finite on rank 0" in said


@ranks(1)
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_the_peak_is_that_of_what_products_are_computed_in(
    precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hybridpar as hp
    from hybridpar.watch import watch as module

    asked = []
    monkeypatch.setattr(module, "peak", lambda device, dtype: asked.append(dtype) or 1e9)
    mesh = hp.init()
    model = hp.parallelize(gpt(dtype=torch.float32), mesh, loss=hp.CrossEntropy(), precision=precision)
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    watch = hp.Watch(model, optimizer, progress=False)
    for step in range(2):
        stepped(model, optimizer, watch, step)
    mesh.close()
    assert asked == [torch.bfloat16 if precision else torch.float32]


@ranks(4)
@pytest.mark.parametrize("sync", ["diloco(2, inside=2)", "async_ps(1)"])
def test_bytes_of_a_sync_policy_are_counted_on_the_axes_that_it_opens(sync: str) -> None:
    import hybridpar as hp

    torch.set_num_threads(1)
    mesh = hp.init()
    model = hp.parallelize(layers(6, 8, 3), mesh, nn.MSELoss())
    optimizer = hp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sync=sync)
    watch = hp.Watch(model, optimizer, progress=False, best=1e9, drift=None, every=4)
    batch = numbers(4, 6), numbers(4, 3)
    for _ in range(4):
        loss = model.train_step(batch)
        optimizer.step()
        optimizer.zero_grad()
        metrics = watch.step(loss, batch) or watch
    optimizer.meet()
    mesh.close()
    weights = 8 * sum(p.numel() for p in model.parameters())
    company = 2 if "inside" in sync else 1
    # Gradients among two in each step and weights in each second one; or what moved and weights, three quarters each.
    least = company * weights * 1.3 if company == 2 else 1.2 * weights
    assert least < metrics.sent["data"] < 2 * least
