"""data/buckets.py: what is promised of every epoch, step and rank."""

import logging
import pickle
from collections import Counter

import pytest

from opensoraplan.data.buckets import BucketSampler, Draw, VideoShape

IMAGE, SHORT, LONG = (1, 32, 32), (9, 32, 32), (17, 32, 48)
# 13, 10 and 25 samples; mixed up, and with 8 to a batch 1 + 1 + 3 steps and a remainder of each.
SHAPES: list[VideoShape] = (
    [(IMAGE, SHORT, LONG, LONG)[i * 7 % 4] for i in range(40)] + [IMAGE] * 3 + [LONG] * 5
)
STEPS = 5  # of an epoch


def sampler(*, global_batch: int = 8, seed: int = 0) -> BucketSampler:
    return BucketSampler(SHAPES, global_batch=global_batch, seed=seed)


def epoch_of(one: BucketSampler, epoch: int) -> list[Draw]:
    steps = range(epoch * STEPS, (epoch + 1) * STEPS)
    return [draw for step in steps for draw in one.global_batch(step)]


def test_an_epoch_has_what_it_promises() -> None:
    one = sampler()
    assert Counter(SHAPES) == {IMAGE: 13, SHORT: 10, LONG: 25}
    assert [one.epoch_of(step) for step in (STEPS - 1, STEPS)] == [0, 1]
    assert one.dropped_per_epoch == {IMAGE: 5, SHORT: 2, LONG: 1}
    left_out = set()
    for epoch in range(6):
        draws = epoch_of(one, epoch)
        indices = [draw.index for draw in draws]
        assert len(set(indices)) == len(indices) == 40
        assert Counter(SHAPES[index] for index in indices) == {IMAGE: 8, SHORT: 8, LONG: 24}
        assert {draw.epoch for draw in draws} == {epoch}
        left_out |= set(range(len(SHAPES))) - set(indices)
    # Not always the same ones.
    assert len(left_out) > 16


def test_a_step_has_one_shape_and_numbered_slots() -> None:
    one = sampler()
    for step in range(20):
        draws = one.global_batch(step)
        assert len({SHAPES[draw.index] for draw in draws}) == 1
        assert [draw.slot for draw in draws] == list(range(8))
        assert {(draw.step, draw.epoch) for draw in draws} == {(step, one.epoch_of(step))}
    assert [one.epoch_of(step) for step in (0, 4, 5, 14)] == [0, 0, 1, 2]


def test_shapes_are_mixed_in_time() -> None:
    one = BucketSampler([IMAGE] * 50 + [LONG] * 50, global_batch=2, seed=0)
    kinds = [draws[0].index < 50 for draws in map(one.global_batch, range(50))]
    assert 10 < sum(kinds[:25]) + sum(not kind for kind in kinds[25:]) < 40


def test_a_run_resumes_at_any_step() -> None:
    one = sampler()
    every = [one.global_batch(step) for step in range(17)]
    for step in (16, 3, 9, 10, 0):
        assert sampler().global_batch(step) == every[step]
    # Also with the cache of another epoch, here or in another process.
    assert pickle.loads(pickle.dumps(one)).global_batch(3) == one.global_batch(3) == every[3]


def test_order_depends_on_epoch_and_seed() -> None:
    orders = [
        tuple(draw.index for draw in epoch_of(sampler(seed=seed), epoch))
        for seed in (0, 1, 2**40)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_ranks_shares_the_same_batch(accumulate: int) -> None:
    one = sampler()
    for step in range(7):
        for ranks in (1, 2, 4):
            shares = [one.share(step, rank=r, ranks=ranks, accumulate=accumulate) for r in range(ranks)]
            sizes = {len(micro) for share in shares for micro in share}
            assert {len(share) for share in shares} == {accumulate}
            assert sizes == {8 // ranks // accumulate}
            union = [draw for share in shares for micro in share for draw in micro]
            assert sorted(union, key=lambda draw: draw.slot) == one.global_batch(step)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"8 .*3 ranks x 2 .*global batch of 6 or 12, or .* = 4 or 8"):
        sampler().share(0, rank=0, ranks=3, accumulate=2)
    with pytest.raises(ValueError, match=r"8 .*16 ranks x 1 .*global batch of 16, or .* = 8$"):
        sampler().share(0, rank=0, ranks=16, accumulate=1)
    with pytest.raises(ValueError, match="no samples"):
        BucketSampler([], global_batch=1, seed=0)


def test_rare_shapes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        one = sampler(global_batch=12)
    assert caplog.messages == ["shapes with fewer samples than a global batch are dropped: 10 of 9x32x32"]
    assert one.dropped_per_epoch == {IMAGE: 1, SHORT: 10, LONG: 1}
    assert SHORT not in {SHAPES[draw.index] for draw in epoch_of(one, 0)}
    with pytest.raises(
        ValueError, match=r"13 of 1x32x32, 10 of 9x32x32, 25 of 17x32x48; use a global batch of at most 25"
    ):
        sampler(global_batch=26)
