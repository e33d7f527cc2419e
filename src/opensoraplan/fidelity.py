"""How close one video is to another: PSNR and SSIM."""

import math

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


class Fidelity:
    """PSNR and SSIM between two videos that come in chunks; memory does not grow with their length."""

    def __init__(self) -> None:
        self._squares = 0
        self._values = 0
        self._ssim = 0.0
        self._frames = 0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add frames and what became of them, both uint8 [t, H, W, 3] with sides of at least 16."""
        for old, new in zip(before, after, strict=True):
            difference = old.int() - new.int()
            self._squares += int(difference.square().sum())
            self._values += difference.numel()
            ssim = structural_similarity_index_measure(_unit(new), _unit(old), data_range=1.0)
            assert isinstance(ssim, Tensor)
            self._ssim += float(ssim)
            self._frames += 1

    @property
    def psnr(self) -> float:
        """Peak signal to noise ratio in dB, from the mean squared error over all pixels; inf for no error."""
        if not self._squares:
            return math.inf
        return 10 * math.log10(255**2 * self._values / self._squares)

    @property
    def ssim(self) -> float:
        """Mean structural similarity of the frames (Gaussian window, sigma 1.5, 11 wide); 1 for no error."""
        return self._ssim / self._frames


def _unit(frame: Tensor) -> Tensor:
    """A picture, uint8 [H, W, 3], as float [1, 3, H, W] in [0, 1]."""
    return frame.permute(2, 0, 1)[None].float() / 255
