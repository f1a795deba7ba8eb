"""Tests that run on several MPI ranks at once, from plain `pytest`.

    from tests.ranks import ranks

    @ranks(2, 4)                     once on 2 ranks, once on 4: test_x[2ranks], test_x[4ranks]
    @ranks(4, timeout=120)           seconds until it counts as hung (60 unless told)
    def test_x(rank_count, tmp_path): ...

Every rank calls the function. `rank_count` and `tmp_path` (one folder for all ranks of the test) are there for the
asking; other fixtures are made on each rank by itself. `from mpi4py import MPI` inside the test finds MPI running.

    plugin    pytest's side: when to launch, what to run
    launch    one mpirun that carries all tests of one rank count
    worker    a rank: a pytest of its own that runs a test when it is told to
    verdict   what the ranks reported, as the one report that pytest shows

Files in a temporary folder connect the two sides, not MPI: they still work when MPI does not.
"""

from __future__ import annotations

import pytest


def ranks(*counts: int, timeout: float = 60.0) -> pytest.MarkDecorator:
    """Run a test on each of these numbers of MPI ranks; `timeout` in seconds for each."""
    if not counts or not all(isinstance(n, int) and n > 0 for n in counts):
        raise ValueError(f"@ranks{counts}: name at least one number of ranks, each a whole number of at least 1")
    return pytest.mark.ranks(*counts, timeout=timeout)
