"""The job behind `osp generate`: requests in, one mp4 (or png) and one json for each video out; resumable.

What is asked for is read in requests.py; the model is a session's (session.py), reading and writing video are
in data/video.py.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensoraplan import shapes
from opensoraplan.ahead import one_ahead
from opensoraplan.claims import claim, holder, share_out
from opensoraplan.disk import numbered, workplace, write_new
from opensoraplan.documents import parse_json
from opensoraplan.requests import Request

if TYPE_CHECKING:
    from torch import Tensor

    from opensoraplan.generate.saved import SavedLatents
    from opensoraplan.generate.session import Session
    from opensoraplan.pipeline import OpenSoraPlanPipeline

logger = logging.getLogger(__name__)

OTHER_FORMATS = (".avi", ".gif", ".jpeg", ".jpg", ".m4v", ".mkv", ".mov", ".webm", ".webp")
# Of a name made of a prompt, in bytes: most file systems take 255 for a whole name.
STEM_BYTES = 120


class Targets:
    """Where videos go: the file of one request, or a folder with one name for each. Makes the folder, or
    raises ValueError if it cannot be written to.
    """

    def __init__(self, out: Path, *, count: int) -> None:
        if out.suffix.lower() in OTHER_FORMATS:
            raise ValueError(
                f"videos are written as .mp4, pictures as .png, got {out}: use {out.with_suffix('.mp4')}"
            )
        self.single = out if out.suffix.lower() in (".mp4", ".png") else None
        if self.single is not None and count > 1:
            raise ValueError(
                f"{out} is one file, but there are {count} videos to make: "
                f"give a folder, {out.with_suffix('')}"
            )
        self.folder = out.parent if self.single else out
        self.count = count
        check_folder(self.folder, out.name if self.single else "")

    def path(self, index: int, request: Request) -> Path:
        """The name wanted for the index-th video. One frame is a png, more are an mp4."""
        suffix = ".png" if request.frames == 1 else ".mp4"
        if self.single is not None:
            if self.single.suffix.lower() != suffix:
                what = "1 frame is" if request.frames == 1 else f"{request.frames} frames are"
                other = "9 frames or more" if request.frames == 1 else "1 frame"
                raise ValueError(
                    f"{what} written as {suffix}, got {self.single}: "
                    f"use {self.single.with_suffix(suffix)}, or {other}"
                )
            return self.single
        number = f"{index:04d}_" if self.count > 1 else ""
        return self.folder / f"{number}{stem_of(request.prompt)}_seed{request.seed}{suffix}"


def check_folder(folder: Path, name: str = "") -> None:
    """Raise ValueError if a folder, or a file in it with a name like that, cannot be written. It need not
    exist, and is not made.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if there == folder and not there.is_dir():
            raise ValueError(f"cannot write to {folder}: it is a file, not a folder")
        with workplace(there) as place:
            # The longest name that there may be.
            (place / f"{Path(name).stem}_999.latents.safetensors").touch()
    except OSError as error:
        raise ValueError(f"cannot write to {folder / name}: {error.strerror}") from error


def stem_of(prompt: str) -> str:
    """The words of a prompt as a part of a file name, cut to STEM_BYTES."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).encode()[:STEM_BYTES].decode(errors="ignore")
    return words.strip("-") or "video"


def check_targets(requests: list[Request], out: Path) -> list[Path]:
    """The wanted path of each request's video; raises ValueError if `out` cannot take them."""
    targets = Targets(out, count=len(requests))
    return [targets.path(index, request) for index, request in enumerate(requests)]


def run(
    session: "Session", requests: list[Request], paths: list[Path], *, resume: bool, save_every: int = 0
) -> list[Path]:
    """Make the videos one after the other and return their files.

    No file is overwritten: a name that is taken gets a number. With `resume`, a request whose video is
    already among those is passed over, one whose latents were saved (see `make_video`) goes on from them, and
    one that another process is making is left to it: several processes share the requests, and each waits
    until all are made. Without it, that is a ValueError. Videos and latents of other weights are known by the
    session's fingerprints (without, by its `model`). Of several ranks, which all call this, the first writes.

    Raises NonFiniteLatentsError if latents become NaN, after writing the last good ones beside the video, and
    MemoryError for a size that does not fit.
    """
    ranks = session.ranks
    written: dict[int, Path] = {}
    total = len(requests)

    def make_one(numbered_request: tuple[int, tuple[Request, Path]]) -> bool:
        number, (request, wanted) = numbered_request
        record = session.record(request)
        with ExitStack() as stack:
            if not ranks.agree(partial(_take, stack, wanted, record, others_wait=not resume)):
                return False
            done = ranks.agree(partial(find_done, wanted, record)) if resume else None
            if done is not None:
                logger.info("%d of %d is done: %s", number, total, done)
                written[number] = done
                return True
            logger.info("%d of %d: %r, seed %d", number, total, request.prompt, request.seed)
            if request.step_cache:
                logger.info("with a step cache, its latents are kept only once all steps are done")
            make = partial(_make, session, request, wanted, record, save_every=save_every)
            path = session.attempt(request, lambda again: make(go_on=resume or again))
            if path is not None:
                logger.info("wrote %s", path)
                written[number] = path
        return True

    try:
        share_out(enumerate(zip(requests, paths, strict=True), start=1), make_one, what="videos")
    except KeyboardInterrupt:
        command = "the same command" if resume else "the same command with --resume"
        logger.info("stopped, %d of %d done: %s goes on", len(written), total, command)
        raise
    return [path for _, path in sorted(written.items())]


def _take(stack: ExitStack, wanted: Path, record: dict[str, Any], *, others_wait: bool) -> bool:
    """Claim a video until the stack is left. False: another process is making it; `others_wait`: raise
    ValueError then.
    """
    # Which weights they are is told by fingerprint, wherever they are.
    told = {"opensoraplan", "model"} if record.get("fingerprint") else {"opensoraplan"}
    video = {key: value for key, value in record.items() if key not in told}
    digest = hashlib.sha256(json.dumps(video, sort_keys=True).encode()).hexdigest()
    work = wanted.with_name(f"{wanted.name} {digest}")
    own = claim(work)
    if own is not None:
        stack.enter_context(own)
    elif others_wait:
        raise ValueError(
            f"another process ({holder(work)}) is making this very video: wait for it, stop it, or give "
            "another --seed"
        )
    return own is not None


def _make(
    session: "Session",
    request: Request,
    wanted: Path,
    record: dict[str, Any],
    *,
    save_every: int,
    go_on: bool,
) -> Path | None:
    """One video, from the latents that were saved of it if there are any (`go_on`); in other processes than
    the first, which writes it, their share of it.
    """
    ranks = session.ranks
    start = ranks.agree(partial(find_latents, session, request, wanted, record)) if go_on else None
    if start is not None:
        logger.info("going on after step %d of %d", start.step, request.steps)
        session.embeds.put(request, start)
    if ranks.first:
        if start is None:
            set_latents_aside(wanted, record)
        with _latents_claimed(wanted, record) as place:
            return make_video(
                session, request, wanted, record, place=place, start=start, save_every=save_every
            )
    session.share_decoding(session.denoise(request, start=start))
    return None


def make_video(
    session: "Session",
    request: Request,
    wanted: Path,
    record: dict[str, Any],
    *,
    place: Path,
    start: "SavedLatents | None" = None,
    save_every: int = 0,
) -> Path:
    """One video and its json. Frames go into the encoder as they are decoded. Returns the path of the video.

    Until it is written, the last latents that were good are kept in `place`, a file beside it: after every
    `save_every` steps and when it is stopped (0: not before the last), before decoding, and when it fails.
    Not in the middle of a run with a step cache, which would go on without what it has cached.
    """
    from opensoraplan.pipeline import NonFiniteLatentsError

    save = partial(save_latents, place, record=record, session=session, request=request)

    # Other schedulers may have more calls than steps, and cannot begin in the middle.
    possible = bool(save_every) and session.can_continue(request)
    save_newest: Callable[[], None] | None = None

    def keep(latents: "Tensor", step: int, velocity: "Tensor") -> None:
        nonlocal save_newest
        if possible and step < request.steps:
            save_newest = partial(
                save, latents, step, velocity=velocity if request.solver == "adams" else None
            )
            if step % save_every == 0:
                save_newest()
                save_newest = None

    try:
        latents = session.denoise(request, start=start, after_step=keep)
    except NonFiniteLatentsError as error:
        save(error.last_good, min(error.step, request.steps) - 1)
        logger.error(_describe_kept(place, record))
        raise
    except KeyboardInterrupt:
        if save_newest is not None:
            save_newest()
        logger.info(_describe_kept(place, record))
        raise
    if start is None or start.step < request.steps:
        save(latents, request.steps)
    try:
        path = write_frames(session.pipeline, latents, wanted, record, fps=request.fps)
    except BaseException:
        logger.error(_describe_kept(place, record))
        raise
    place.unlink(missing_ok=True)
    return path


def place_of_latents(wanted: Path, record: dict[str, Any]) -> Path:
    """Where the latents of this very video are kept, or will be: no other video's are in that place."""
    from opensoraplan.generate import saved

    places = map(saved.place_of, numbered(wanted))
    return next(place for place in places if not place.exists() or saved.is_of(place, record))


def _describe_kept(place: Path, record: dict[str, Any]) -> str:
    """What the disk has of a video that is not written: what could be saved last need not be the last."""
    from opensoraplan.generate import saved

    step, steps = saved.step_of(place, record), record["steps"]
    if step is None:
        return "nothing is saved of this video, which begins anew the next time"
    if step == steps:
        return f"the latents, which are finished, are in {place}: osp decode makes a video of them"
    return f"the latents after step {step} of {steps} are in {place}"


@contextmanager
def _latents_claimed(wanted: Path, record: dict[str, Any]) -> Iterator[Path]:
    """`place_of_latents` that no other process means to write to, with another video of that name."""
    from opensoraplan.generate import saved

    for place in map(saved.place_of, numbered(wanted)):
        if not place.exists() or saved.is_of(place, record):
            own = claim(place)
            if own is not None:
                with own:
                    yield place
                return


def set_latents_aside(wanted: Path, record: dict[str, Any]) -> None:
    """If a run has left latents of this video, give them another name, for one that begins anew."""
    from opensoraplan.generate import saved

    place = place_of_latents(wanted, record)
    if place.exists():
        for other in map(saved.place_of, numbered(wanted)):
            own = None if other.exists() else claim(other)
            if own is not None:
                with own:
                    place.rename(other)
                break
        logger.warning("%s has latents of this video, which begins anew: they are in %s now", place, other)


def find_latents(
    session: "Session", request: Request, wanted: Path, record: dict[str, Any]
) -> "SavedLatents | None":
    """Latents that a run that was stopped has left of this video, if the session can go on from them."""
    from opensoraplan.generate import saved

    place = place_of_latents(wanted, record)
    if not place.exists():
        _tell_other_latents(wanted, record)
        return None
    found = saved.read(place)
    return found if found.step == request.steps or session.can_continue(request) else None


def _tell_other_latents(wanted: Path, record: dict[str, Any]) -> None:
    """Name the latents of this video that other weights made, which nobody goes on from."""
    from opensoraplan.generate import saved

    for place in itertools.takewhile(Path.exists, map(saved.place_of, numbered(wanted))):
        try:
            found, _ = saved.read_record(place)
        except ValueError as error:
            logger.warning("%s: its latents are not used", error)
            continue
        if other := saved.other_weights(found, record):
            logger.warning(
                "%s was saved with another model (%s): starting from the first step", place, ", ".join(other)
            )


def save_latents(
    place: Path,
    latents: "Tensor",
    step: int,
    *,
    record: dict[str, Any],
    session: "Session",
    request: Request,
    velocity: "Tensor | None" = None,
) -> None:
    """Keep the latents [1, C, T, H, W] after so many steps; a disk that is full is no reason to stop."""
    from safetensors import SafetensorError

    from opensoraplan.generate import saved

    vae = session.pipeline.vae
    scaling = {key: None if (one := vae.config.get(key)) is None else [*one] for key in ("shift", "scale")}
    try:
        prompt, negative = session.embeds.of(request)
        kept = saved.SavedLatents(latents, step, record, scaling, prompt, negative, velocity, vae.strides)
        saved.write(place, kept)
    except (OSError, SafetensorError) as error:
        logger.warning("the latents of step %d cannot be saved in %s: %s", step, place, error)


def write_frames(
    pipeline: "OpenSoraPlanPipeline", latents: "Tensor", wanted: Path, record: dict[str, Any], *, fps: float
) -> Path:
    """Decode latents [1, C, T, H, W] into an mp4, or a png of one frame, with `record` in its metadata and
    beside it as json. Returns the path of the video, which is `wanted` or has a number more.
    """
    from PIL import Image, PngImagePlugin
    from tqdm import tqdm

    from opensoraplan.data.video import VideoWriter

    comment = json.dumps(record, ensure_ascii=False)
    chunks = pipeline.iter_pictures(latents)
    free = next(path for path in numbered(wanted) if not is_taken(path))
    if wanted.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("comment", comment)
        (frames,) = chunks
        picture = Image.fromarray(frames[0].numpy())
        path = write_new(free, lambda file: picture.save(file, pnginfo=info))
    else:
        total = shapes.pixel_frames(latents.shape[2], strides=pipeline.vae.strides)
        with (
            tqdm(total=total, desc="decoding", unit="frame") as progress,
            VideoWriter(free, fps=fps, title=record["prompt"], comment=comment) as writer,
        ):

            def write(chunk: "Tensor") -> int:
                writer.write(chunk)
                return len(chunk)

            for frames in one_ahead(write, chunks):  # the next chunk is decoded meanwhile
                progress.update(frames)
        path = writer.path
    write_record(path, record)
    return path


def write_record(video: Path, record: dict[str, Any]) -> None:
    """The json beside a video, for people and tools that do not read its metadata. A disk without room for it
    is no reason to stop: the video is whole.
    """
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    try:
        write_new(video.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        logger.warning("%s is written, but not its .json, whose text is in its metadata: %s", video, error)


def is_taken(video: Path) -> bool:
    """Whether there is a video of this name, or a json, be it another video's or none's."""
    return video.exists() or video.with_suffix(".json").exists()


def find_done(wanted: Path, record: dict[str, Any]) -> Path | None:
    """The video among `wanted` and its numbered siblings that was made from this very record and these
    weights, if there is one.
    """
    from opensoraplan.generate import saved

    for path in itertools.takewhile(is_taken, numbered(wanted)):
        stored = stored_record(path)
        if stored is None:
            continue
        if other := saved.other_weights(stored, record):
            logger.info("%s was made by another model (%s): making a new video", path, ", ".join(other))
        elif saved.is_same_video(stored, record):
            if not path.with_suffix(".json").exists():
                write_record(path, stored)
            return path
    return None


def stored_record(path: Path) -> dict[str, Any] | None:
    """The record in the metadata of a video or picture; None if there is none."""
    import av
    from av.error import FFmpegError
    from PIL import Image

    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as picture:
                comment = picture.info.get("comment")
        else:
            with av.open(str(path)) as container:
                comment = container.metadata.get("comment")
        record = parse_json(comment, where=str(path)) if comment else None
    except (OSError, ValueError, FFmpegError):
        return None
    return record if isinstance(record, dict) else None
