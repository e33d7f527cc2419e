"""Which dimension of each tensor tensor parallelism splits."""

import pytest
import torch

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.splits import split_dimension


@pytest.fixture(scope="module")
def model() -> SparseUMMDiT:
    with torch.device("meta"):
        return SparseUMMDiT(num_layers=(2, 2, 2), sparse_n=(1, 2, 1), skip_connection_zero_init=False)


def test_names_of_the_model_and_of_the_release_are_split_alike(model: SparseUMMDiT) -> None:
    names = [name for name, _ in model.named_parameters()]
    rename = model.original_format().rename
    assert {name: split_dimension(name) for name in names} == {
        name: split_dimension(rename(name)) for name in names
    }


def test_layers_that_are_split(model: SparseUMMDiT) -> None:
    found: dict[int | None, set[str]] = {0: set(), 1: set(), None: set()}
    for name, _ in model.named_parameters():
        found[split_dimension(name)].add(name.split(".", 2)[2] if "blocks" in name else name)
    attention = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    outputs = {*(f"attn1.{layer}" for layer in attention), "norm1.linear", "norm2.linear", "norm_out.linear"}
    assert found[0] >= {f"{layer}.{kind}" for layer in outputs for kind in ("weight", "bias")}
    assert found[0] >= {"ff.net.0.proj.weight", "ff_enc.net.0.proj.weight"}
    assert found[1] == {
        *("attn1.to_out.0.weight", "attn1.to_add_out.weight"),
        *("ff.net.2.weight", "ff_enc.net.2.weight"),
    }
    assert found[None] >= {
        "attn1.to_out.0.bias",
        "attn1.norm_q.weight",
        "skip.linear.weight",
        "proj_out.weight",
    }
