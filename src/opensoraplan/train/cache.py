"""`osp cache`: encode the clips and captions of a training run once, into the folder that data/features.py
describes.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from opensoraplan.data import features
from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import ClipDataset, all_captions
from opensoraplan.data.features import Description, Kind, LeftOut
from opensoraplan.data.selection import Sample
from opensoraplan.data.video import Reader, installed_reader
from opensoraplan.device import resolve_device
from opensoraplan.parallel.ranks import device_of_rank
from opensoraplan.train.config import DataSettings, TrainSettings
from opensoraplan.train.encoders import Encoders, check_paths, load_encoders
from opensoraplan.train.sources import preprocessing_parts, select_clips

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CacheSummary:
    """What there is after `write_cache`: `samples` and `texts` that the whole cache is of, and shards that
    this call has `written`, that were there before (`present`), and that other ranks have yet to write
    (`missing`). `left_out`: the clips of this rank's shards that cannot be read.
    """

    folder: Path
    samples: int
    texts: int
    written: int
    present: int
    missing: int
    left_out: tuple[LeftOut, ...]


def write_cache(
    settings: TrainSettings,
    out: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Progress | None = None,
    videos_per_shard: int = 64,
    texts_per_shard: int = 1024,
) -> CacheSummary:
    """Encode the clips that `settings.data` selects, each at one window, and all their captions.

    Shards that are there already are kept: the same call goes on with a killed one. Of `ranks` processes each
    writes the shards of its own `rank`; the files are the same however many there are. A clip that cannot be
    read is left out; to try it again, delete its shard. Bars show how far this rank is, which
    `progress(step, done, total)` is told, too, step being "texts" or "videos".

    Raises ValueError, before anything is encoded, for settings that are missing, a manifest without samples
    or captions, a folder that has something else (of another cache, what differs), and a disk that cannot be
    written to; later for a full disk, and for more than `data.max_bad_files` unreadable files, naming each.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"with {ranks} ranks, rank must be in 0 .. {ranks - 1}, got {rank}")
    if settings.data.manifest is None:
        raise ValueError("data.manifest is missing: there are no clips to encode")
    check_paths(settings.vae, settings.text)
    device = device_of_rank(resolve_device(settings.device))
    # Of every shape: how large batches are is for training to say.
    samples = select_clips(settings.data, settings.data.manifest, seed=settings.seed)
    preprocessing = preprocessing_parts(settings, samples)
    features.check_place(out, preprocessing)

    texts = _texts(samples, use_aesthetic=settings.data.use_aesthetic)
    encoders = load_encoders(settings.vae, settings.text, device=device)
    config = {key: value for key, value in encoders.vae.config.items() if not key.startswith("_")}
    description = Description(
        parts=encoders.fingerprint() | preprocessing,
        vae=json.loads(json.dumps(config)),  # as it will be read: lists instead of tuples
        use_aesthetic=settings.data.use_aesthetic,
        samples=len(samples),
        texts=len(texts),
        videos_per_shard=videos_per_shard,
        texts_per_shard=texts_per_shard,
    )
    features.begin(out, description)
    job = _Job(out, description, encoders=encoders, rank=rank, ranks=ranks, progress=progress)
    job.encode_texts(texts)
    left_out = job.encode_videos(samples, settings.data, seed=settings.seed)
    missing = features.missing_shards(out)
    if not missing:
        features.finish(out)
    summary = CacheSummary(
        folder=out,
        samples=len(samples),
        texts=len(texts),
        written=job.written,
        present=job.present,
        missing=len(missing),
        left_out=tuple(left_out),
    )
    logger.info(
        "%s: %d samples, %d texts; shards: %d written, %d there before, %d missing; clips left out: %d",
        *(out, summary.samples, summary.texts, summary.written, summary.present, summary.missing),
        len(left_out),
    )
    return summary


class _Job:
    """One rank's share of the work; counts its shards."""

    def __init__(
        self,
        out: Path,
        description: Description,
        *,
        encoders: Encoders,
        rank: int,
        ranks: int,
        progress: Progress | None,
    ) -> None:
        self.out = out
        self.description = description
        self.encoders = encoders
        self.rank = rank
        self.ranks = ranks
        self.progress = progress
        self.written = 0
        self.present = 0

    def encode_texts(self, texts: Sequence[str]) -> None:
        there, to_write = self._share("texts")
        with self._counted("texts", there, to_write) as one_more:
            for shard in to_write:
                states: dict[str, tuple[Tensor, Tensor]] = {}
                for place in self.description.places("texts", shard):
                    encoded = self.encoders.encode_captions([texts[place]])
                    states[texts[place]] = encoded.sequence[0].cpu(), encoded.pooled[0].cpu()
                    one_more()
                features.write_texts(self.out, shard, states)
                self.written += 1

    def encode_videos(self, samples: Sequence[Sample], data: DataSettings, *, seed: int) -> list[LeftOut]:
        """Returns the clips of this rank that cannot be read, also those of shards that were there."""
        there, to_write = self._share("videos")
        left_out = features.read_left_out(self.out, there)
        _check_limit(left_out, limit=data.max_bad_files)
        places = [place for shard in to_write for place in self.description.places("videos", shard)]
        clips = iter(
            DataLoader(
                _Clips(samples, data, seed=seed),
                sampler=places,
                batch_size=None,
                num_workers=data.workers,
                # A clip of the release's size is 0.9 GB; each worker reads one ahead.
                prefetch_factor=1 if data.workers else None,
            )
        )
        with self._counted("videos", there, to_write) as one_more:
            for shard in to_write:
                moments: list[tuple[Sample, Tensor]] = []
                bad: list[LeftOut] = []
                for place in self.description.places("videos", shard):
                    read = next(clips)
                    if isinstance(read, LeftOut):
                        bad.append(read)
                        _check_limit([*left_out, *bad], limit=data.max_bad_files)
                    else:
                        moments.append((samples[place], self.encoders.encode_videos(read[None])[0].cpu()))
                    one_more()
                features.write_videos(self.out, shard, moments, left_out=bad)
                self.written += 1
                left_out += bad
        return left_out

    def _share(self, kind: Kind) -> tuple[list[int], list[int]]:
        """This rank's shards: those that are there, and those that are to be written."""
        own = range(self.rank, self.description.shards(kind), self.ranks)
        there = [shard for shard in own if features.is_written(self.out, kind, shard)]
        self.present += len(there)
        return there, sorted(set(own) - set(there))

    @contextmanager
    def _counted(
        self, kind: Kind, there: Sequence[int], to_write: Sequence[int]
    ) -> Iterator[Callable[[], None]]:
        """A bar over this rank's shards; what comes out is called for each text or clip that is done."""
        first, more = (
            sum(len(self.description.places(kind, shard)) for shard in shards) for shards in (there, to_write)
        )
        total, counter = first + more, count(first + 1)
        with tqdm(total=total, initial=first, desc=f"encoding {kind}", unit=kind[:-1]) as bar:

            def one_more() -> None:
                bar.update()
                if self.progress is not None:
                    self.progress(kind, next(counter), total)

            yield one_more


class _Clips(Dataset[Tensor | LeftOut]):
    """Pixels [3, T, H, W] of the sample at a place, or why they cannot be read."""

    def __init__(self, samples: Sequence[Sample], data: DataSettings, *, seed: int) -> None:
        self._samples = samples
        self._reader: Reader = installed_reader(data.reader)
        self._seed = seed

    def __getitem__(self, place: int) -> Tensor | LeftOut:
        sample = self._samples[place]
        # By itself, so that none of the same shape can take its place.
        alone = ClipDataset([sample], seed=self._seed, new_windows=False, reader=self._reader)
        try:
            return alone[Draw(index=0, epoch=0, step=0, slot=0)].video
        except (OSError, ValueError) as error:
            return LeftOut(_printable(str(sample.record.path)), _printable(str(error)))


def _texts(samples: Sequence[Sample], *, use_aesthetic: bool) -> list[str]:
    """Every text once, in the order of the samples; first of all the empty one, for dropped captions."""
    texts = {"": None}
    for sample in samples:
        texts |= dict.fromkeys(all_captions(sample, use_aesthetic=use_aesthetic))
    return list(texts)


def _check_limit(left_out: Sequence[LeftOut], *, limit: int) -> None:
    if len(left_out) > limit:
        listed = "; ".join(error if path in error else f"{path}: {error}" for path, error in left_out)
        raise ValueError(f"{len(left_out)} files cannot be read, data.max_bad_files is {limit}: {listed}")


def _printable(name: str) -> str:
    """Names of files may hold bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
