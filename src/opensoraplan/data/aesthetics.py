"""Adds a sentence on quality to captions of especially ugly or beautiful clips (`use_aesthetic`).

The sentences are the original's, since the model was trained with them.
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import replace

from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample

# Scores up to the first, and from the second on, get a sentence (docs/model.md, section 6).
_UGLY, _BEAUTIFUL = 4.25, 5.75

_LOW_VIDEO = (
    "This video has a low aesthetic quality.",
    "The beauty of this video is minimal.",
    "This video scores low in aesthetic appeal.",
    "The aesthetic quality of this video is below average.",
    "This video ranks low for beauty.",
    "The artistic quality of this video is lacking.",
    "This video has a low score for aesthetic value.",
    "The visual appeal of this video is low.",
    "This video is rated low for beauty.",
    "The aesthetic quality of this video is poor.",
)
_HIGH_VIDEO = (
    "This video has a high aesthetic quality.",
    "The beauty of this video is exceptional.",
    "This video scores high in aesthetic value.",
    "With its harmonious colors and balanced composition.",
    "This video ranks highly for aesthetic quality",
    "The artistic quality of this video is excellent.",
    "This video is rated high for beauty.",
    "The aesthetic quality of this video is impressive.",
    "This video has a top aesthetic score.",
    "The visual appeal of this video is outstanding.",
)
_LOW_IMAGE = tuple(sentence.replace("video", "image") for sentence in _LOW_VIDEO)
_HIGH_IMAGE = (
    "This image has a high aesthetic quality.",
    "The beauty of this image is exceptional",
    "This photo scores high in aesthetic value.",
    "With its harmonious colors and balanced composition.",
    "This image ranks highly for aesthetic quality.",
    "The artistic quality of this photo is excellent.",
    "This image is rated high for beauty.",
    "The aesthetic quality of this image is impressive.",
    "This photo has a top aesthetic score.",
    "The visual appeal of this image is outstanding.",
)


def aesthetic_notices(record: Record) -> tuple[str, ...]:
    """The ten sentences from which a caption of the record gets one; none for a score between 4.25 and 5.75,
    or without a score.
    """
    score = record.aesthetic
    if score is None or _UGLY < score < _BEAUTIFUL:
        return ()
    low, high = (_LOW_IMAGE, _HIGH_IMAGE) if record.is_image else (_LOW_VIDEO, _HIGH_VIDEO)
    return low if score <= _UGLY else high


def add_aesthetic_notices(samples: Iterable[Sample], *, seed: int) -> tuple[Sample, ...]:
    """Add a sentence before or after each caption of the samples whose score asks for one.

    Sentence and place are drawn from `seed`, the file's name, its cut and the index of the caption: they are
    the same in all epochs, after a resume, in any process and in the feature cache. (The original draws
    again each time.)
    """
    return tuple(_add_notice(sample, seed=seed) for sample in samples)


def _add_notice(sample: Sample, *, seed: int) -> Sample:
    record = sample.record
    notices = aesthetic_notices(record)
    if not notices:
        return sample
    captions: list[str] = []
    for place, caption in enumerate(record.captions):
        # By name, not by path: the same data on another disk makes the same run.
        key = f"aesthetic {seed} {record.cut} {place} {record.path.name}".encode("utf-8", "surrogatepass")
        chance = random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8]))
        notice = chance.choice(notices)
        parts = (caption, notice) if chance.random() < 0.5 else (notice, caption)
        captions.append(" ".join(filter(None, parts)))
    return replace(sample, record=replace(record, captions=tuple(captions)))
