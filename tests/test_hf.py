"""Unmodified Hugging Face models, trained on a mesh, equal plain PyTorch; docs/hf.md has the table of what was found.

`python -m tests.hf_table` writes the table; here each cell is found again, and must be what the table says.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import hybridpar as hp
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


@ranks(2)
def test_biases_that_come_in_a_mask_of_each_head_are_cut_by_heads() -> None:
    from transformers import BeitConfig, BeitForImageClassification

    mesh = hp.init(tensor=2)
    config = BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=2, use_relative_position_bias=True, drop_path_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = BeitForImageClassification(config).double()
    model = hp.parallelize(copy.deepcopy(plain), mesh, loss=hp.CrossEntropy())
    pixels, wanted = torch.linspace(-1, 1, 4 * 192, dtype=torch.float64).view(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    for trained in (model, plain):
        step = torch.optim.SGD(trained.parameters(), lr=1.0)
        if trained is plain:
            torch.nn.functional.cross_entropy(plain(pixels).logits, wanted).backward()
        else:
            model.train_step(({"pixel_values": pixels}, wanted))
        step.step()
    found = model.full_state_dict()
    assert any("relative_position_bias_table" in name for name in found)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)
