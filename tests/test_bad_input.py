"""What users do wrong: a sentence on one rank with the numbers and the place, and an exit code, never a hang.

Start-up mistakes are real launches. Those that every rank finds for itself share one launch per mesh, each being caught
there; what is told once and with which code is then the ending's business, which test_ending.py shows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.jobs import PRELUDE, Job, run, run_command


def refused(job: Job, code: int, *patterns: str) -> None:
    """One sentence of hybridpar, without a traceback, that has all `patterns`; and nobody left."""
    said = job.lines("hybridpar: ")
    assert job.code == code and len(said) == 1, job.said
    for pattern in patterns:
        assert re.search(pattern, said[0]), f"{pattern!r} is not in {said[0]!r}"
    assert "Traceback" not in job.said and job.left == (), job.said


# ---- hp.init

STARTS = {
    "degrees that do not divide the world": ("hp.init(tensor=3)", {}, 2, "2 ranks cannot .*tensor=3.*start 3 ranks"),
    "degrees that need more ranks": ("hp.init(tensor=2, data=2)", {}, 2, "needs 4 ranks and 2 were started"),
    "a degree that is no number": ("hp.init()", {"HYBRIDPAR_TENSOR": "two"}, 2, "HYBRIDPAR_TENSOR='two' .*number"),
    "a degree of 0": ("hp.init(tensor=0)", {}, 2, "tensor=0: a degree is a whole number of at least 1"),
    "different seeds": (
        "hp.init(seed=int(os.environ['OMPI_COMM_WORLD_RANK']))", {}, 2, "rank 1 .*seed=1 and rank 0 with seed=0",
    ),
    "an unknown carrier": ("hp.init(carrier='smoke')", {}, 2, "carrier 'smoke'.*mpi, nccl or gloo"),
    "Horovod started by the script": (
        "import horovod.torch as hvd\nhvd.init()\nhp.init()", {}, 2, r"hvd.init\(\) was called before hp.init\(\)",
    ),
    "no MPI library": ("hp.init()", {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, 1, "MPI is missing.*hybridpar.install"),
}  # fmt: skip


@pytest.mark.parametrize("what", STARTS)
def test_a_start_is_refused_with(tmp_path: Path, what: str) -> None:
    body, env, code, pattern = STARTS[what]
    refused(run(tmp_path, body + "\n", ranks=2, env=env), code, pattern)


def test_different_scripts_on_ranks_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(PRELUDE + f"hp.init()  # {name}\n")
    either = "import os, runpy, sys; r = os.environ['OMPI_COMM_WORLD_RANK']; sys.argv = ['ab'[int(r)] + '.py']; "
    command = [sys.executable, "-c", either + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    refused(run_command(tmp_path, command, ranks=2), 2, "rank 1 .*script=b.py and rank 0 with script=a.py")


SHADOWS: Mapping[str, tuple[dict[str, str], str]] = {
    "mpi4py that is not there": (
        {"mpi4py/__init__.py": "raise ModuleNotFoundError(\"No module named 'mpi4py'\")"},
        "MPI is missing.*mpi4py.*python -m hybridpar.install",
    ),
    "Horovod that is not there": (
        {"horovod/__init__.py": "raise ModuleNotFoundError(\"No module named 'horovod'\")"},
        "Horovod .*cannot be loaded.*python -m hybridpar.install",
    ),
    "Horovod without PyTorch": (
        {
            "horovod/__init__.py": "__version__ = '0.28.1'",
            "horovod/torch/__init__.py": "raise ImportError('Extension horovod.torch has not been built')",
        },
        "Horovod .*has not been built.*python -m hybridpar.install",
    ),
    "Horovod of another torch": (
        {
            "horovod/__init__.py": "__version__ = '0.28.1'",
            "horovod/metadata.json": '{"pytorch": "1.13.0"}',
            "horovod/torch/__init__.py": "raise ImportError('undefined symbol: _ZN5torch')",
        },
        "Horovod 0.28.1 was built for torch 1.13.0 and torch .* is installed.*python -m hybridpar.install",
    ),
}


@pytest.mark.parametrize("what", SHADOWS)
def test_an_installation_is_refused_that_has(tmp_path: Path, what: str) -> None:
    files, pattern = SHADOWS[what]
    for name, text in files.items():
        path = tmp_path / "shadow" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    job = run(tmp_path, "sys.path.insert(0, 'shadow')\nhp.init()\n", ranks=2)
    refused(job, 1, pattern)


def test_worlds_of_one_that_another_mpirun_started_are_refused(tmp_path: Path) -> None:
    start = "import os, subprocess, sys; env = {**os.environ, 'OMPI_COMM_WORLD_SIZE': '2'}; " + (
        "ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**env, 'OMPI_COMM_WORLD_RANK': str(r)}) "
        "for r in range(2)]; sys.exit(max(r.wait() for r in ranks))"
    )
    (tmp_path / "script.py").write_text(PRELUDE + "hp.init()\n")
    job = run_command(tmp_path, [sys.executable, "-c", start, "script.py"], ranks=None)
    refused(job, 1, "started 2 processes .*MPI world of 1.*hybridpar run")


# ---- what every rank finds for itself

CASES = """
from torch import nn
from hybridpar.models.gpt import GPT
def gpt(**other):
    torch.manual_seed(1)
    return GPT(**{"vocabulary": 12, "width": 8, "depth": 2, "heads": 2, "context": 8, **other})
def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
def model(**other):
    return hp.parallelize(plain(), mesh, loss=nn.MSELoss(), **other)
class NoChain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
x, y = torch.ones(4, 4), torch.ones(4, 1)
def tell(name, text):
    with open(f"told-{mesh.rank}", "a") as file:
        file.write(f"{name}: {text}\\n")
def case(name, function):
    try:
        tell(name, function())
    except ValueError as error:
        tell(name, error)
    mesh.everyone.barrier()
"""
ON_TENSOR = CASES + """
mesh = hp.init(tensor=2)
case("heads", lambda: hp.parallelize(gpt(heads=1), mesh))
case("vocabulary", lambda: hp.parallelize(gpt(vocabulary=1), mesh))
case("plan", lambda: hp.parallelize(gpt(), mesh, plan={"blocks.*.mlp.upp": "column"}))
case("style", lambda: hp.parallelize(gpt(), mesh, plan={"blocks.*.mlp.up": "columns"}))
case("weights", lambda: hp.parallelize(nn.Linear(4, 4 + mesh.rank), mesh))
torch.manual_seed(mesh.rank)
case("values", lambda: hp.parallelize(nn.Linear(4, 4), mesh))
case("ids", lambda: hp.parallelize(gpt(), mesh).predict(torch.full((2, 4), 12)))
case("batches", lambda: model().train_step((x * mesh.rank, y)))
"""
ON_PIPELINE = CASES + """
mesh = hp.init(pipeline=2)
open("three.csv", "w").write(hp.parallelize(plain(), mesh, schedule="1f1b").schedule(3).to_csv())
case("stages", lambda: hp.parallelize(nn.Sequential(nn.Linear(4, 4)), mesh))
case("given stages", lambda: model(stages=[3, 1]))
case("chain", lambda: hp.parallelize(NoChain(), mesh))
case("chain names", lambda: hp.parallelize(NoChain(), mesh, chain=("a", "c")))
case("schedule", lambda: model(schedule="zigzag"))
case("csv", lambda: model(schedule="three.csv").train_step((x, y), microbatches=2))
case("no csv", lambda: model(schedule="four.csv"))
case("optimizer", lambda: hp.DistributedOptimizer(torch.optim.SGD([nn.Parameter(x)], 0.1), model()))
case("called", lambda: model()(x))
case("no loss", lambda: hp.parallelize(plain(), mesh).train_step((x, y)))
"""
ON_DATA = CASES + """
mesh = hp.init()
case("microbatches", lambda: model().train_step((x, y), microbatches=5))
case("no microbatch", lambda: model().train_step((x, y), microbatches=0))
case("lengths", lambda: model().train_step((x, y[:3])))
case("pair", lambda: model().train_step(x))
case("one-stage schedule", lambda: model(schedule="zigzag"))
m = model()
def optimizer(parameters):
    return hp.DistributedOptimizer(torch.optim.SGD(parameters, 0.1), m)
case("optimizer", lambda: optimizer(model().parameters()))
case("some", lambda: optimizer(list(m.parameters())[:1]))
case("closure", lambda: optimizer(m.parameters()).step(lambda: 0))
case("batch size", lambda: hp.DataLoader(torch.utils.data.TensorDataset(x, y), mesh, batch_size=1))
case("nan", lambda: model().train_step((x * float("nan"), y)))
"""
SENTENCES = {
    "tensor": (
        ON_TENSOR,
        {
            "heads": "1 heads cannot be cut over tensor=2 at blocks.0.attention; use tensor=1",
            "vocabulary": "a vocabulary of 1 cannot be cut over tensor=2",
            "plan": '"blocks.*.mlp.upp" matches no module; the nearest are blocks',
            "style": 'has the style "columns"; the styles are column, row',
            "weights": "differs between ranks",
            "values": "differs between ranks",
            "batches": "the 2 ranks of one replica were given different batches (this one: 4 samples, microbatches=1)",
            "ids": "ids from 12 to 12 for a vocabulary of 12",
        },
    ),
    "pipeline": (
        ON_PIPELINE,
        {
            "stages": "2 stages cannot be cut from 1 layers",
            "given stages": "stages=[3, 1] must be 2 numbers of at least 1 that add up to the 2 parts",
            "chain": "NoChain cannot be cut into pipeline stages",
            "chain names": "chain names 'c', and NoChain has a, b",
            "schedule": "no schedule is called 'zigzag'; take gpipe, 1f1b",
            "csv": "three.csv is for 2 ranks and 3 microbatches, and 2 ranks with 2 microbatches",
            "no csv": "four.csv cannot be read",
            "optimizer": "is not one that this rank's part of the model owns",
            "called": "a parallel model is not called: use train_step(batch)",
            "no loss": "without a loss",
        },
    ),
    "data": (
        ON_DATA,
        {
            "microbatches": "microbatches=5 is more than the 4 samples of this replica's batch: use 4 or fewer",
            "no microbatch": "microbatches=0: there must be 1 or more",
            "lengths": "same number of samples along dim 0, not [3, 4]",
            "pair": "a batch is a pair (inputs, targets)",
            "one-stage schedule": "no schedule is called 'zigzag'",
            "optimizer": "is not one that this rank's part of the model owns",
            "some": "the optimizer lacks",
            "closure": "step(closure) is not possible",
            "batch size": "batch_size=1 is shared by 2 replicas",
            "nan": "nan",
        },
    ),
}


@pytest.mark.parametrize("axis", SENTENCES)
def test_every_rank_refuses_along_the_axis(tmp_path: Path, axis: str) -> None:
    body, sentences = SENTENCES[axis]
    job = run(tmp_path, body, ranks=2)
    assert job.code == 0, job.said
    for rank in range(2):
        told = dict(line.split(": ", 1) for line in (tmp_path / f"told-{rank}").read_text().splitlines())
        assert {name: text for name, text in told.items() if sentences[name] not in text} == {}
        assert told.keys() == sentences.keys()


# ---- what only one rank can see


def test_a_loss_that_is_a_vector_is_refused_by_the_last_stage(tmp_path: Path) -> None:
    body = CASES + """
mesh = hp.init(pipeline=2)
model = hp.parallelize(plain(), mesh, loss=nn.MSELoss(reduction="none"))
model.train_step((x, y), microbatches=2)
"""
    refused(run(tmp_path, body, ranks=2), 2, r"the loss function returned shape \[2, 1\] and must return one number")


def test_one_replica_with_a_bad_batch_ends_the_job(tmp_path: Path) -> None:
    body = CASES + "mesh = hp.init()\nmodel().train_step((x, y[: 4 - mesh.rank]))\n"
    job = run(tmp_path, body, ranks=2)
    refused(job, 2, r"\[rank 1\] .*same number of samples along dim 0, not \[3, 4\]")
    assert job.lines("script.py:"), job.said
