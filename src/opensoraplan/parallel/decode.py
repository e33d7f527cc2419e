"""Decoding one video on several devices: each rank has some rows of every frame, and gets from its neighbours
the rows next to its own where a layer looks beyond them. Exact, unlike tiles. Applied from outside.

Shapes: [B, C, T, H, W], of which a rank has H / ranks rows at every stage.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from opensoraplan.models.convolution import memory_format_of
from opensoraplan.models.vae import VideoVAE
from opensoraplan.models.wfvae import WFVAE, CausalConv3d, FrameAttention, FrameConv2d, Upsample
from opensoraplan.parallel.collectives import Group, all_gather, part_of

ROWS = 3


def can_be_shared(vae: VideoVAE) -> TypeGuard[WFVAE]:
    """Whether `share_decoding` knows which layers of this VAE look beyond their rows."""
    return isinstance(vae, WFVAE)


def share_decoding(vae: WFVAE, group: Group) -> None:
    """From now on every rank of `group` decodes some rows in `vae.iter_decode`, and has the whole frames of
    latents that all ranks have. It then raises ValueError for rows that cannot be shared out evenly.
    """
    if vae.tiling is not None:
        raise ValueError("tiles and sharing out the rows of a frame exclude each other: disable_tiling()")
    within_upsampling = {id(layer.conv) for layer in vae.decoder.modules() if isinstance(layer, Upsample)}
    for layer in vae.decoder.modules():
        if isinstance(layer, Upsample):
            _put_around(layer, _Halo(group, grown=2).run)
            _put_around(layer.conv, partial(_zero_outside, group))
        elif isinstance(layer, FrameAttention):
            layer.register_forward_pre_hook(
                lambda _layer, args: (all_gather(args[0], dim=ROWS, group=group), *args[1:])
            )
            layer.register_forward_hook(partial(_own_rows, group=group))
        elif _looks_beyond(layer) and id(layer) not in within_upsampling:
            _put_around(layer, _Halo(group, grown=1).run)
    decode_own = vae.iter_decode

    @torch.no_grad()
    def iter_decode(z: Tensor) -> Iterator[Tensor]:
        rows, ranks = z.shape[ROWS], group.size()
        if rows % ranks:
            possible = [n for n in range(1, rows + 1) if rows % n == 0]
            raise ValueError(
                f"{rows} rows of latents cannot be shared out over {ranks} ranks: "
                f"use {', '.join(map(str, possible))}"
            )
        for pixels in decode_own(part_of(z, dim=ROWS, group=group)):
            yield all_gather(pixels, dim=ROWS, group=group)

    vae.iter_decode = iter_decode


def _own_rows(_layer: nn.Module, _args: tuple[Any, ...], out: Tensor, *, group: Group) -> Tensor:
    return part_of(out, dim=ROWS, group=group)


def _looks_beyond(layer: nn.Module) -> bool:
    """Whether a row of the layer's output depends on the rows next to it."""
    return isinstance(layer, FrameConv2d) or (
        isinstance(layer, CausalConv3d) and layer.conv.kernel_size[1] > 1
    )


def _put_around(layer: nn.Module, run: Callable[..., Tensor]) -> None:
    """Have `run(forward, x, ...)` in the place of `forward(x, ...)`. No hook: the VAE calls `forward` of
    some layers itself.
    """
    layer.forward = partial(run, layer.forward)


class _Halo:
    """Gives a layer one row more above and below, and cuts from its output what comes of them."""

    def __init__(self, group: Group, *, grown: int) -> None:
        self.group = group
        self.grown = grown  # rows of output for one row of input
        self.repeats_edge = grown > 1  # interpolation sees the frame's edge again, a convolution sees zeros

    def run(self, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:  # noqa: ANN401 (a layer's)
        return forward(self.widened(x), *args)[..., self.grown : -self.grown, :]

    def widened(self, x: Tensor) -> Tensor:
        rank, last = self.group.rank(), self.group.size() - 1
        edges = torch.stack([x[..., :1, :], x[..., -1:, :]])  # what the neighbours need: [2, B, C, T, 1, W]
        everyones = all_gather(edges, dim=0, group=self.group).unflatten(0, (-1, 2))
        above = everyones[rank - 1, 1] if rank else self._outside(edges[0])
        below = everyones[rank + 1, 0] if rank < last else self._outside(edges[1])
        # Not by `cat`, which keeps the layout of x only if all that it joins has it.
        shape = (*x.shape[:ROWS], x.shape[ROWS] + 2, *x.shape[ROWS + 1 :])
        layout = memory_format_of(x.device.type)
        wide = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for rows, part in ((slice(0, 1), above), (slice(1, -1), x), (slice(-1, None), below)):
            wide[..., rows, :] = part
        return wide

    def _outside(self, edge: Tensor) -> Tensor:
        return edge if self.repeats_edge else torch.zeros_like(edge)


def _zero_outside(group: Group, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:  # noqa: ANN401
    """A convolution of an upsampled part with its halo: rows that lie outside of the frame are zero to it."""
    rank, last = group.rank(), group.size() - 1
    if rank in (0, last):
        x = x.clone()
        if rank == 0:
            x[..., :2, :] = 0
        if rank == last:
            x[..., -2:, :] = 0
    return forward(x, *args)
