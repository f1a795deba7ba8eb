"""Unmodified Hugging Face models, trained on a mesh, equal plain PyTorch; docs/hf.md has the table of what was found.

`python -m tests.hf_table` writes the table; here each cell is found again, and must be what the table says.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import NAMES
from tests.hf_table import LAYOUTS, outcome, read
from tests.ranks import ranks

pytest.importorskip("transformers")
TABLE = read(Path(__file__).parents[1] / "docs" / "hf.md")


@pytest.mark.parametrize("name", NAMES)
@ranks(2)
def test_two_tensor_ranks_train_as_one_process_does(name: str) -> None:
    assert outcome(name, "tensor 2") == TABLE[name]["tensor 2"]


@pytest.mark.parametrize("name", NAMES)
@ranks(2)
def test_two_stages_train_as_one_process_does(name: str) -> None:
    assert outcome(name, "pipeline 2") == TABLE[name]["pipeline 2"]


@pytest.mark.parametrize("name", NAMES)
@ranks(8, timeout=180)
def test_two_replicas_of_two_stages_of_two_tensor_ranks_train_as_one_process_does(name: str) -> None:
    assert outcome(name, "2x2x2") == TABLE[name]["2x2x2"]


def test_the_table_has_every_architecture_and_at_least_25_that_equal_one_process() -> None:
    assert list(TABLE) == NAMES
    assert sum(all(TABLE[name][layout] == "equal" for layout in LAYOUTS) for name in NAMES) >= 25
