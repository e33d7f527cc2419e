"""`osp cache`: encode the clips and captions of a training run once, into the folder
that data/features.py describes.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from opensoraplan.claims import Claim, claim, share_in_passes
from opensoraplan.data import features
from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import ClipDataset, all_captions
from opensoraplan.data.features import Description, Kind, KnownFile, LeftOut
from opensoraplan.data.selection import Sample
from opensoraplan.data.video import Reader, installed_reader
from opensoraplan.device import explain_full_memory, prepare, resolve_device
from opensoraplan.models.text import shapes_of
from opensoraplan.parallel.ranks import device_of_rank
from opensoraplan.train.config import DataSettings, TrainSettings
from opensoraplan.train.inputs.encoders import check_paths, load_encoders
from opensoraplan.train.inputs.loading import ignore_signals, iterate
from opensoraplan.train.inputs.sources import preprocessing_parts, select_clips, warn_of_captions

logger = logging.getLogger(__name__)

_FULL = (
    "a clip or its caption cannot be encoded, memory is full: lower vae.chunk or the sizes of "
    'data.selection, or set vae.compute to "bf16"'
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CacheSummary:
    """What there is after `write_cache`: `samples` and `texts` that the whole cache is of, and shards that
    this call has `written`, that were there before or that other processes have written meanwhile
    (`present`), and that other ranks have yet to write (`missing`). `left_out`: the clips of this rank's
    shards that cannot be read.
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

    Shards that are there already are kept: the same call goes on with a killed one. Those of which a clip
    was replaced since are written again. Of `ranks` processes each writes the shards of its own `rank`,
    which it shares with other processes that were started with the same settings and folder; the files are
    the same however many there are. A clip that cannot be read is left out; to try it again, delete its
    shard. Bars show how far this rank is, which `progress(step, done, total)` is told, too, step being
    "texts" or "videos".

    Raises ValueError, before anything is encoded, for settings that are missing, a manifest without samples
    or captions, a folder that has something else (of another cache, what differs), and a disk that cannot be
    written to; later for a full disk, and for more than `data.max_bad_files` unreadable files, naming each.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"with {ranks} ranks, rank must be in 0 .. {ranks - 1}, got {rank}")
    job = CacheJob(settings, out, videos_per_shard=videos_per_shard, texts_per_shard=texts_per_shard)
    shards = 0
    for kind in features.KINDS:
        own = range(rank, job.description.shards(kind), ranks)
        shards += len(own)
        there = job.written(kind, own)
        to_write = sorted(set(own) - set(there))
        with _counted(job.description, kind, there, to_write, progress) as one_more:
            write = partial(job.write, kind, one_more=one_more)
            share_in_passes(to_write, write, what=f"shards of {kind}")
    return job.finish(written=job.encoded, present=shards - job.encoded)


@contextmanager
def _counted(
    description: Description,
    kind: Kind,
    there: Sequence[int],
    to_write: Sequence[int],
    progress: Progress | None,
) -> Iterator[Callable[[], None]]:
    """A bar over one rank's shards; what comes out is called for each text or clip that is done."""
    first, more = (
        sum(len(description.places(kind, shard)) for shard in shards) for shards in (there, to_write)
    )
    total, counter = first + more, count(first + 1)
    with tqdm(total=total, initial=first, desc=f"encoding {kind}", unit=kind[:-1]) as bar:

        def one_more() -> None:
            bar.update()
            if progress is not None:
                progress(kind, next(counter), total)

        yield one_more


class CacheJob:
    """What all processes that fill one cache have in common: samples, texts and encoders, and the folder
    begun or gone on with. Raises ValueError as `write_cache`, before anything is encoded.

    Attributes: `encoded`, the number of shards that this process has written; `left_out`, the clips that
    cannot be read, of all shards that it has looked at.
    """

    def __init__(
        self, settings: TrainSettings, out: Path, *, videos_per_shard: int = 64, texts_per_shard: int = 1024
    ) -> None:
        data = settings.data
        if data.manifest is None:
            raise ValueError("data.manifest is missing: there are no clips to encode")
        check_paths(settings.vae, settings.text)
        device = device_of_rank(resolve_device(settings.device))
        prepare(device, allow_tf32=settings.allow_tf32)
        self.settings = settings
        self.out = out
        # Of every shape: how large batches are is for training to say.
        self.samples = select_clips(data, data.manifest, root=data.root, seed=settings.seed)
        preprocessing = preprocessing_parts(settings, self.samples)
        features.check_place(out, preprocessing)
        warn_of_captions(self.samples, settings.text)

        self.texts = _texts(self.samples)
        self.encoders = load_encoders(settings.vae, settings.text, device=device)
        config = {key: value for key, value in self.encoders.vae.config.items() if not key.startswith("_")}
        self.description = Description(
            parts=self.encoders.fingerprint() | preprocessing,
            vae=json.loads(json.dumps(config)),  # as it will be read: lists instead of tuples
            vae_class=type(self.encoders.vae).__name__,
            temporal_stride=self.encoders.vae.strides.temporal,
            spatial_stride=self.encoders.vae.strides.spatial,
            text_features=shapes_of(self.encoders.text),
            use_aesthetic=data.use_aesthetic,
            last_frames=settings.conditions.first_last > 0,
            samples=len(self.samples),
            texts=len(self.texts),
            videos_per_shard=videos_per_shard,
            texts_per_shard=texts_per_shard,
        )
        features.begin(out, self.description)
        self.encoded = 0
        self.left_out: list[LeftOut] = []
        self._told: set[Path] = set()

    def written(self, kind: Kind, shards: Sequence[int]) -> list[int]:
        """Which of these files are there, whole, and made of the clips as they are now. Raises ValueError if
        more than `data.max_bad_files` clips are left out.
        """
        there = [shard for shard in shards if features.is_written(self.out, self.description, kind, shard)]
        if kind == "texts":
            return there
        changed = features.changed_clips(self.out, self.samples, there)
        paths = {path for paths in changed.values() for path in paths}
        for path in sorted(paths - self._told):
            logger.info("%s has changed: it is encoded again", path)
        self._told |= paths
        there = [shard for shard in there if shard not in changed]
        self.leave_out(features.read_left_out(self.out, there))
        return there

    def write(self, kind: Kind, shards: Sequence[int], *, one_more: Callable[[], None]) -> list[int]:
        """Encode and write these files, but those that another process has written since they were looked at.
        `one_more` is called for each text or clip that is done.

        Returns those that other processes are writing now. Raises ValueError if more than
        `data.max_bad_files` clips cannot be read.
        """
        busy: list[int] = []
        claims = self._claim(kind, shards, one_more, busy)
        if kind == "videos":
            self._write_videos(claims, one_more)
        else:
            for shard, own in claims:
                with own:
                    self._write_texts(shard, one_more)
        return busy

    def _claim(
        self, kind: Kind, shards: Sequence[int], one_more: Callable[[], None], busy: list[int]
    ) -> Iterator[tuple[int, Claim]]:
        """Claim the files that are to be written, each when it is asked for; add to `busy` those that other
        processes have claimed.
        """
        for shard in shards:
            own = claim(features.shard_path(self.out, kind, shard))
            if own is None:
                busy.append(shard)
                continue
            try:
                is_written = bool(self.written(kind, [shard]))  # until just now
            except BaseException:
                own.release()
                raise
            if not is_written:
                yield shard, own
                continue
            own.release()
            for _ in self.description.places(kind, shard):
                one_more()

    def _write_texts(self, shard: int, one_more: Callable[[], None]) -> None:
        found: dict[str, dict[str, Tensor]] = {}
        for place in self.description.places("texts", shard):
            with explain_full_memory(_FULL):
                (encoded,) = self.encoders.encode_captions([self.texts[place]])
            found[self.texts[place]] = {name: feature.cpu() for name, feature in encoded.items()}
            one_more()
        features.write_texts(self.out, shard, found)
        self.encoded += 1

    def _write_videos(self, claims: Iterator[tuple[int, Claim]], one_more: Callable[[], None]) -> None:
        """Write the files that `claims` gives. The next ones are claimed when their clips are read ahead."""
        first = next(claims, None)
        if first is None:
            return
        ahead: deque[tuple[int, Claim]] = deque()

        def places() -> Iterator[int]:
            for shard, own in chain([first], claims):
                ahead.append((shard, own))
                yield from self.description.places("videos", shard)

        data = self.settings.data
        loader = DataLoader(
            _Clips(self.samples, data, seed=self.settings.seed),
            sampler=places(),  # type: ignore[arg-type]  (it is iterated once)
            batch_size=None,
            num_workers=data.workers,
            # A clip of the release's size is 0.9 GB; each worker reads one ahead.
            prefetch_factor=1 if data.workers else None,
            worker_init_fn=ignore_signals,
        )
        try:
            with closing(iterate(loader)) as clips:
                for clip in clips:
                    shard, own = ahead[0]
                    self._write_videos_of(shard, chain([clip], clips), one_more)
                    ahead.popleft()
                    own.release()
        finally:
            for _, own in ahead:
                own.release()

    def _write_videos_of(
        self, shard: int, clips: Iterator["_Clip | LeftOut"], one_more: Callable[[], None]
    ) -> None:
        moments: list[tuple[Sample, Tensor]] = []
        last: list[Tensor] = []
        files: dict[int, KnownFile] = {}
        bad: list[LeftOut] = []
        for place in self.description.places("videos", shard):
            read = next(clips)
            if isinstance(read, LeftOut):
                bad.append(read)
                self.leave_out([read])
            else:
                with explain_full_memory(_FULL):
                    encoded = self.encoders.encode_videos(read.video[None])[0].cpu()
                    if self.description.last_frames:
                        last.append(self.encoders.encode_videos(read.video[None, :, -1:])[0].cpu())
                moments.append((self.samples[place], encoded))
                files[place] = read.file
            one_more()
        features.write_videos(self.out, shard, moments, last=last, files=files, left_out=bad)
        self.encoded += 1

    def leave_out(self, clips: Sequence[LeftOut]) -> None:
        """Add to `left_out`. Raises ValueError if it gets more than `data.max_bad_files`."""
        self.left_out += clips
        check_limit(self.left_out, limit=self.settings.data.max_bad_files)

    def finish(self, *, written: int, present: int) -> CacheSummary:
        """Finish the cache if all its shards are there; say what was done."""
        missing = features.missing_shards(self.out)
        if not missing:
            features.finish(self.out)
        summary = CacheSummary(
            folder=self.out,
            samples=len(self.samples),
            texts=len(self.texts),
            written=written,
            present=present,
            missing=len(missing),
            left_out=tuple(self.left_out),
        )
        logger.info(
            "%s: %d samples, %d texts; shards: %d written, %d there before, %d missing; clips left out: %d",
            *(self.out, summary.samples, summary.texts, written, present, len(missing), len(self.left_out)),
        )
        return summary


class _Clip(NamedTuple):
    """Pixels [3, T, H, W], and the file that they are from."""

    video: Tensor
    file: KnownFile


class _Clips(Dataset[_Clip | LeftOut]):
    """The sample at a place, or why it cannot be read."""

    def __init__(self, samples: Sequence[Sample], data: DataSettings, *, seed: int) -> None:
        self._samples = samples
        self._reader: Reader = installed_reader(data.reader)
        self._seed = seed

    def __getitem__(self, place: int) -> _Clip | LeftOut:
        sample = self._samples[place]
        # By itself, so that none of the same shape can take its place.
        alone = ClipDataset([sample], seed=self._seed, new_windows=False, reader=self._reader)
        try:
            file = KnownFile.of(sample.record.path)
            return _Clip(alone[Draw(index=0, epoch=0, step=0, slot=0)].video, file)
        except (OSError, ValueError) as error:
            return LeftOut(_printable(str(sample.record.path)), _printable(str(error)))


def _texts(samples: Sequence[Sample]) -> list[str]:
    """Every text once, in the order of the samples; first of all the empty one, for dropped captions."""
    texts = {"": None}
    for sample in samples:
        texts |= dict.fromkeys(all_captions(sample))
    return list(texts)


def check_limit(left_out: Sequence[LeftOut], *, limit: int) -> None:
    """Raise ValueError, naming each, if more than `limit` files cannot be read."""
    if len(left_out) > limit:
        listed = "; ".join(error if path in error else f"{path}: {error}" for path, error in left_out)
        raise ValueError(f"{len(left_out)} files cannot be read, data.max_bad_files is {limit}: {listed}")


def _printable(name: str) -> str:
    """Names of files may hold bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
