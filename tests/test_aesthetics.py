"""data/aesthetics.py: the original's sentences on quality, drawn by seed and sample alone."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from opensoraplan.data.aesthetics import add_aesthetic_notices, aesthetic_notices
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample

GOLDEN = json.loads((Path(__file__).parent / "golden" / "aesthetic_notices.json").read_text())


def sample(name: str, score: float | None, *captions: str) -> Sample:
    record = Record(Path(name), captions or ("a cat",), num_frames=9, fps=24.0, aesthetic=score)
    return Sample(0, record, num_frames=9, height=16, width=16)


def texts(*samples: Sample, seed: int = 0) -> list[tuple[str, ...]]:
    return [one.record.captions for one in add_aesthetic_notices(samples, seed=seed)]


@pytest.mark.parametrize(("name", "kind"), [("a.mp4", "video"), ("a.jpg", "image")])
@pytest.mark.parametrize(
    ("score", "level"), [(4.25, "low"), (4.26, None), (5.74, None), (5.75, "high"), (None, None)]
)
def test_ten_sentences_for_extremes(name: str, kind: str, score: float | None, level: str | None) -> None:
    expected = GOLDEN[f"{level}_aesthetic_score_notices_{kind}"] if level else []
    one = sample(name, score)
    assert list(aesthetic_notices(one.record)) == expected
    assert (texts(one) == [("a cat",)]) == (level is None)


def test_all_sentences_before_and_after() -> None:
    samples = [sample(f"{number}.mp4", 6.0) for number in range(1000)]
    drawn = Counter(caption for (caption,) in texts(*samples))
    notices = GOLDEN["high_aesthetic_score_notices_video"]
    expected = {f"a cat {notice}" for notice in notices} | {f"{notice} a cat" for notice in notices}
    assert set(drawn) == expected
    assert 25 < min(drawn.values()) < max(drawn.values()) < 80


def test_drawn_by_seed_and_sample_alone() -> None:
    samples = [sample(f"{number}.mp4", 3.0, "one", "two") for number in range(20)]
    first = texts(*samples)
    assert texts(*samples[7:]) == first[7:]
    moved = [replace(one, record=replace(one.record, path="/disk" / one.record.path)) for one in samples]
    assert texts(*moved) == first
    other = texts(*samples, seed=1)
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 15
    # Each caption, and each part of a film, has its own.
    alone = [{text.replace("one", "").replace("two", "").strip() for text in captions} for captions in first]
    assert sum(len(notices) for notices in alone) > 30
    parts = [replace(samples[0], record=replace(samples[0].record, cut=(start, 99))) for start in range(9)]
    assert len(set(texts(*parts))) > 5


def test_no_words_beside_the_sentence() -> None:
    ((caption,),) = texts(sample("a.mp4", 6.0, ""))
    assert caption in GOLDEN["high_aesthetic_score_notices_video"]
