"""Horovod's thread and MPI in the main thread do not wait for each other.

The deadlock that this is about: the first lower-case (pickle) collective of mpi4py on a communicator duplicates it
while holding Python's interpreter lock. Horovod's thread on that rank needs the lock to let go of a finished tensor;
while it waits, it cannot take part in what the other ranks need before they come to the duplication. About one start in
twenty hung, or nearly all where Horovod had several groups in one world. hybridpar never calls such a collective
(test_walls.py looks for them in the source). Here are the same conditions: on each rank the first operation of every
kind on every axis runs while Horovod reduces many tensors, in two groups that are not in step.

This is a stress and no proof. With lower-case calls in the place of ours six launches of it did not hang either, so it
is the look at the source that keeps the deadlock out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import run

ROUNDS = 80
BODY = f"""
import random
from hybridpar.wires.message import Mailbox
mesh = hp.init(tensor=2)
rank, other = mesh.rank, 1 - mesh.tensor.index
box = Mailbox(mesh.tensor, mesh.device)
wander = random.Random(rank)
for round in range({ROUNDS}):
    sums = [mesh.data.start_allreduce(torch.ones(1 + 997 * i), "sum", f"tensor {{i}}") for i in range(8)]
    if wander.random() < 0.2:
        time.sleep(0.01 * wander.random())  # the two groups of Horovod go out of step
    assert mesh.tensor.objects(("round", round, rank)) == [("round", round, r) for r in mesh.tensor.ranks]
    box.post(other, round, [torch.full((round + 1,), float(rank))], value=round)
    assert mesh.everyone.objects(rank) == [0, 1, 2, 3]
    wander.shuffle(sums)
    assert mesh.replica.allgather(torch.ones(rank + 1)).shape == (sum(r + 1 for r in mesh.replica.ranks),)
    (came,), value = box.take(other, round)
    assert value == round and came.unique().item() == mesh.tensor.ranks[other] and came.shape == (round + 1,)
    for one in sums:
        assert one.wait().unique().item() == 2
    assert mesh.peers.objects(round) == [round, round]
    box.flush()
print("done", flush=True)
"""


@pytest.mark.parametrize("launch", range(3))
def test_messages_and_reductions_do_not_lock_each_other_out(tmp_path: Path, launch: int) -> None:
    job = run(tmp_path, BODY, ranks=4)
    assert (job.code, job.said, job.out.count("done")) == (0, "", 4)
