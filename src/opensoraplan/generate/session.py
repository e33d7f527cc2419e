"""A session: checks, plans, loads and tunes a model once, then makes any number of videos with it.

planning.py has what is computed before weights are read; job.py writes the videos' files.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from opensoraplan.defaults import SCHEDULER, check_model_files
from opensoraplan.device import dtype_name, explain_full_memory
from opensoraplan.fingerprint import fingerprint_parts, fingerprint_weights, hash_text
from opensoraplan.formats import assemble
from opensoraplan.formats.lora import read_origin
from opensoraplan.generate.planning import (
    LoadingPlan,
    Place,
    SessionOptions,
    plan_loading,
    resolve_place,
    set_decoding,
    tune,
)
from opensoraplan.generate.saved import FRAME_FILES, GIVEN_FRAMES, LORA_WEIGHTS, SavedLatents
from opensoraplan.generate.windows import Snapshot, Window, next_window, seed_of
from opensoraplan.given_frames import GivenFrames, read_given
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import name_wrong_types
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.parallel.generating import share_generating
from opensoraplan.parallel.ranks import ALONE, Ranks, joined
from opensoraplan.pipeline import NonFiniteLatentsError, OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.runtime.compiling import compile_blocks
from opensoraplan.runtime.loras import load_loras, settings_of, use_loras
from opensoraplan.runtime.placement import Arrangement
from opensoraplan.runtime.quantisation import weight_precision_of
from opensoraplan.runtime.step_cache import Calibration, skip_steps
from opensoraplan.shapes import RELEASE, Strides

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

# Timeout of collectives: one process may decode a long video alone.
PATIENCE_S = 7200.0


@dataclass(frozen=True)
class Result:
    """The result of a request: normalised latents [1, C, T, H, W] after `step` steps, and the `record` of
    everything that determines its video. `frames`: uint8 [frames, height, width, 3] on the CPU; None if the
    request was stopped, if only latents were asked for, and in all processes but the first.
    """

    latents: Tensor
    step: int
    record: dict[str, Any]
    frames: Tensor | None = None


class PromptCache:
    """Keeps the embeddings of the last prompt and the last negative prompt, which requests often share."""

    def __init__(self, pipeline: OpenSoraPlanPipeline) -> None:
        self.pipeline = pipeline
        self.kept: dict[tuple[str, bool], PromptEmbeds] = {}

    def of(self, request: Request) -> tuple[PromptEmbeds, PromptEmbeds | None]:
        """Embeddings of a request's prompt and, with guidance, of its negative prompt."""
        negative = self.get(request.negative_prompt, negative=True) if request.guidance > 1 else None
        return self.get(request.prompt), negative

    def put(self, request: Request, start: SavedLatents) -> None:
        """Store the embeddings that were saved with a request's latents."""
        for key, embeds in (
            ((request.prompt, False), start.prompt),
            ((request.negative_prompt, True), start.negative),
        ):
            if embeds is not None:
                self.kept[key] = embeds

    def get(self, text: str, *, negative: bool = False) -> PromptEmbeds:
        """Embeddings of a prompt, or of a negative prompt."""
        if (text, negative) not in self.kept:
            self.kept = {key: value for key, value in self.kept.items() if key[1] != negative}
            settings = self.pipeline.prompt_settings
            whole = settings.negative(text) if negative else settings.positive(text)
            self.kept[text, negative] = self.pipeline.encode_texts([whole])
        return self.kept[text, negative]


class GivenCache:
    """Keeps the frames that the last request was given, which several calls read."""

    def __init__(self, strides: Strides) -> None:
        self._strides = strides
        self._kept: tuple[object, GivenFrames] = (None, GivenFrames())

    def of(self, request: Request) -> GivenFrames:
        """Read and fit them. Raises FileNotFoundError and ValueError for files that do not give them."""
        fields = request.model_dump(include={*FRAME_FILES, "overlap", "fps", "height", "width"})
        stats = [path.stat() for path in request.frame_files()]  # a file may be replaced by another
        key = fields, [(one.st_ino, one.st_size, one.st_mtime_ns) for one in stats]
        if self._kept[0] != key:
            self._kept = key, read_given(request, strides=self._strides)
        return self._kept[1]


@dataclass
class Session:
    """A pipeline that is ready for requests. `open` loads one from a model's files; the constructor takes a
    `pipeline` that exists already.

    `model` (a folder, or the files of its parts) and the `fingerprints` of its weights go into the records.
    `step_ratios`: the model's calibration for the step cache. All `ranks` make the same calls; the first one
    writes files and gets frames. `all_decode`: all ranks decode, not only the first. `batched`: ranks split
    the branches of guidance, so every request uses batched guidance. `arrangement`: where the weights are
    kept, with plans that need less memory in case it runs out. `largest`: the largest requests allowed; if
    empty, any size is. `loras`: the files of the LoRAs in the denoiser, with their fingerprints.
    `tells_folders`: records have the folders of the frames' files, not only their names.

    A request that fails or is stopped does not change the session.
    """

    pipeline: OpenSoraPlanPipeline
    model: str | dict[str, Any]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    step_ratios: Sequence[float] = ()
    ranks: Ranks = ALONE
    arrangement: Arrangement | None = None
    all_decode: bool = False
    batched: bool = False
    largest: Sequence[Request] = ()
    loras: Mapping[Path, str] = field(default_factory=dict)
    tells_folders: bool = True

    def __post_init__(self) -> None:
        self.embeds = PromptCache(self.pipeline)
        self.given = GivenCache(self.pipeline.vae.strides if self.pipeline.vae else RELEASE)
        self._opened = ExitStack()

    @classmethod
    def open(cls, options: SessionOptions, largest: Request | Sequence[Request]) -> Self:
        """Check, plan, load and tune a model for requests up to the size of `largest`. Under torchrun, all
        processes open the same session and work together.

        Close the session, or use it in a `with` statement. Raises FileNotFoundError and ValueError before
        weights are read, and MemoryError if the model or a video does not fit.
        """
        requests = [largest] if isinstance(largest, Request) else list(largest)
        for request in requests:
            read_given(request)  # before heavy work
        options = _add_fingerprints(options, requests)
        place = resolve_place(options, requests)
        with ExitStack() as stack:
            ranks = stack.enter_context(joined(place.mesh, place.device, timeout=PATIENCE_S))
            session = cls._load(options, requests, place, ranks)
            session._opened = stack.pop_all()
        return session

    @classmethod
    def _load(cls, options: SessionOptions, requests: Sequence[Request], place: Place, ranks: Ranks) -> Self:
        """Plan from the sizes of the model, then load it."""
        device = place.device
        opened = assemble.open_pipeline(options.sources)
        empty = opened.without_weights(place.dtype, vae_dtype=place.vae_dtype)
        loras = _try_loras(empty.transformer, options, requests)
        loading = plan_loading(empty, options, requests, place)
        pipeline = _load_pipeline(opened, options, place, loading, loras)
        pipeline.vae.streaming_latent_frames = empty.vae.streaming_latent_frames
        arrangement = Arrangement(pipeline, loading.plans, device) if loading.plans else None
        all_decode = False
        if ranks.mesh is not None:
            rows = {request.height // pipeline.vae.strides.spatial for request in requests}
            all_decode = share_generating(pipeline.transformer, pipeline.vae, ranks.mesh, rows=rows)
        if options.compile:  # last, since it compiles the blocks as they are now
            compile_blocks(pipeline.transformer)
        shown = options.progress and ranks.first
        pipeline.set_progress_bar_config(desc="denoising", unit="step", disable=not shown)
        return cls(
            pipeline,
            _model_paths(options),
            fingerprints=options.fingerprints or {},
            step_ratios=options.step_ratios or (),
            ranks=ranks,
            arrangement=arrangement,
            all_decode=all_decode,
            batched=options.branch_ranks > 1,
            largest=requests,
            loras=loras,
        )

    def close(self) -> None:
        """Leave the process group, if there is one. The pipeline stays usable."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._opened.__exit__(kind, error, trace)

    def run(
        self,
        request: Request,
        *,
        output: Literal["frames", "latents"] = "frames",
        on_step: Callable[[int, Tensor], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        """Make the video of a request, in memory; job.py writes files.

        `on_step` is called after each step with the number of steps done and the latents. `should_stop` is
        called after each step and, with one process, after each chunk of decoded frames: if it returns True,
        the request ends, and the result has the latents so far. Either all processes pass it or none does.

        Raises ValueError for a request that this session cannot make, NonFiniteLatentsError if latents become
        NaN, FloatingPointError if frames do, and MemoryError for a size that does not fit.
        """
        self.check(request)
        record = self.record(request)
        kept: SavedLatents | None = None
        done, stopped = 0, False

        def asked_to_stop() -> bool:
            nonlocal stopped
            stopped = stopped or (should_stop is not None and self.ranks.any(should_stop()))
            return stopped

        def after_step(now: Snapshot) -> None:
            nonlocal kept, done
            done = now.step
            if self.can_resume(request):
                kept = now.saved(request, record, scaling={})
            if on_step is not None:
                on_step(now.step, now.latents)
            if asked_to_stop():
                self.pipeline._interrupt = True

        def make(_again: bool) -> tuple[Tensor, Tensor | None]:
            latents = self.denoise(request, start=kept, after_step=after_step)
            if output == "latents" or stopped:
                return latents, None
            return latents, self._frames(latents, asked_to_stop)

        latents, frames = self.attempt(request, make)
        return Result(latents, done if stopped else request.total_steps, record, frames)

    def check(self, request: Request) -> None:
        """Warn of words that cleaning removes from the prompts. Raises ValueError if cleaning leaves almost
        nothing, and for a request that this session cannot make.
        """
        negatives = [request.negative_prompt] if request.guidance > 1 else []
        for warning in self.pipeline.prompt_settings.check_all([request.prompt], negatives):
            logger.warning(warning)
        if request.step_cache and not self.step_ratios:
            raise ValueError(
                f"step_cache {request.step_cache:g} needs a model calibrated with `osp calibrate`, and a "
                "session opened for a request with a step cache"
            )
        for file in request.lora_strengths():
            if file not in self.loras:
                raise ValueError(f"this session was not opened for a request with the LoRA {file}")
        strides = self.pipeline.vae.strides
        area, volume = request.positions(strides)
        if not self.largest:
            return
        sizes = {one.positions(strides): one for one in self.largest}
        if not any(area <= size[0] and volume <= size[1] for size in sizes):
            most = sizes[max(sizes)]
            raise ValueError(
                f"{request.describe_size()} are more than this session was opened for, "
                f"{most.describe_size()}: open it for the largest request"
            )
        rows, count = request.height // strides.spatial, self.ranks.count
        if self.all_decode and rows % count:
            raise ValueError(
                f"{rows} rows of latents (height {request.height}) cannot be split equally over the {count} "
                "processes of this session: open it for a request of this height, too"
            )

    def can_resume(self, request: Request) -> bool:
        """Whether a video can resume between two steps: not with a scheduler other than the default one, nor
        with a step cache, whose state is not saved.
        """
        return self.pipeline.has_default_scheduler and not request.step_cache

    def attempt(self, request: Request, work: Callable[[bool], Made]) -> Made:
        """Return `work(False)`. If memory runs out, return `work(True)` with the next plan that needs less.
        Raises MemoryError if there is no such plan.
        """
        what = f"{request.describe_size()} do not fit into memory: ask for fewer or smaller ones"
        with explain_full_memory(what):
            return work(False) if self.arrangement is None else self.arrangement.run(work)

    def denoise(
        self,
        request: Request,
        *,
        start: SavedLatents | None = None,
        after_step: Callable[[Snapshot], None] | None = None,
    ) -> Tensor:
        """Denoise a request, from noise or from saved latents. Returns normalised latents [1, C, T, H, W], of
        all windows of an extended video. `after_step` gets the video so far after each step.
        """
        if start is not None and start.step == request.total_steps:
            return start.latents
        pipeline = self.pipeline
        pipeline.is_decoding = pipeline._interrupt = False  # which an interrupted video may have left True
        use_loras(pipeline.transformer, list(self.loras), request.lora_strengths())
        so_far = None if start is None else Snapshot.of(start)
        while so_far is None or (so_far.step < request.total_steps and not pipeline.interrupt):
            window = next_window(pipeline, request, lambda: self.given.of(request), so_far)
            if request.windows > 1:
                total = request.frames + request.extend
                end = request.frames_after((window.number + 1) * request.steps)
                logger.info("generating the frames up to %d of %d", end, total)
            so_far = self._denoise_window(request, window, after_step)
        return so_far.latents

    def _denoise_window(
        self, request: Request, window: Window, after_step: Callable[[Snapshot], None] | None
    ) -> Snapshot:
        pipeline = self.pipeline
        newest: Snapshot | None = None

        def on_step_end(_pipeline: object, index: int, _timestep: object, tensors: dict[str, Tensor]) -> None:
            nonlocal newest
            newest = window.snapshot(tensors["latents"], index + 1, tensors["velocity"], steps=request.steps)
            if after_step is not None:
                after_step(newest)

        prompt, negative = self.embeds.of(request)
        cached = nullcontext()
        if request.step_cache:
            cached = skip_steps(
                pipeline.transformer, self.step_ratios, threshold=request.step_cache, steps=request.steps
            )
        with cached:
            try:
                pipeline(
                    prompt_embeds=prompt,
                    negative_prompt_embeds=negative,
                    num_frames=window.frames,
                    height=request.height,
                    width=request.width,
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance,
                    guidance_rescale=request.guidance_rescale,
                    guidance_interval=request.guidance_interval,
                    batched_guidance=request.batched_guidance or self.batched,
                    shift=request.shift,
                    use_dynamic_shifting=request.dynamic_shift,
                    use_linear_quadratic_schedule=request.linear_quadratic,
                    solver=request.solver,
                    seed=seed_of(request, window.number),
                    latents=window.latents,
                    first_step=window.step,
                    previous_velocity=window.velocity,
                    given_latents=window.given,
                    output_type="latent",
                    callback_on_step_end=on_step_end,
                    callback_on_step_end_tensor_inputs=("latents", "velocity"),
                )
            except NonFiniteLatentsError as error:
                if request.windows == 1:
                    raise
                raise NonFiniteLatentsError(
                    window.number * request.steps + min(error.step, request.steps),
                    steps=request.total_steps,
                    last_good=window.video(error.last_good),
                ) from None
        assert newest is not None
        return newest

    def record(self, request: Request) -> dict[str, Any]:
        """Everything that determines a video, to be stored with it as JSON."""
        pipeline = self.pipeline
        scheduler, prompts = pipeline.scheduler.config, pipeline.prompt_settings
        guided = request.guidance > 1
        shifts = ("shift", "flow_shift", "use_dynamic_shifting")
        record = {
            "model": self.model,
            **request.model_dump(mode="json"),
            "prompt_settings": vars(prompts),
            "encoded_prompt": prompts.positive(request.prompt),
            "encoded_negative_prompt": prompts.negative(request.negative_prompt) if guided else None,
            "max_text_tokens": pipeline.config["max_text_tokens"],
            "scheduler": {
                "name": type(pipeline.scheduler).__name__,
                **{key: scheduler[key] for key in shifts if key in scheduler},
            },
            "sparse_n": pipeline.transformer.config["sparse_n"],
            "dtype": dtype_name(pipeline.transformer.dtype),
            "weights": weight_precision_of(pipeline.transformer),
            "vae_dtype": dtype_name(pipeline.vae.dtype),
            "vae_tiling": pipeline.vae.tiling,
            "opensoraplan": version("opensoraplan"),
        }
        if not self.tells_folders:
            record |= {name: Path(record[name]).name for name in FRAME_FILES if record[name] is not None}
        if self.fingerprints:
            record["fingerprint"] = {**self.fingerprints, "configs": _hash_configs(pipeline)}
            if request.step_cache:
                record["fingerprint"]["step_cache"] = hash_text(json.dumps(list(self.step_ratios)))
        if strengths := request.lora_strengths():
            record[LORA_WEIGHTS] = [[self.loras[file], strength] for file, strength in strengths.items()]
        else:  # as in records older than LoRAs
            del record["lora"]
        if given := self.given.of(request):
            record[GIVEN_FRAMES] = given.digest()
        # As in records older than these fields, where they have no effect.
        unused = {name for name in FRAME_FILES if getattr(request, name) is None}
        unused |= {"extend"} if not request.extend else set()
        unused |= {"overlap"} if not request.extend and request.video is None else set()
        for name in unused:
            del record[name]
        return json.loads(json.dumps(record))

    def share_decoding(self, latents: Tensor) -> None:
        """In all processes but the first: decode along with it, if all ranks decode."""
        for _ in self.pipeline.iter_decode(latents) if self.all_decode else ():
            pass

    def _frames(self, latents: Tensor, asked_to_stop: Callable[[], bool]) -> Tensor | None:
        """uint8 frames [frames, height, width, 3]; None if stopped, and in all processes but the first."""
        if not self.ranks.first:
            self.share_decoding(latents)
            return None
        chunks = []
        for chunk in self.pipeline.iter_pictures(latents):
            chunks.append(chunk)
            if self.ranks.mesh is None and asked_to_stop():
                return None
        return torch.cat(chunks)


def _add_fingerprints(options: SessionOptions, requests: Sequence[Request]) -> SessionOptions:
    """Add the model's fingerprints to the options and, if a request needs it, its calibration."""
    folder, ratios = options.folder, options.step_ratios
    if options.fingerprints is not None:  # the command has checked the files
        return options
    sources = options.sources
    sources.check_exist()
    if folder is not None:
        check_model_files(folder)
    fingerprints = fingerprint_parts(sources.paths())
    if sources.ema is not None:
        fingerprints["ema"] = str(sources.ema)
    if ratios is None and any(request.step_cache for request in requests):
        if folder is None:
            raise ValueError("a step cache needs a model folder that was calibrated with `osp calibrate`")
        calibration = Calibration.of(folder)
        calibration.warn_of_other_weights(fingerprints["transformer"], folder)
        ratios = calibration.ratios
    return replace(options, fingerprints=fingerprints, step_ratios=ratios)


def _try_loras(empty: SparseUMMDiT, options: SessionOptions, requests: Sequence[Request]) -> dict[Path, str]:
    """Put all LoRAs that the requests use into the denoiser without weights. Returns their files and
    fingerprints. Raises FileNotFoundError and ValueError for those that cannot be used; warns of one that was
    trained on another model.
    """
    files = list({file: None for request in requests for file in request.lora_strengths()})
    if files and options.tp > 1:
        raise ValueError(
            f"tp {options.tp} splits the layers that a LoRA changes: split the video's tokens instead (tp 1)"
        )
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"there is no LoRA {file}")
    load_loras(empty, files)
    found = {}
    for file in files:
        settings = settings_of(empty, file, files)
        if settings["use_dora"] and options.weights != "whole":
            raise ValueError(f"{file} is a DoRA, which needs whole weights, not {options.weights}")
        base = read_origin(file).get("base_fingerprint")
        if base and base != (options.fingerprints or {}).get("transformer", base):
            logger.warning("%s was trained on another model than this one: results may be poor", file)
        found[file] = hash_text(fingerprint_weights(file) + json.dumps(settings, sort_keys=True))
    return found


def _load_pipeline(
    opened: assemble.OpenedPipeline,
    options: SessionOptions,
    place: Place,
    loading: LoadingPlan,
    loras: Iterable[Path],
) -> OpenSoraPlanPipeline:
    """Load and tune the pipeline. Moves it to the device, unless there are plans for where it is kept."""
    device = place.device
    full = f"the model does not fit onto {device}: with one process, --memory auto makes it fit"
    with explain_full_memory(full):
        try:
            pipeline = _read_weights(opened, options, place, device=loading.load_on)
        except MemoryError as error:
            raise MemoryError(f"{error}{loading.advice}") from None
        if options.prompts is not None:
            pipeline.register_to_config(
                prompt_template=options.prompts.template,
                default_negative_prompt=options.prompts.negative_prompt,
                clean_prompts=options.prompts.clean,
                keep_chinese=options.prompts.keep_chinese,
            )
        set_decoding(pipeline.vae, options)
        load_loras(pipeline.transformer, list(loras))
        tune(pipeline, options, device, masked=loading.masked)
        if not loading.plans:
            pipeline.to(device)
    return pipeline


def _read_weights(
    opened: assemble.OpenedPipeline, options: SessionOptions, place: Place, *, device: torch.device
) -> OpenSoraPlanPipeline:
    folder = options.folder
    where = folder or opened.sources.transformer
    logger.info("loading %s, %s on %s", where, dtype_name(place.dtype), device)
    if folder is None:
        return assemble.load_pipeline(
            opened,
            dtype=place.dtype,
            vae_dtype=place.vae_dtype,
            device=device,
            scheduler=options.scheduler,
            max_text_tokens=options.max_text_tokens,
        )
    # diffusers loads scheduler and settings, but not the weights: it tolerates missing ones.
    parts = assemble.load_parts(opened, dtype=place.dtype, vae_dtype=place.vae_dtype, device=device)
    with name_wrong_types(str(folder / SCHEDULER)):  # for schedulers that only diffusers knows
        return OpenSoraPlanPipeline.from_pretrained(folder, **parts, local_files_only=True)


def _model_paths(options: SessionOptions) -> str | dict[str, Any]:
    """The model's folder or the files of its parts, for the records."""
    if options.folder is not None:
        return str(options.folder)
    sources = options.sources
    paths: dict[str, Any] = {name: str(path) for name, path in sources.paths().items()}
    return paths if sources.ema is None else {**paths, "ema": sources.ema}


def _hash_configs(pipeline: OpenSoraPlanPipeline) -> str:
    """Hash the configs of denoiser and VAE, which may differ from those in their files."""
    models = (pipeline.transformer, pipeline.vae)
    configs = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in models]
    return hash_text(json.dumps(configs, sort_keys=True))
