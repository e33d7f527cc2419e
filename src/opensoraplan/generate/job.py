"""The job behind `osp generate`: requests in, one mp4 (or png) and one json for each video out; resumable.

requests.py reads what to make, session.py has the model, and data/video.py reads and writes video.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensoraplan import shapes
from opensoraplan.ahead import map_ahead
from opensoraplan.claims import claim, holder, share_out
from opensoraplan.defaults import GenerateDefaults
from opensoraplan.disk import numbered_paths, work_folder, write_new
from opensoraplan.documents import parse_json
from opensoraplan.requests import Request

if TYPE_CHECKING:
    from torch import Tensor

    from opensoraplan.generate.saved import SavedLatents
    from opensoraplan.generate.session import Session
    from opensoraplan.generate.windows import Snapshot
    from opensoraplan.pipeline import OpenSoraPlanPipeline

logger = logging.getLogger(__name__)

OTHER_FORMATS = (".avi", ".gif", ".jpeg", ".jpg", ".m4v", ".mkv", ".mov", ".webm", ".webp")
# Most bytes of a file name that come from the prompt: most file systems allow 255 for the whole name.
STEM_BYTES = 120


@dataclass(frozen=True)
class Progress:
    """What is done while a video is made: resumable latents are saved every `save_every` steps (0: never).
    `on_step` is called after each step with the number of steps done, `on_frames` after each chunk of decoded
    frames with the number of frames so far. A KeyboardInterrupt that one of them raises stops the video as
    Ctrl-C does: the newest latents are saved.
    """

    save_every: int = 0
    on_step: Callable[[int], None] | None = None
    on_frames: Callable[[int], None] | None = None


class Targets:
    """Where videos go: one file, or a folder with one file per request. Raises ValueError if `out` cannot
    be written to.
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
        """The preferred path of the index-th video: a png for one frame, else an mp4."""
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
    """Raise ValueError if a folder, or a file called `name` in it, cannot be written. The folder need not
    exist, and is not made.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if there == folder and not there.is_dir():
            raise ValueError(f"cannot write to {folder}: it is a file, not a folder")
        with work_folder(there) as place:
            # The longest name that a video's files can have.
            (place / f"{Path(name).stem}_999.latents.safetensors").touch()
    except OSError as error:
        raise ValueError(f"cannot write to {folder / name}: {error.strerror}") from error


def stem_of(prompt: str) -> str:
    """File name without suffix for a prompt: its words, cut to STEM_BYTES."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).encode()[:STEM_BYTES].decode(errors="ignore")
    return words.strip("-") or "video"


def check_targets(requests: list[Request], out: Path) -> list[Path]:
    """The preferred path of each request's video. Raises ValueError if `out` cannot hold them."""
    targets = Targets(out, count=len(requests))
    return [targets.path(index, request) for index, request in enumerate(requests)]


def warn_of_tasks(folder: Path, requests: list[Request]) -> None:
    """Warn if the model, alone, was not trained to begin or end with the frames that it is given."""
    known = GenerateDefaults.of(folder).tasks or ()
    for request in requests:
        new = request.tasks() - {*known}
        if new and not request.lora:
            logger.warning(
                "this model was not trained for %s: videos may not go on from what they are given",
                " and ".join(sorted(new)),
            )
            return


def run(
    session: "Session",
    requests: list[Request],
    paths: list[Path],
    *,
    resume: bool,
    progress: Progress = Progress(),
) -> list[Path]:
    """Make the videos one after the other and return their files.

    No file is overwritten: if a name is taken, a number is added. With `resume`, finished videos are skipped,
    videos with saved latents (see `make_video`) continue from them, and a video that another process is
    making is left to that process: several processes can share the requests, and each waits until all videos
    are made. Without `resume`, a video that another process is making raises ValueError. The session's
    fingerprints (or, without them, its `model`) tell whether files were made by the same weights. All ranks
    call this; the first one writes.

    Raises NonFiniteLatentsError if latents become NaN, after saving the last finite ones next to the video,
    and MemoryError for a size that does not fit.
    """
    ranks = session.ranks
    written: dict[int, Path] = {}
    total = len(requests)

    def make_one(numbered_request: tuple[int, tuple[Request, Path]]) -> bool:
        number, (request, wanted) = numbered_request
        record = session.record(request)
        with ExitStack() as stack:
            if not ranks.agree(partial(_claim_video, stack, wanted, record, must_be_free=not resume)):
                return False
            done = ranks.agree(partial(find_done, wanted, record)) if resume else None
            if done is not None:
                logger.info("%d of %d is done: %s", number, total, done)
                written[number] = done
                return True
            logger.info("%d of %d: %r, seed %d", number, total, request.prompt, request.seed)
            if request.step_cache:
                logger.info("with a step cache, latents are saved only after the last step")
            make = partial(_make_on_all_ranks, session, request, wanted, record, progress=progress)
            path = session.attempt(request, lambda again: make(resume=resume or again))
            if path is not None:
                logger.info("wrote %s", path)
                written[number] = path
        return True

    try:
        share_out(enumerate(zip(requests, paths, strict=True), start=1), make_one, what="videos")
    except KeyboardInterrupt:
        option = "" if resume else " and --resume"
        said = "stopped after %d of %d videos: continue with the same command%s"
        logger.info(said, len(written), total, option)
        raise
    return [path for _, path in sorted(written.items())]


def _claim_video(stack: ExitStack, wanted: Path, record: dict[str, Any], *, must_be_free: bool) -> bool:
    """Claim a video until the stack is closed. If another process is making it, return False or, with
    `must_be_free`, raise ValueError.
    """
    from opensoraplan.generate import saved

    video = saved.identity(record)
    digest = hashlib.sha256(json.dumps(video, sort_keys=True).encode()).hexdigest()
    work = wanted.with_name(f"{wanted.name} {digest}")
    own = claim(work)
    if own is not None:
        stack.enter_context(own)
    elif must_be_free:
        raise ValueError(
            f"another process ({holder(work)}) is making the same video: wait for it, stop it, or use "
            "another --seed"
        )
    return own is not None


def _make_on_all_ranks(
    session: "Session",
    request: Request,
    wanted: Path,
    record: dict[str, Any],
    *,
    progress: Progress,
    resume: bool,
) -> Path | None:
    """Make one video, with `resume` from its saved latents if there are any. The first rank writes it and
    returns its path; the others do their share of the work and return None.
    """
    ranks = session.ranks
    start = ranks.agree(partial(find_latents, session, request, wanted, record)) if resume else None
    if start is not None:
        logger.info("resuming after step %d of %d", start.step, request.total_steps)
        session.embeds.put(request, start)
    if ranks.first:
        if start is None:
            move_unused_latents(wanted, record)
        with _claim_latents_file(wanted, record) as place:
            return make_video(session, request, wanted, record, place=place, start=start, progress=progress)
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
    progress: Progress = Progress(),
) -> Path:
    """Make one video and its json, and return the video's path. Frames are encoded as they are decoded.

    Until the video is written, the last finite latents are saved in `place`, a file next to it: as `progress`
    says, when the command is stopped (neither if `save_every` is 0), before decoding, and when latents become
    NaN. With a step cache they are saved only after the last step, since its state is not saved.
    """
    from opensoraplan.generate.windows import Snapshot
    from opensoraplan.pipeline import NonFiniteLatentsError

    save = partial(save_latents, place, record=record, session=session, request=request)

    # Other schedulers may have more calls than steps, and cannot resume between two steps.
    resumable = bool(progress.save_every) and session.can_resume(request)
    newest: Snapshot | None = None
    is_saved = True

    def after_step(now: Snapshot) -> None:
        nonlocal newest, is_saved
        newest = now
        if resumable and now.step < request.total_steps:
            is_saved = now.step % progress.save_every == 0
            if is_saved:
                save(now)
        if progress.on_step is not None:
            progress.on_step(now.step)

    try:
        latents = session.denoise(request, start=start, after_step=after_step)
    except NonFiniteLatentsError as error:
        if newest is not None:
            save(newest._replace(step=min(newest.step, request.total_steps - 1)))
        elif start is None:
            save(Snapshot(error.last_good, step=0))
        logger.error(_describe_saved(place, record))
        raise
    except KeyboardInterrupt:
        if newest is not None and not is_saved:
            save(newest)
        logger.info(_describe_saved(place, record))
        raise
    if start is None or start.step < request.total_steps:
        save(Snapshot(latents, request.total_steps))
    try:
        path = write_frames(
            session.pipeline, latents, wanted, record, fps=request.fps, on_frames=progress.on_frames
        )
    except BaseException:
        logger.error(_describe_saved(place, record))
        raise
    place.unlink(missing_ok=True)
    return path


def latents_path(wanted: Path, record: dict[str, Any]) -> Path:
    """The file for the latents of this video: the first that is free or has latents of the same record."""
    from opensoraplan.generate import saved

    places = map(saved.latents_path, numbered_paths(wanted))
    return next(place for place in places if not place.exists() or saved.is_latents_of(place, record))


def _describe_saved(place: Path, record: dict[str, Any]) -> str:
    """Which latents of an unfinished video are on the disk: the newest may not have been saved."""
    from opensoraplan.generate import saved

    step, steps = saved.saved_step(place, record), saved.total_steps(record)
    if step is None:
        return "nothing of this video is saved: it will start from the first step"
    if step == steps:
        return f"the latents after the last step are saved in {place}: decode them with osp decode"
    return f"the latents after step {step} of {steps} are saved in {place}"


@contextmanager
def _claim_latents_file(wanted: Path, record: dict[str, Any]) -> Iterator[Path]:
    """`latents_path`, claimed: another process may be making another video with the same name."""
    from opensoraplan.generate import saved

    for place in map(saved.latents_path, numbered_paths(wanted)):
        if not place.exists() or saved.is_latents_of(place, record):
            own = claim(place)
            if own is not None:
                with own:
                    yield place
                return


def move_unused_latents(wanted: Path, record: dict[str, Any]) -> None:
    """Rename saved latents of this video, which starts from the first step."""
    from opensoraplan.generate import saved

    place = latents_path(wanted, record)
    if place.exists():
        for other in map(saved.latents_path, numbered_paths(wanted)):
            own = None if other.exists() else claim(other)
            if own is not None:
                with own:
                    place.rename(other)
                break
        logger.warning("the saved latents %s are not used without --resume: moved to %s", place, other)


def find_latents(
    session: "Session", request: Request, wanted: Path, record: dict[str, Any]
) -> "SavedLatents | None":
    """The saved latents of this video, if there are any and the session can resume from them."""
    from opensoraplan.generate import saved

    place = latents_path(wanted, record)
    if not place.exists():
        _warn_of_unusable_latents(wanted, record)
        return None
    found = saved.read(place)
    return found if found.step == request.total_steps or session.can_resume(request) else None


def _warn_of_unusable_latents(wanted: Path, record: dict[str, Any]) -> None:
    """Warn of saved latents of this video that are damaged, or that other weights made."""
    from opensoraplan.generate import saved

    for place in itertools.takewhile(Path.exists, map(saved.latents_path, numbered_paths(wanted))):
        try:
            found, _ = saved.read_record(place)
        except ValueError as error:
            logger.warning("%s: these latents are not used", error)
            continue
        if other := saved.differing_parts(found, record):
            logger.warning(
                "%s was saved with another model (%s): starting from the first step", place, ", ".join(other)
            )


def save_latents(
    place: Path, now: "Snapshot", *, record: dict[str, Any], session: "Session", request: Request
) -> None:
    """Save a video as far as it is denoised. If it cannot be written, only log a warning."""
    from safetensors import SafetensorError

    from opensoraplan.generate import saved

    vae = session.pipeline.vae
    scaling = {key: None if (one := vae.config.get(key)) is None else [*one] for key in ("shift", "scale")}
    try:
        prompt, negative = session.embeds.of(request)
        others = {"scaling": scaling, "prompt": prompt, "negative": negative, "strides": vae.strides}
        saved.write(place, now.saved(request, record, **others))
    except (OSError, SafetensorError) as error:
        logger.warning("cannot save the latents after step %d in %s: %s", now.step, place, error)


def write_frames(
    pipeline: "OpenSoraPlanPipeline",
    latents: "Tensor",
    wanted: Path,
    record: dict[str, Any],
    *,
    fps: float,
    on_frames: Callable[[int], None] | None = None,
) -> Path:
    """Decode latents [1, C, T, H, W] into an mp4, or a png of one frame. Writes `record` into its metadata
    and into a json next to it. Returns the video's path: `wanted`, with a number added if it is taken. Calls
    `on_frames` as `Progress` says, or else shows a progress bar.
    """
    from PIL import Image, PngImagePlugin
    from tqdm import tqdm

    from opensoraplan.data.video import VideoWriter

    comment = json.dumps(record, ensure_ascii=False)
    chunks = pipeline.iter_pictures(latents)
    free = next(path for path in numbered_paths(wanted) if not is_taken(path))
    if wanted.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("comment", comment)
        (frames,) = chunks
        picture = Image.fromarray(frames[0].numpy())
        path = write_new(free, lambda file: picture.save(file, pnginfo=info))
    else:
        total = shapes.pixel_frames(latents.shape[2], strides=pipeline.vae.strides)
        with (
            tqdm(total=total, desc="decoding", unit="frame", disable=on_frames is not None) as bar,
            VideoWriter(free, fps=fps, title=record["prompt"], comment=comment) as writer,
        ):

            def write(chunk: "Tensor") -> int:
                writer.write(chunk)
                return len(chunk)

            done = 0
            for frames in map_ahead(write, chunks):  # while the next chunk is decoded
                done += frames
                bar.update(frames)
                if on_frames is not None:
                    on_frames(done)
        path = writer.path
    write_record(path, record)
    return path


def write_record(video: Path, record: dict[str, Any]) -> None:
    """Write the json next to a video, for people and tools that do not read its metadata. If it cannot be
    written, only log a warning: the video is complete.
    """
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    try:
        write_new(video.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        said = "%s is written, but its .json is not (the metadata has the same text): %s"
        logger.warning(said, video, error)


def is_taken(video: Path) -> bool:
    """Whether a video, or a json, of this name exists."""
    return video.exists() or video.with_suffix(".json").exists()


def find_done(wanted: Path, record: dict[str, Any]) -> Path | None:
    """The finished video with the same record and weights among `wanted` and its numbered names, if any."""
    from opensoraplan.generate import saved

    for path in itertools.takewhile(is_taken, numbered_paths(wanted)):
        stored = read_stored_record(path)
        if stored is None:
            continue
        if other := saved.differing_parts(stored, record):
            logger.info("%s was made by another model (%s): making a new video", path, ", ".join(other))
        elif saved.is_same_video(stored, record):
            if not path.with_suffix(".json").exists():
                write_record(path, stored)
            return path
    return None


def read_stored_record(path: Path) -> dict[str, Any] | None:
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
