"""SparseUMMDiT ("SUV"): the U-shaped sparse diffusion transformer of Open-Sora Plan v1.5.0, top to bottom.

No parallelism, no file formats, no sampling; the order of tokens in sparse stages is in skiparse.py. Shapes:
B batch, C latent channels, T/H/W latent grid, S video tokens, L text tokens, D width, H heads (in
[.., H, d]), d head width, n the Skiparse rate of a stage.
"""

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opensoraplan.models import original
from opensoraplan.models.adaln import (
    NORMS,
    AdaNormOut,
    AdaNormZero,
    ConditionEmbedding,
    Modulation,
    RMSNorm,
    add_gated,
    timestep_rows,
)
from opensoraplan.models.attention import attention
from opensoraplan.models.caching import CheckedCacheMixin
from opensoraplan.models.lora import LoraMixin
from opensoraplan.models.overflow import merge_overflows, saturate
from opensoraplan.models.recompute import recomputed
from opensoraplan.models.skiparse import (
    Layout,
    apply_rotary,
    check_rates,
    from_group_skip,
    make_layouts,
    order_rows,
    rotary_tables,
    swap_skip,
    to_single_skip,
)
from opensoraplan.models.strict import Depths, Epsilon, Rates, StrictMixin, Switch, Whole

logger = logging.getLogger(__name__)

# Kinds of inputs that compiled blocks meet: rate 1, others, the last block; one sample or several; one text
# token (an empty negative prompt) or several; masks of video and text; AdaLN vectors given or not; gradients
# or not.
_MOST_KINDS = 64

# --- Block --------------------------------------------------------------------------------------------------


class JointAttnProcessor:
    """Attention of video [n, B, s, D] and text [B, L, D] over both, within each of the n subsequences.

    The text attends in every subsequence; its n outputs are averaged. Works with each backend of diffusers'
    dispatcher that takes the key mask, or with any of them where nothing is masked.
    """

    _attention_backend = None

    def __call__(
        self, attn: "JointAttention", video: Tensor, text: Tensor, layout: Layout
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(linear: nn.Module, x: Tensor) -> Tensor:
            return linear(x).unflatten(-1, (-1, attn.head_dim))

        v, text_v = heads(attn.to_v, video), heads(attn.add_v_proj, text)
        q = apply_rotary(attn.norm_q(heads(attn.to_q, video)), layout.cos, layout.sin).to(v.dtype)
        k = apply_rotary(attn.norm_k(heads(attn.to_k, video)), layout.cos, layout.sin).to(v.dtype)
        text_q = attn.norm_added_q(heads(attn.add_q_proj, text)).to(v.dtype)
        text_k = attn.norm_added_k(heads(attn.add_k_proj, text)).to(v.dtype)

        video, text = self.attend((q, k, v), (text_q, text_k, text_v), layout.key_mask)
        video = attn.to_out[0](video.flatten(-2))
        return video if attn.to_add_out is None else (video, attn.to_add_out(text.flatten(-2)))

    def attend(
        self,
        video: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor, Tensor],
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Queries, keys, values of video [n, B, s, H, d] and text [B, L, H, d] -> outputs of these shapes."""
        n, _, s, _, _ = video[0].shape
        # Each head's tokens in one piece, for which torch's attention on CPUs takes a tenth less time.
        q, k, v = (
            torch.cat([x.transpose(2, 3), text_x.transpose(1, 2).expand(n, -1, -1, -1, -1)], dim=3)
            .flatten(0, 1)
            .transpose(1, 2)  # [n * B, s + L, H, d]
            for x, text_x in zip(video, text, strict=True)
        )
        out = attention(q, k, v, key_mask, backend=self._attention_backend)
        out = out.unflatten(0, (n, -1))
        # Contiguous, or what follows is not one product but n of them.
        return out[:, :, :s].contiguous(), out[:, :, s:].mean(0)


class JointAttention(nn.Module, AttentionModuleMixin):
    """Projections and q/k norms of both streams. `text_output=False`: the text is attended to
    but not updated.
    """

    _default_processor_cls = JointAttnProcessor
    _available_processors = [JointAttnProcessor]  # noqa: RUF012 (the name and type that diffusers reads)
    _supports_qkv_fusion = False

    def __init__(self, dim: int, *, heads: int, eps: float, text_output: bool = True) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(self.head_dim, eps=eps) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (RMSNorm(self.head_dim, eps=eps) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim) if text_output else None
        self.processor: Any = (
            JointAttnProcessor()
        )  # of any class that diffusers' `set_processor` may put here

    def forward(self, video: Tensor, text: Tensor, layout: Layout) -> Tensor | tuple[Tensor, Tensor]:
        return self.processor(self, video, text, layout)


def gelu_by_exp(x: Tensor) -> Tensor:
    """tanh-GELU of any shape, computed in fp32, in the dtype of x: by 1 + tanh(z) = 2 / (1 + exp(-2 z)), of
    which Inductor makes code for CPUs that takes a third of the time of its tanh.
    """
    y = x.float()
    twice = 2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    # Below, the result is 0 and the exponential's gradient would soon be infinity / infinity.
    return (y / (1 + torch.exp(-twice.clamp(min=-80)))).to(x.dtype)


class GELUProjection(nn.Module):
    """Linear without bias, then tanh-GELU (which torch computes in fp32 for every dtype)."""

    def __init__(self, dim: int, *, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return gelu_by_exp(x) if torch.compiler.is_compiling() else F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """D -> 4 D -> D without biases. The list of three keeps the numbering of diffusers' and
    the original's names.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GELUProjection(dim, inner_dim=4 * dim), nn.Identity(), nn.Linear(4 * dim, dim, bias=False)]
        )
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, use_reentrant=False)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class SkipLinear(nn.Module):
    """Joins a stream [..., D] with what an earlier stage kept of it: Linear(concat) -> [..., D]."""

    def __init__(self, dim: int, *, norm_cls: str | None, eps: float) -> None:
        super().__init__()
        self.norm = NORMS[norm_cls](2 * dim, eps=eps) if norm_cls else None
        self.linear = nn.Linear(2 * dim, dim)
        if self.norm is None:
            self.open_nothing()

    @torch.no_grad()
    def open_nothing(self) -> None:
        """Pass the stream on as it is and nothing of what was kept: [identity | 0]."""
        dim = self.linear.out_features
        self.linear.weight.copy_(torch.eye(dim, 2 * dim))
        self.linear.bias.zero_()

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        joined = torch.cat([x, kept], dim=-1)
        return self.linear(joined if self.norm is None else self.norm(joined).to(x.dtype))


@dataclass(frozen=True)
class BlockConfig:
    """What all blocks of a denoiser have in common. `embed_dim`: width of the condition. `double_ff` False:
    both streams share one feed-forward, which the text enters as it is. `skip_norm`: a norm before the Linear
    of skip connections.
    """

    dim: int
    heads: int
    embed_dim: int
    norm_cls: str
    eps: float
    double_ff: bool
    skip_norm: bool


class SparseUMMDiTBlock(nn.Module):
    """One block of both streams: (skip connection,) joint attention, feed-forward.

    `last`: nothing reads the text afterwards, so its output projection, second norm and feed-forward do not
    exist. `skip`: it begins with the skip connection.
    """

    def __init__(self, config: BlockConfig, *, last: bool, skip: bool) -> None:
        super().__init__()
        dim, eps, double_ff = config.dim, config.eps, config.double_ff
        condition = {"embed_dim": config.embed_dim, "norm_cls": config.norm_cls, "eps": eps}
        skip_norm_cls = config.norm_cls if config.skip_norm else None
        self.skip = SkipLinear(dim, norm_cls=skip_norm_cls, eps=eps) if skip else None
        self.skip_enc = SkipLinear(dim, norm_cls=skip_norm_cls, eps=eps) if skip else None
        self.norm1 = AdaNormZero(dim, **condition)
        self.attn1 = JointAttention(dim, heads=config.heads, eps=eps, text_output=not last)
        self.norm2 = AdaNormZero(dim, **condition, text_norm=double_ff and not last)
        self.ff = FeedForward(dim)
        self.ff_enc = FeedForward(dim) if double_ff and not last else None
        self.last = last
        self.gradient_checkpointing = False
        self.keep_attention = False
        self.inputs_on_host = False
        self.overflowed: Tensor | None = None  # read by overflow.py

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        cond: Tensor,
        layout: Layout,
        kept: tuple[Tensor, Tensor] | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [n, B, s, D], text [B, L, D], cond [R, E] fp32 -> video, text. `kept`: an earlier stage's
        two. `vectors`: this block's of a `Modulation`.
        """
        if self.skip is None or self.skip_enc is None:
            video, text, overflowed = self._run(hidden_states, encoder_hidden_states, cond, layout, vectors)
        else:
            assert kept is not None
            # Not by names, which would keep both streams alive while the block goes on from them.
            video, text, overflowed = self._run(
                self.skip(hidden_states, kept[0]),
                self.skip_enc(encoder_hidden_states, kept[1]),
                cond,
                layout,
                vectors,
            )
        if overflowed is not None:
            self.overflowed = merge_overflows(self.overflowed, overflowed)
        return video, text

    def _run(
        self,
        video: Tensor,
        text: Tensor,
        cond: Tensor,
        layout: Layout,
        vectors: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Also whether a stream had to be saturated: bool [], or None, unless this is inference in fp16.

        The original saturates both streams before norm1 and norm2. Here the block's outputs are, too: after
        it they may meet a skip connection or the last norm, which spread an infinity to the whole token.
        """
        first, second = vectors or (None, None)
        rows = layout.rows
        overflows = [] if video.dtype == torch.float16 and not self.training else None
        video, text = saturate(video, overflows), saturate(text, overflows)

        normed, normed_text, gate, text_gate = self.norm1(video, text, cond, first, rows)
        updates = self.attn1(normed, normed_text, layout)
        update, text_update = updates if isinstance(updates, tuple) else (updates, None)
        video = saturate(add_gated(video, gate, update, rows), overflows)
        if text_update is not None:
            text = saturate(add_gated(text, text_gate, text_update), overflows)

        normed, normed_text, gate, text_gate = self.norm2(video, text, cond, second, rows)
        video = saturate(add_gated(video, gate, self.ff(normed), rows), overflows)
        if not self.last:
            text_ff = self.ff if self.ff_enc is None else self.ff_enc
            text = saturate(add_gated(text, text_gate, text_ff(normed_text)), overflows)
        return video, text, torch.stack(overflows).any() if overflows else None

    def compile(self, *, dynamic: bool | None = True, **options: Any) -> None:  # noqa: ANN401 (torch.compile's)
        """Compile what all blocks have in common, everything but the skip connection, so that they share
        graphs: one where n is 1, one for all other rates, one for the last block. As many again where keys
        are masked, where the text is a single token, or the batch a single sample; other sizes are symbols.

        All these are more than the eight kinds of inputs that torch allows a function, in the whole process:
        its limit is raised.
        """
        from torch._dynamo import config  # takes long, and torch.compile does it in any case

        config.recompile_limit = max(config.recompile_limit, _MOST_KINDS)
        self._run = torch.compile(self._run, dynamic=dynamic, **options)


# How diffusers' caches find both streams in what goes into a block and comes out of it.
TransformerBlockRegistry.register(
    SparseUMMDiTBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
)


# --- Model --------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Latents [B, C, T, H, W] -> tokens [B, T * H/p * W/p, D]: a convolution on each frame."""

    def __init__(self, in_channels: int, *, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.proj(x.transpose(1, 2).flatten(0, 1))  # [B * T, D, H/p, W/p]
        return x.flatten(2).transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


class VideoTokens(NamedTuple):
    """A video's tokens in natural order, with what counts them in the same order."""

    video: Tensor  # [B, S, D]
    tables: tuple[Tensor, Tensor]  # cosines and sines [1, S, 1, d/2]
    mask: Tensor | None  # [B, S], True where there is a token; None where nothing is masked
    rows: Tensor | None = None  # [B, S], of the condition; None where each sample has one: see adaln.py
    run: int = 1  # so many tokens after each other have the same row, from the first token on


class Stages(nn.Module):
    """Tokens through the stages of the U. It has no weights, and is a module so that hooks can give it a part
    of the tokens: all that it is given counts them in the same order.
    """

    def __init__(self, num_layers: Sequence[int], *, skip_connection: bool) -> None:
        super().__init__()
        self.num_layers = tuple(num_layers)
        self.skip_connection = skip_connection

    def forward(
        self,
        tokens: VideoTokens,
        text: Tensor,
        text_mask: Tensor | None,
        cond: Tensor,
        *,
        blocks: Iterable[nn.Module],
        rates: Sequence[int],
        modulation: Modulation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, S, D] in natural order -> the same, and the rows [B, U] of their runs. `text` [B, L, D],
        its mask [B, L], `cond` [R, E].
        """
        video, count, middle = tokens.video, tokens.video.shape[1], len(self.num_layers) // 2
        # On CPUs, as their kernels want it: a compiled softmax that reads booleans takes three times as long.
        additive = video.dtype if video.device.type == "cpu" else None
        layouts = {
            n: make_layouts(n, tokens.tables, tokens.mask, text_mask, text.shape[:2], additive=additive)
            for n in set(rates)
        }
        if (rows := tokens.rows) is not None:
            for n, both in layouts.items():
                ordered = zip(both, order_rows(n, rows, tokens.run), strict=True)
                layouts[n] = cast(Any, tuple(layout._replace(rows=own) for layout, own in ordered))
        vectors = itertools.repeat(None) if modulation is None else modulation.blocks
        rest = zip(blocks, vectors, strict=False)
        outputs: list[tuple[Tensor, Tensor]] = []
        for stage, (depth, n) in enumerate(zip(self.num_layers, rates, strict=True)):
            video = to_single_skip(video, n)
            kept = None
            if stage > middle and self.skip_connection:
                kept = to_single_skip(outputs[-1][0], n), outputs.pop()[1]
            for index, (block, own) in enumerate(itertools.islice(rest, depth)):
                if index:
                    video = swap_skip(video)
                inputs = (video, text, cond, layouts[n][index % 2], kept, own)
                kept = None  # only a stage's first block reads it, and it is as large as the stream
                if block.gradient_checkpointing and torch.is_grad_enabled():
                    video, text = recomputed(
                        block,
                        *inputs,
                        keep_attention=bool(block.keep_attention),
                        on_host=bool(block.inputs_on_host),
                    )
                else:
                    video, text = block(*inputs)
            video = from_group_skip(video, count)
            if stage < middle:
                outputs.append((video, text))
        return video, None if rows is None else rows[:, :: tokens.run]


# diffusers' pipelines load a class only where they find the name ModelMixin beside it.
class SparseUMMDiT(
    StrictMixin, LoraMixin, original.OriginalModel, ModelMixin, ConfigMixin, CheckedCacheMixin, AttentionMixin
):
    """The denoiser of Open-Sora Plan v1.5.0. The defaults are the released model: 8,504,661,120 parameters.

    Args:
        num_attention_heads, attention_head_dim: their product is the width D. The head width is a multiple of
        16, and of 32 / gcd with the shares 4:6:6, so that each of the rotary parts is even.
        in_channels: of the noisy latents and what is put beside them. out_channels: of the latents.
        num_layers: blocks of each stage, an odd number of stages, each with an even number of blocks.
        sparse_n: the Skiparse rate of each stage; None: dense. Weights do not depend on it: see
        `set_sparsity`. double_ff: a feed-forward for each stream instead of one for both.
        caption_channels, pooled_projection_dim: widths of the T5 states and of the CLIP vector.
        timestep_embed_dim: width of the condition vector. patch_size: latent cells on a token's side.
        norm_cls: "layer_norm" or "rms_norm". `norm_eps` is the eps of every norm, the q/k norms included.
        skip_connection: stages after the middle take the outputs of those before it.
        skip_connection_zero_init: their Linear starts as [identity | 0], without a norm before it.

    Raises ValueError for values that make no model. Source: docs/model.md section 1 (report
    and measured original).
    """

    original_config = staticmethod(original.denoiser_config)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SparseUMMDiTBlock"]  # noqa: RUF012
    _repeated_blocks = ["SparseUMMDiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["patch_embed", "time_text_embed"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,
        num_attention_heads: Whole = 24,
        attention_head_dim: Whole = 128,
        in_channels: Whole = 32,
        out_channels: Whole = 32,
        num_layers: Depths = (2, 4, 6, 8, 6, 4, 2),
        sparse_n: Rates | None = (1, 2, 4, 8, 4, 2, 1),
        double_ff: Switch = True,
        caption_channels: Whole = 2048,
        pooled_projection_dim: Whole = 1280,
        timestep_embed_dim: Whole = 1024,
        patch_size: Whole = 2,
        norm_cls: str = "layer_norm",
        norm_eps: Epsilon = 1e-6,
        skip_connection: Switch = True,
        skip_connection_zero_init: Switch = True,
    ) -> None:
        super().__init__()
        check_architecture(attention_head_dim=attention_head_dim, num_layers=num_layers, norm_cls=norm_cls)
        check_rates(sparse_n, stages=len(num_layers))
        dim = num_attention_heads * attention_head_dim
        norm = {"norm_cls": norm_cls, "eps": norm_eps}

        self.patch_embed = PatchEmbed(in_channels, dim=dim, patch_size=patch_size)
        self.time_text_embed = ConditionEmbedding(timestep_embed_dim, pooled_dim=pooled_projection_dim)
        self.caption_projection = nn.Linear(caption_channels, dim)

        first_of_stage = list(itertools.accumulate(num_layers, initial=0))
        skip_blocks = set(first_of_stage[len(num_layers) // 2 + 1 : -1]) if skip_connection else set()
        common = BlockConfig(
            dim=dim,
            heads=num_attention_heads,
            embed_dim=timestep_embed_dim,
            double_ff=double_ff,
            skip_norm=not skip_connection_zero_init,
            **norm,
        )
        depth = sum(num_layers)
        self.transformer_blocks = nn.ModuleList(
            SparseUMMDiTBlock(common, last=index == depth - 1, skip=index in skip_blocks)
            for index in range(depth)
        )
        self.stages = Stages(num_layers, skip_connection=skip_connection)
        self.norm_final = NORMS[norm_cls](dim, eps=norm_eps)
        self.norm_out = AdaNormOut(dim, embed_dim=timestep_embed_dim, **norm)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)

    def original_format(self) -> original.Format:
        """How the original names these tensors."""
        num_layers = list(self.config["num_layers"])
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        return original.Format(
            rename=partial(original.denoiser_name, num_layers=num_layers),
            unread=original.denoiser_unread(shapes, num_layers=num_layers),
        )

    def set_sparsity(self, rates: Sequence[int] | None) -> None:
        """Attend with these Skiparse rates, one a stage, from now on (None: dense). The weights stay
        as they are.
        """
        check_rates(rates, stages=len(self.config["num_layers"]))
        self.register_to_config(sparse_n=None if rates is None else list(rates))

    def set_recompute(
        self,
        *,
        blocks: int = 0,
        feed_forwards: int = 0,
        keep_attention: bool = False,
        inputs_on_host: bool = False,
    ) -> None:
        """Trade time for memory in training: drop the activations of the first `blocks` whole blocks, all or
        `keep_attention`, or those of the feed-forwards of the first `feed_forwards` blocks, and compute them
        again in backward. `inputs_on_host`: the streams that whole blocks begin from wait for that on the
        host. Both at once is a ValueError, as in the original.
        `enable_gradient_checkpointing()` is the same as all blocks.
        """
        depth = len(self.transformer_blocks)
        if blocks and feed_forwards:
            raise ValueError(f"recompute blocks ({blocks}) or feed_forwards ({feed_forwards}), not both")
        for name, count in (("blocks", blocks), ("feed_forwards", feed_forwards)):
            if not 0 <= count <= depth:
                raise ValueError(f"{name} must be between 0 and {depth}, got {count}")
        for index, block in enumerate(cast(Iterable[SparseUMMDiTBlock], self.transformer_blocks)):
            block.gradient_checkpointing, block.keep_attention = index < blocks, keep_attention
            block.inputs_on_host = inputs_on_host
            for ff in (block.ff, block.ff_enc):
                if ff is not None:
                    ff.recompute = index < feed_forwards

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        modulation: Modulation | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity [B, C, T, H, W] of latents [B, C, T, H, W] at `timestep` (1000 * sigma) [B], or [B, T]
        where frames have timesteps of their own: no weights are needed for that, and frames that all have the
        same one give the same bits as [B].

        `encoder_hidden_states` [B, L, caption_channels] with `encoder_attention_mask` [B, L] (non-zero = real
        token), `pooled_projections` [B, P]; `attention_mask` [B, T, H, W] (non-zero = valid cell; a token
        counts if any of its cells does; what is predicted for padded cells means nothing). Leave a mask out
        where nothing is masked: a mask of ones gives the same, after a look at its values. Latents,
        text and pooled vector are in one dtype, in which the model computes outside of its fp32 islands.
        `modulation`: that of this timestep and pooled vector, if it was made before.
        Raises ValueError for latents that do not fit.
        """
        patch = self.config["patch_size"]
        batch, _, frames, height, width = hidden_states.shape
        if height % patch or width % patch:
            raise ValueError(f"latent sides must be multiples of {patch}, got {height} x {width}")
        grid = (frames, height // patch, width // patch)

        text, text_mask = trim_text(encoder_hidden_states, encoder_attention_mask)
        video_mask = None
        if attention_mask is not None and not attention_mask.bool().all():
            video_mask = F.max_pool2d(attention_mask.float(), patch).flatten(1) > 0  # [B, S]

        if timestep.shape not in ((batch,), (batch, frames)):
            raise ValueError(
                f"timestep must be [{batch}] or, one for each frame, [{batch}, {frames}], got "
                f"{list(timestep.shape)}"
            )
        cond, rows = self.condition(timestep, pooled_projections)
        if rows is not None:
            rows = rows.to(hidden_states.device).repeat_interleave(grid[1] * grid[2], dim=1)  # [B, S]
        video = self.patch_embed(hidden_states)
        text = self.caption_projection(text)
        tables = rotary_tables(grid, self.config["attention_head_dim"], video.device)
        rates = self.config["sparse_n"] or [1] * len(self.config["num_layers"])
        video, rows = self.stages(
            VideoTokens(video, tables, video_mask, rows, run=grid[1] * grid[2]),
            *(text, text_mask, cond),
            blocks=self.transformer_blocks,
            rates=rates,
            modulation=modulation,
        )

        vectors = None if modulation is None else modulation.out
        video = self.norm_out(self.norm_final(video).to(video.dtype), cond, vectors, rows).to(video.dtype)
        video = self.proj_out(video)
        video = video.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)  # [B, T, H/p, W/p, p, p, C]
        sample = video.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def condition(self, timestep: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """The condition [R, E] of timesteps [B] or [B, T] and pooled vectors [B, P], and the row [B, T] of
        each frame; None where every frame has that of its sample.
        """
        rows = timestep_rows(timestep)
        if rows.sample is not None:
            pooled = pooled[rows.sample.to(pooled.device)]
        return self.time_text_embed(rows.timestep.to(pooled.device), pooled), rows.of_frame


def trim_text(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut the text [B, L, E] to the longest real length of the batch; the mask [B, L] is None if nothing is
    left of it.
    """
    if mask is None:
        return text, None
    mask = mask.bool()
    length = max(int(mask.any(0).nonzero().max()) + 1, 1) if mask.any() else 1
    text, mask = text[:, :length], mask[:, :length]
    return text, None if mask.all() else mask


def check_architecture(*, attention_head_dim: int, num_layers: Sequence[int], norm_cls: str) -> None:
    """Raise ValueError for sizes that the architecture does not have."""
    if attention_head_dim % 16:
        below = max(attention_head_dim // 16 * 16, 16)
        raise ValueError(
            f"attention_head_dim must be a multiple of 16 (rotary parts 4:6:6 of 16, each even), got "
            f"{attention_head_dim}: use {below} or {below + 16}"
        )
    if len(num_layers) % 2 == 0:
        raise ValueError(
            f"num_layers needs an odd number of stages, got {len(num_layers)}: {list(num_layers)}"
        )
    if any(depth < 2 or depth % 2 for depth in num_layers):
        raise ValueError(f"each stage needs an even number of layers, at least 2, got {list(num_layers)}")
    if norm_cls not in NORMS:
        raise ValueError(f"norm_cls must be one of {sorted(NORMS)}, got {norm_cls!r}")
