"""Skiparse layouts, sparsity that can be switched, masks, recompute and errors of the denoiser."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from tiny_models import DENOISER
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.models import skiparse
from opensoraplan.models.overflow import saturate, take_overflows
from opensoraplan.models.skiparse import from_group_skip, swap_skip, to_single_skip
from opensoraplan.models.sparse_ummdit import SparseUMMDiT, SparseUMMDiTBlock, gelu_by_exp

SMALL = {**DENOISER, "num_layers": [2, 2, 4, 2, 2], "sparse_n": [1, 2, 4, 2, 1]}


@pytest.fixture
def model() -> SparseUMMDiT:
    torch.manual_seed(0)
    return SparseUMMDiT(**SMALL).eval()


def inputs(batch: int = 1, *, grid: tuple[int, int, int] = (4, 8, 8), length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, *grid, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, length, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
    }


@pytest.mark.parametrize("n", [1, 2, 4])
def test_layouts_follow_the_definition(n: int) -> None:
    tokens = 3 * n**2 - (n > 1)  # one short of a multiple, so that it is padded
    x = torch.arange(1, tokens + 1)[None, :, None]
    single = to_single_skip(x, n)
    group = swap_skip(single)
    index = torch.arange(3 * n**2)
    for subsequence in range(n):
        in_single = index[index % n == subsequence] + 1
        in_group = index[index // n % n == subsequence] + 1
        for layout, expected in ((single, in_single), (group, in_group)):
            expected = expected.masked_fill(expected > tokens, 0)
            assert layout[subsequence, 0, :, 0].tolist() == expected.tolist()
    assert torch.equal(swap_skip(group), single)
    assert torch.equal(from_group_skip(group, tokens), x)


@torch.no_grad()
def test_attention_reads_only_its_subsequence(model: SparseUMMDiT) -> None:
    """A brute-force check of one sparse block: full attention with the mask that the layouts stand for."""
    n, dim, heads = 2, 32, 2
    block = model.transformer_blocks[2]
    video, text = torch.randn(1, 16, dim), torch.randn(1, 5, dim)
    grid = (1, 4, 4)
    cos, sin = skiparse.rotary_tables(grid, 16, torch.device("cpu"))
    single, group = skiparse.make_layouts(n, (cos, sin), None, None, (1, 5))
    index = torch.arange(16)
    for layout, same in ((single, index % n), (group, index // n % n)):
        x = to_single_skip(video, n)
        x = swap_skip(x) if layout is group else x
        out, text_out = block.attn1(x, text, layout)
        out = from_group_skip(out if layout is group else swap_skip(out), 16)

        q, k, v = (
            p(video).unflatten(-1, (heads, -1))
            for p in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        )
        q, k = (
            skiparse.apply_rotary(norm(x)[None], cos, sin)[0]
            for norm, x in ((block.attn1.norm_q, q), (block.attn1.norm_k, k))
        )
        tq, tk, tv = (
            p(text).unflatten(-1, (heads, -1))
            for p in (block.attn1.add_q_proj, block.attn1.add_k_proj, block.attn1.add_v_proj)
        )
        tq, tk = block.attn1.norm_added_q(tq), block.attn1.norm_added_k(tk)
        keys, values = torch.cat([k, tk], 1).transpose(1, 2), torch.cat([v, tv], 1).transpose(1, 2)
        allowed = torch.cat([same[:, None] == same, torch.ones(16, 5, dtype=torch.bool)], dim=1)
        expected = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=allowed)
        torch.testing.assert_close(out, block.attn1.to_out[0](expected.transpose(1, 2).flatten(2)))

        texts = []
        for subsequence in range(n):
            seen = torch.cat([same == subsequence, torch.ones(5, dtype=torch.bool)]).expand(5, -1)
            texts.append(F.scaled_dot_product_attention(tq.transpose(1, 2), keys, values, attn_mask=seen))
        mean = torch.stack(texts).mean(0).transpose(1, 2).flatten(2)
        torch.testing.assert_close(text_out, block.attn1.to_add_out(mean))


@torch.no_grad()
def test_sparsity_switches_without_touching_weights(model: SparseUMMDiT) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = model(**inputs()).sample
    model.set_sparsity(None)
    dense = model(**inputs()).sample
    assert not torch.allclose(dense, sparse)
    model.set_sparsity([1, 1, 1, 1, 1])
    torch.testing.assert_close(model(**inputs()).sample, dense)
    model.set_sparsity([1, 2, 4, 2, 1])
    torch.testing.assert_close(model(**inputs()).sample, sparse)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_switched_rate_is_saved(model: SparseUMMDiT, tmp_path) -> None:  # noqa: ANN001
    model.set_sparsity([1, 4, 2, 4, 1])
    model.save_pretrained(tmp_path)
    assert SparseUMMDiT.from_pretrained(tmp_path).config["sparse_n"] == [1, 4, 2, 4, 1]


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 6, 10)], ids=["even", "padded"])
def test_masks_of_ones_change_nothing(model: SparseUMMDiT, grid: tuple[int, int, int]) -> None:
    kwargs = inputs(2, grid=grid)
    masks = {"encoder_attention_mask": torch.ones(2, 6), "attention_mask": torch.ones(2, *grid)}
    assert torch.equal(model(**kwargs, **masks).sample, model(**kwargs).sample)


@torch.no_grad()
def test_padded_text_is_the_same_as_short_text(model: SparseUMMDiT) -> None:
    kwargs = inputs(2)
    short = model(**kwargs).sample
    padded = F.pad(kwargs["encoder_hidden_states"], (0, 0, 0, 5), value=7.0)
    mask = F.pad(torch.ones(2, 6), (0, 5))
    kwargs["encoder_hidden_states"] = padded
    assert torch.equal(model(**kwargs, encoder_attention_mask=mask).sample, short)


@torch.no_grad()
def test_ragged_text_is_each_text_by_itself(model: SparseUMMDiT) -> None:
    kwargs = inputs(2)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    together = model(**kwargs, encoder_attention_mask=mask).sample
    for row, length in enumerate((3, 6)):
        alone = {name: value[row : row + 1] for name, value in kwargs.items()}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :length]
        torch.testing.assert_close(together[row : row + 1], model(**alone).sample, rtol=1e-4, atol=1e-5)


def test_no_mask_where_nothing_is_masked() -> None:
    tables = skiparse.rotary_tables((1, 8, 8), 16, torch.device("cpu"))
    for n in (1, 2, 4, 8):
        assert all(layout.key_mask is None for layout in skiparse.make_layouts(n, tables, None, None, (1, 5)))
    padded = skiparse.rotary_tables((1, 3, 5), 16, torch.device("cpu"))
    for layout in skiparse.make_layouts(2, padded, None, None, (3, 5)):
        assert layout.key_mask is not None
        assert layout.key_mask.shape == (2 * 3, 1, 1, 16 // 2 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_by_exp_is_torchs_with_its_gradient(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-15, 15, 3001), torch.tensor([-1e4, -100.0, 100.0, 1e4])]).to(dtype)
    results = []
    for function in (gelu_by_exp, partial(F.gelu, approximate="tanh")):
        values = x.clone().requires_grad_()
        result = function(values)
        assert result.dtype == dtype
        results.append((result, torch.autograd.grad(result.sum(), values)[0]))
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "recompute",
    [{"blocks": 12}, {"feed_forwards": 12}, {"blocks": 3}, {"blocks": 12, "keep_attention": True}],
)
def test_recompute_gives_the_same_gradients(model: SparseUMMDiT, recompute: dict[str, int]) -> None:
    model.train()
    gradients = []
    for setting in ({}, recompute):
        model.set_recompute(**setting)
        model.zero_grad()
        model(**inputs(2, grid=(3, 6, 10))).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_diffusers_gradient_checkpointing_is_all_blocks(model: SparseUMMDiT) -> None:
    model.enable_gradient_checkpointing()
    assert all(block.gradient_checkpointing for block in model.transformer_blocks)
    model.disable_gradient_checkpointing()
    assert not any(block.gradient_checkpointing for block in model.transformer_blocks)


def run_block(block: SparseUMMDiTBlock) -> tuple[Tensor, Tensor]:
    """Video of 16 tokens and text of 6 through a block, in its dtype."""
    generator = torch.Generator().manual_seed(2)
    dtype = block.attn1.to_q.weight.dtype
    video, text = (torch.randn(*shape, generator=generator).half() for shape in ((1, 1, 16, 32), (1, 6, 32)))
    tables = skiparse.rotary_tables((1, 4, 4), 16, torch.device("cpu"))
    layout = skiparse.make_layouts(1, tables, None, None, (1, 6))[0]
    return block(video.to(dtype), text.to(dtype), torch.zeros(1, 32), layout)


OVERFLOWING = {
    "attention": lambda block: (block.attn1.to_out[0], block.attn1.to_add_out),
    "feed-forward": lambda block: (block.ff.net[2], block.ff_enc.net[2]),
}


@pytest.mark.parametrize("where", OVERFLOWING)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@torch.no_grad()
def test_an_overflow_in_fp16_stays_one_channels_matter(model: SparseUMMDiT, where: str, value: float) -> None:
    whole = cast(SparseUMMDiTBlock, model.transformer_blocks[0])
    for norm in (whole.norm1, whole.norm2):
        norm.linear.bias.copy_(torch.tensor([0, 0, 1, 0, 0, 1.0]).repeat_interleave(32))
    half = copy.deepcopy(whole).half()

    def overflow(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        out[..., 3, 5] = value if out.dtype == torch.half else math.copysign(65504, value)
        return out

    for block in (whole, half):
        for linear in OVERFLOWING[where](block):
            linear.register_forward_hook(overflow)
    for got, wanted in zip(run_block(half), run_block(whole), strict=True):
        assert abs(got[..., 3, 5].item()) == 65504
        got[..., 3, 5] = wanted[..., 3, 5] = 0  # which, in fp32, is about 65504
        torch.testing.assert_close(got.float(), wanted, atol=0.01, rtol=0.01)
    assert take_overflows([half, whole]) == [0]


@torch.no_grad()
def test_overflows_are_told_once_and_only_where_they_are(model: SparseUMMDiT) -> None:
    of_half = {name: x if name == "timestep" else x.half() for name, x in inputs().items()}
    model.half()
    model(**of_half)
    assert take_overflows(model.transformer_blocks) == []
    # The seventh is the last of the middle stage: a skip connection and all later blocks meet what it makes.
    broken = cast(SparseUMMDiTBlock, model.transformer_blocks[7])
    handle = broken.ff.net[2].register_forward_hook(lambda _module, _args, out: out.fill_(torch.inf))
    broken.norm2.linear.bias.fill_(1)
    assert torch.isfinite(model(**of_half).sample).all()
    handle.remove()
    model(**of_half)  # another pass, as that of the other branch of guidance, takes nothing back
    assert 7 in take_overflows(model.transformer_blocks)
    assert take_overflows(model.transformer_blocks) == []


@torch.no_grad()
def test_an_overflow_in_the_last_block_leaves_the_velocity_finite(model: SparseUMMDiT) -> None:
    of_half = {name: x if name == "timestep" else x.half() for name, x in inputs().items()}
    last = cast(SparseUMMDiTBlock, model.half().transformer_blocks[-1])
    last.norm2.linear.bias.fill_(1)
    last.ff.net[2].register_forward_hook(lambda _module, _args, out: out.fill_(torch.inf))
    assert torch.isfinite(model(**of_half).sample).all()
    assert take_overflows(model.transformer_blocks) == [len(model.transformer_blocks) - 1]


@torch.no_grad()
def test_a_pass_in_fp16_does_not_wait_for_the_device(model: SparseUMMDiT, watch: Callable[..., Any]) -> None:
    of_half = {name: x if name == "timestep" else x.half() for name, x in inputs().items()}
    model.half()
    with watch(torch.ops.aten._local_scalar_dense.default, len) as waits:
        model(**of_half)
    assert not waits.seen
    assert take_overflows(model.transformer_blocks) == []


def test_compiled_code_saturates_what_it_has_not_rounded() -> None:
    """Inductor adds and saturates in one kernel, in fp32."""

    def add(stream: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        overflows: list[Tensor] = []
        stream = saturate((stream.float() + update.float()).to(stream.dtype), overflows)
        return stream, overflows[0]

    compiled = torch.compile(add)
    stream, added = torch.full((4, 64), 60000.0).half(), torch.zeros(4, 64).half()
    for update in (0, 5508, 5530, 9000, torch.inf, torch.nan):
        added[1, 3] = update
        expected, overflowed = add(stream, added)
        assert torch.isfinite(expected).all()
        assert overflowed == (update not in (0, 5508))
        saturated, told = compiled(stream, added)
        assert torch.equal(saturated, expected)
        assert told == overflowed


@torch.no_grad()
def test_a_compiled_block_tells_of_overflows(model: SparseUMMDiT) -> None:
    torch.compiler.reset()
    of_half = {name: x if name == "timestep" else x.half() for name, x in inputs().items()}
    block = cast(SparseUMMDiTBlock, model.half().transformer_blocks[2])
    block.attn1.to_out[0].bias[0] = 65504
    block.norm1.linear.bias.fill_(2)
    eager, found = model(**of_half).sample, take_overflows(model.transformer_blocks)
    block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(**of_half).sample, eager, atol=0.01, rtol=0.01)
    assert take_overflows(model.transformer_blocks) == found
    assert 2 in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": [2, 2]}, "odd number of stages, got 2"),
        ({"num_layers": [2, 3, 2, 2, 2]}, r"even number of layers, at least 2, got \[2, 3, 2, 2, 2\]"),
        ({"sparse_n": [1, 2, 1]}, r"sparse_n needs 5 rates, each at least 1, got \[1, 2, 1\]"),
        ({"sparse_n": [1, 2, 0, 2, 1]}, "each at least 1"),
        ({"attention_head_dim": 20}, "multiple of 16.*got 20: use 16 or 32"),
        ({"norm_cls": "batch_norm"}, "one of .*layer_norm.*rms_norm.*, got 'batch_norm'"),
    ],
)
def test_architecture_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseUMMDiT(**{**SMALL, **change})


def test_call_errors(model: SparseUMMDiT) -> None:
    with pytest.raises(ValueError, match="multiples of 2, got 7 x 8"):
        model(**inputs(grid=(1, 7, 8)))
    with pytest.raises(ValueError, match="not both"):
        model.set_recompute(blocks=1, feed_forwards=1)
    with pytest.raises(ValueError, match="between 0 and 12, got 13"):
        model.set_recompute(blocks=13)
    with pytest.raises(ValueError, match="needs 5 rates"):
        model.set_sparsity([1, 2, 1])
