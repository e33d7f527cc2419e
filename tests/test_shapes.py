"""Divisibility rules and what their errors say."""

import pytest

from opensoraplan import shapes


@pytest.mark.parametrize(
    ("frames", "nearest"), [(1, (1, 9)), (8, (1, 9)), (9, (9, 17)), (29, (25, 33)), (121, (121, 129))]
)
def test_nearest_frames(frames: int, nearest: tuple[int, int]) -> None:
    assert shapes.nearest_frames(frames) == nearest


@pytest.mark.parametrize("frames", [1, 9, 17, 121])
def test_valid_frames_pass(frames: int) -> None:
    shapes.check_frames(frames)
    assert shapes.pixel_frames(shapes.latent_shape(frames, 32, 48)[0]) == frames


@pytest.mark.parametrize(
    ("frames", "named"), [(29, "got 29: use 25 or 33"), (0, "use 1 or 9"), (-7, "use 1 or 9")]
)
def test_wrong_frames_name_the_nearest(frames: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        shapes.check_frames(frames)


def test_wrong_sides_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"multiples of 16, got width 1000: the nearest valid size is 576 x 992"
    ):
        shapes.check_sides(576, 1000)
    with pytest.raises(ValueError, match=r"height 5 and width -1: the nearest valid size is 16 x 16"):
        shapes.check_sides(5, -1)


def test_latent_shape() -> None:
    assert shapes.latent_shape(121, 576, 1024) == (16, 72, 128)


def test_another_vae_has_its_own_rules() -> None:
    strides = shapes.Strides(temporal=4, spatial=16)
    assert shapes.latent_shape(13, 64, 96, strides=strides) == (4, 4, 6)
    assert shapes.latent_shape(13, 16, 48, strides=strides, patch=1) == (4, 1, 3)
    assert shapes.pixel_frames(4, strides=strides) == 13
    with pytest.raises(ValueError, match=r"frames must be 4k \+ 1 \(1, 5, 9, ...\), got 12: use 9 or 13"):
        shapes.latent_shape(12, 64, 96, strides=strides)
    with pytest.raises(ValueError, match=r"sides must be multiples of 32, got width 48: .* 64 x 64"):
        shapes.latent_shape(13, 64, 48, strides=strides)
