"""Render a short moving clip to try `osp reconstruct` on: python examples/render_clip.py clip.mp4"""

import logging
import sys
from pathlib import Path

import torch
from torch import Tensor

from opensoraplan.data.video import VideoWriter

logger = logging.getLogger(__name__)


def render(*, frames: int = 25, height: int = 128, width: int = 192) -> Tensor:
    """A lit ball that bounces over a shaded floor; uint8 [frames, height, width, 3]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sky = torch.tensor([120.0, 170.0, 230.0]) + (y / height)[..., None] * torch.tensor([90.0, 60.0, 10.0])
    tiles = ((x // 16 + y // 8) % 2)[..., None] * 30 + torch.tensor([60.0, 130.0, 70.0])
    background = torch.where((y > 0.7 * height)[..., None], tiles, sky)
    radius = height / 6
    clip = []
    for frame in range(frames):
        phase = frame / frames
        centre_x = radius + (width - 2 * radius) * phase
        centre_y = 0.75 * height - radius - 0.35 * height * abs(torch.tensor(phase * 6.283).sin())
        dx, dy = (x - centre_x) / radius, (y - centre_y) / radius
        inside = dx**2 + dy**2 < 1
        light = (1 - dx**2 - dy**2).clamp(min=0).sqrt() - 0.4 * dx - 0.5 * dy
        ball = light.clamp(0.15, 1.2)[..., None] * torch.tensor([210.0, 50.0, 40.0])
        clip.append(torch.where(inside[..., None], ball, background))
    return torch.stack(clip).clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/render_clip.py FILE.mp4")
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(sys.argv[1], fps=24) as writer:
        writer.write(render())
    logger.info("wrote %s", writer.path)
