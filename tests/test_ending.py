"""How jobs end: each is a real launch, as a user would make it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import Job, run

# A rank is patient with others for half a minute, which no test needs.
IMPATIENT = """
from hybridpar.wires import farewell
farewell._ASK_SECONDS, farewell._END_SECONDS = 2, 5
"""
START = "mesh = hp.init()\nrank = mesh.rank\nx = torch.ones(4)\n"


def ended(job: Job, code: int | None, said: str) -> None:
    """The job ended with `code` (None: any but 0), `said` was said by one rank, and nobody is left."""
    assert job.code == code if code is not None else job.code != 0, job.said
    assert len(job.lines(said)) == 1, job.said
    assert job.left == ()


PIPELINE = """
mesh = hp.init(pipeline=2)
from torch import nn
class Broken(nn.Module):
    def forward(self, x):
        raise KeyError("boom")
module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1), Broken()))
model = hp.parallelize(module, mesh, loss=nn.MSELoss())
model.train_step((torch.ones(4, 4), torch.ones(4, 1)), microbatches=2)
"""
TENSOR = """
mesh = hp.init(tensor=2)
if mesh.rank == 1:
    raise KeyError("boom")
mesh.tensor.allreduce(torch.ones(4))
"""
REDUCTION = START + """
if rank == 1:
    mesh.data.allreduce(x)
    raise KeyError("boom")
mesh.data.allreduce(x)
mesh.data.allreduce(x)
"""
IN_FLIGHT = START + """
import horovod.torch as hvd
handles = [hvd.allreduce_async_(torch.ones(100000), name=f"g{i}") for i in range(20)]
if rank == 1:
    raise KeyError("boom")
hvd.allreduce_async_(x, name="never")
for handle in handles:
    hvd.synchronize(handle)
hvd.synchronize(hvd.allreduce_async_(x, name="nor this"))
"""
COMPUTING = START + """
if rank == 1:
    raise KeyError("boom")
while True:
    x @ x
"""
IN_INIT = """
class Broken:
    @property
    def rank(self):
        raise KeyError("boom")
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    hp.init(comm=Broken())
hp.init()
"""
THREAD = START + """
def work():
    raise KeyError("boom")
if rank == 1:
    threading.Thread(target=work).start()
mesh.everyone.barrier() if rank == 0 else time.sleep(1000)
"""
HOOK = """
mesh = hp.init(pipeline=2)
from torch import nn
model = hp.parallelize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), mesh, loss=nn.MSELoss())
def hook(p):
    raise KeyError("boom")
if mesh.rank == 1:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
model.train_step((torch.ones(4, 4), torch.ones(4, 1)), microbatches=2)
"""
ALL_AT_ONCE = START + """
raise KeyError("boom")
"""
OTHER_HOOK = START + """
def mine(kind, error, trace):
    print("mine:", repr(error), file=sys.stderr)
sys.excepthook = mine
if rank == 1:
    raise KeyError("boom")
mesh.everyone.barrier()
"""
EXIT_FUNCTION = START + """
import atexit
atexit.register(mesh.everyone.barrier)
raise KeyError("boom")
"""


@pytest.mark.parametrize(
    "body",
    [PIPELINE, TENSOR, REDUCTION, IN_FLIGHT, COMPUTING, IN_INIT, THREAD, HOOK, ALL_AT_ONCE, OTHER_HOOK, EXIT_FUNCTION],
    ids=[
        "while a stage waits for its message", "while the tensor axis reduces", "while Horovod reduces",
        "with reductions in flight", "while others compute", "in hp.init", "in a thread", "in a backward hook",
        "on all ranks at once", "under another excepthook", "with an exit function that would wait",
    ],
)  # fmt: skip
def test_an_exception_ends_the_job_and_is_told_once(tmp_path: Path, body: str) -> None:
    ended(run(tmp_path, body, ranks=2), 1, "KeyError('boom')" if "mine" in body else "KeyError: 'boom'")


@pytest.mark.parametrize("how", ["sys.exit(3)", "sys.exit('so')", "raise SystemExit(3)"])
def test_exit_codes_end_the_job(tmp_path: Path, how: str) -> None:
    job = run(tmp_path, IMPATIENT + START + f"if rank == 1:\n    {how}\nmesh.everyone.barrier()\n", ranks=2)
    if "raise" in how:  # nobody can see its code coming: the job ends because rank 0 waits for a rank that has left
        ended(job, 1, "for rank 1, which has ended its script")
    else:
        ended(job, *((1, "[rank 1] so") if "so" in how else (3, "[rank 1] hybridpar: sys.exit(3) ends the job")))


def test_an_exit_that_is_caught_ends_nothing(tmp_path: Path) -> None:
    body = START + """
try:
    sys.exit(3)
except SystemExit as error:
    assert error.code == 3
mesh.everyone.barrier()
"""
    job = run(tmp_path, body, ranks=2)
    assert (job.code, job.said, job.left) == (0, "", ())


def test_a_rank_may_end_long_before_the_others_without_hurting_them(tmp_path: Path) -> None:
    body = IMPATIENT + """
import horovod.torch as hvd
mesh = hp.init(tensor=2)
if mesh.data.index == 1:
    sys.exit(0)
if mesh.tensor.index == 0:
    time.sleep(15)  # the other waits for it, in a call that needs nobody who has left
mesh.tensor.allreduce(torch.ones(4))
assert hvd.size() == 2
print("finished", flush=True)
"""
    job = run(tmp_path, body, ranks=4)
    assert (job.code, job.said, job.left) == (0, "", ())
    assert job.out.count("finished") == 2


@pytest.mark.parametrize(
    "wait",
    ["mesh.everyone.barrier()", "mesh.data.allreduce(x)", "mesh.peers.recv(x, 1, 5).wait()", "mesh.close()"],
    ids=["a barrier", "Horovod", "a message", "the end of the world"],
)
def test_a_rank_that_waits_for_one_that_has_ended_says_so(tmp_path: Path, wait: str) -> None:
    job = run(tmp_path, IMPATIENT + START + f"if rank == 0:\n    {wait}\n", ranks=2)
    ended(job, 1, "for rank 1, which has ended its script")
    ended(job, 1, f"at {tmp_path}/script.py:{len((tmp_path / 'script.py').read_text().splitlines())}")


DEATHS = {
    "os._exit(5)": 5,
    "os.kill(os.getpid(), signal.SIGKILL)": 137,
    "os.kill(os.getpid(), signal.SIGTERM)": 143,
    "os.kill(os.getpid(), signal.SIGSEGV)": 139,
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_rank_that_dies_takes_the_job_with_it(tmp_path: Path, how: str) -> None:
    job = run(tmp_path, START + f"if rank == 1:\n    {how}\nmesh.data.allreduce(x)\n", ranks=2)
    assert (job.code, job.left) == (DEATHS[how], ()), job.said
    if "SEGV" in how:  # where Python was
        assert len(job.lines("script.py\", line 9")) == 1, job.said


INTERRUPTS = {
    "in Python": "time.sleep(1000)",
    "in a call that never returns": "mesh.peers.recv(x, 1, 5).wait()",
}


@pytest.mark.parametrize("where", INTERRUPTS)
def test_an_interrupt_of_a_rank_ends_the_job(tmp_path: Path, where: str) -> None:
    body = START + f"""
if rank == 0:
    threading.Timer(5, os.kill, (os.getpid(), signal.SIGINT)).start()
    {INTERRUPTS[where]}
time.sleep(1000)
"""
    job = run(tmp_path, body, ranks=2)
    ended(job, 130, "KeyboardInterrupt" if "Python" in where else "interrupted while waiting")


def test_ctrl_c_of_the_launcher_ends_all_ranks(tmp_path: Path) -> None:
    body = START + "if rank == 0:\n    os.kill(os.getppid(), signal.SIGINT)\nmesh.everyone.recv(x, 1, 5).wait()\n"
    job = run(tmp_path, body, ranks=2)
    assert job.code != 0 and job.left == ()


def test_what_was_printed_before_an_error_is_seen(tmp_path: Path) -> None:
    job = run(tmp_path, START + "print('last words', end='')\nif rank == 1:\n    raise KeyError('boom')\n", ranks=2)
    ended(job, 1, "KeyError: 'boom'")
    assert "last words" in job.out


# ---- before MPI, and without it


def test_an_error_before_hp_init_ends_the_job(tmp_path: Path) -> None:
    job = run(tmp_path, "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n    import nowhere\nhp.init()\n", ranks=2)
    ended(job, 1, "ModuleNotFoundError")


def test_a_rank_that_never_calls_hp_init_ends_the_job(tmp_path: Path) -> None:
    body = """
if os.environ['OMPI_COMM_WORLD_RANK'] == '0':
    open("begun", "w").close()
    hp.init()
while not os.path.exists("begun"):
    time.sleep(0.1)
time.sleep(8)  # Open MPI notices only if the others are in MPI_Init by then
"""
    job = run(tmp_path, body, ranks=2)
    assert job.code != 0 and job.left == (), job.said


def test_one_process_ends_as_python_does(tmp_path: Path) -> None:
    body = START + "import atexit\natexit.register(print, 'exit function')\n"
    job = run(tmp_path, body + "raise KeyError('boom')\n")
    assert (job.code, job.left) == (1, ())
    assert job.said.startswith("Traceback (most recent call last):\n") and job.said.endswith("KeyError: 'boom'\n")
    assert job.out == "exit function\n"
    assert run(tmp_path, body + "sys.exit(3)\n").code == 3
    assert run(tmp_path, body + "raise SystemExit(4)\n").code == 4


def test_one_process_is_told_its_mistake_in_a_sentence_with_the_place(tmp_path: Path) -> None:
    job = run(tmp_path, "hp.init(tensor=2)\n")
    assert (job.code, job.left) == (2, ())
    assert job.said.startswith("hybridpar: 1 ranks cannot be laid out") and "Traceback" not in job.said
    assert job.said.endswith("script.py:5\n")


def test_an_error_inside_hybridpar_that_is_no_sentence_keeps_its_traceback(tmp_path: Path) -> None:
    job = run(tmp_path, START + "from hybridpar.shard import balanced\nbalanced(1, 0)\n")
    assert job.code == 1 and "Traceback" in job.said and "ZeroDivisionError" in job.said
