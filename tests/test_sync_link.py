"""Replicas on two hosts with a slow and long link between them: who waits for it.

The hosts are namespaces of this machine (tests/hosts/cluster.py). Each step lasts 50 ms; 20 Mbit/s let the gradients
through in 0.24 s. What is asserted follows from those numbers and leaves room for a busy machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.hosts.cluster import cluster, missing
from tests.hosts.slow import SECONDS, STEPS
from tests.ranks.launch import CHECKOUT

DELAY, RATE, BURST = 0.005, 20e6 / 8, 512e3  # seconds; bytes per second; bytes that pass at once (cluster.py)
STALENESS = 12


@pytest.mark.timeout(120)
def test_a_slow_link_holds_up_every_averaged_step_and_no_step_within_the_bound(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    policies = ("allreduce", f"async_ps({STALENESS})", "diloco(8, delay=7)")
    with cluster(tmp_path, ["hpa", "hpb"], delay_seconds=DELAY) as hosts:
        hosts.limit("20mbit")
        line = [sys.executable, "-m", "hybridpar", "run", "-H", "hpa:1,hpb:1", "--network-interface", "eth0"]
        seen = hosts.run("hpa", [*line, str(CHECKOUT / "tests" / "hosts" / "slow.py"), *policies], tmp_path)
        assert seen.code == 0, seen
    told = [json.loads(line) for line in seen.out.splitlines() if line.startswith("{")]
    assert [one["sync"] for one in told] == list(policies), seen
    averaged, ahead, late = told
    # Every step needs all of the other's gradients, and no link carries them faster.
    through = (STEPS * averaged["bytes"] - BURST) / RATE
    assert averaged["seconds"] > max(through, STEPS * SECONDS)
    # The others send as many bytes or fewer while they compute. Half of the time leaves room for what the machine does.
    assert ahead["seconds"] < through / 2, told
    assert late["seconds"] < through / 2, told
    assert 1 < max(ahead["lags"]) <= STALENESS, told
