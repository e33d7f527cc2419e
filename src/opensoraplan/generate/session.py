"""A model that is checked, loaded, planned and tuned once, and then asked for any number of videos.

What is worked out before weights are read is in planning.py, files of videos are written in job.py.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from opensoraplan.defaults import SCHEDULER, check_model_files
from opensoraplan.device import dtype_name, explained_memory
from opensoraplan.fingerprint import fingerprint_parts, fingerprint_weights, hash_text
from opensoraplan.formats import assemble
from opensoraplan.formats.lora import read_origin
from opensoraplan.generate.planning import (
    Outlook,
    Place,
    SessionOptions,
    look_ahead,
    resolve_place,
    set_decoding,
    tune,
)
from opensoraplan.generate.saved import SavedLatents
from opensoraplan.models.lora import check_lora
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import wrong_types_told
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.parallel.generating import share_generating
from opensoraplan.parallel.ranks import ALONE, Ranks, joined
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.requests import Request
from opensoraplan.runtime.compiling import compile_blocks
from opensoraplan.runtime.loras import load_loras, use_loras
from opensoraplan.runtime.placement import Arrangement
from opensoraplan.runtime.quantisation import weights_of
from opensoraplan.runtime.step_cache import Calibration, skipping
from opensoraplan.shapes import Strides

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

# How long processes wait for each other: one may decode a long video alone.
PATIENCE_S = 7200.0


@dataclass(frozen=True)
class Result:
    """What a request gave: normalised latents [1, C, T, H, W] after `step` of its steps, and the `record` of
    all that decides how its video looks. `frames`: uint8 [frames, height, width, 3] on the CPU; None if it
    was stopped, if only latents were asked for, and in other processes than the first.
    """

    latents: Tensor
    step: int
    record: dict[str, Any]
    frames: Tensor | None = None


class PromptCache:
    """The last prompt and the last negative prompt of a run, encoded: requests in a row often share one."""

    def __init__(self, pipeline: OpenSoraPlanPipeline) -> None:
        self.pipeline = pipeline
        self.kept: dict[tuple[str, bool], PromptEmbeds] = {}

    def of(self, request: Request) -> tuple[PromptEmbeds, PromptEmbeds | None]:
        """Embeddings of a request's prompt, and of its negative one if it is guided."""
        negative = self.get(request.negative_prompt, negative=True) if request.guidance > 1 else None
        return self.get(request.prompt), negative

    def put(self, request: Request, start: SavedLatents) -> None:
        """Take over what was encoded for a request before."""
        for key, embeds in (
            ((request.prompt, False), start.prompt),
            ((request.negative_prompt, True), start.negative),
        ):
            if embeds is not None:
                self.kept[key] = embeds

    def get(self, text: str, *, negative: bool = False) -> PromptEmbeds:
        """Embeddings of a prompt, or of a negative one."""
        if (text, negative) not in self.kept:
            self.kept = {key: value for key, value in self.kept.items() if key[1] != negative}
            settings = self.pipeline.prompt_settings
            whole = settings.negative(text) if negative else settings.positive(text)
            self.kept[text, negative] = self.pipeline.encode_texts([whole])
        return self.kept[text, negative]


@dataclass
class Session:
    """A pipeline that is ready for requests: `open` makes one from a model's files; one that exists already
    is given as `pipeline`.

    `model`, a folder or the files of its parts, and the `fingerprints` of its weights go into the records.
    `step_ratios`: what the model was calibrated to. Of several `ranks`, which all make the same calls, the
    first writes and gets frames; `all_decode`: the others have a share in decoding; `batched`: they share out
    the branches of guidance, whatever the requests say. `arrangement`: where the weights are kept, with
    leaner plans for when memory is full. `largest`: no request may be larger than these; none: any. `loras`:
    the files of those that are in the denoiser.

    A request that fails, or is stopped, leaves the session as it was.
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
    loras: Sequence[Path] = ()

    def __post_init__(self) -> None:
        self.embeds = PromptCache(self.pipeline)
        self._opened = ExitStack()

    @classmethod
    def open(cls, options: SessionOptions, largest: Request | Sequence[Request]) -> Self:
        """Check, load, plan and tune a model for requests up to `largest`, one or several. Under torchrun,
        join the other processes, which all open the same.

        To be closed, or used in a `with` statement. Raises FileNotFoundError and ValueError before weights
        are read, and MemoryError for what does not fit.
        """
        requests = [largest] if isinstance(largest, Request) else list(largest)
        options = _completed(options, requests)
        place = resolve_place(options, requests)
        with ExitStack() as stack:
            ranks = stack.enter_context(joined(place.mesh, place.device, timeout=PATIENCE_S))
            session = cls._load(options, requests, place, ranks)
            session._opened = stack.pop_all()
        return session

    @classmethod
    def _load(cls, options: SessionOptions, requests: Sequence[Request], place: Place, ranks: Ranks) -> Self:
        """Plan by the sizes of the model, then load it."""
        device = place.device
        opened = assemble.open_pipeline(options.sources)
        empty = opened.without_weights(place.dtype, vae_dtype=place.vae_dtype)
        loras = _check_loras(empty.transformer, options, requests)
        outlook = look_ahead(empty, options, requests, place)
        pipeline = _load_pipeline(opened, options, place, outlook, loras)
        pipeline.vae.streaming_latent_frames = empty.vae.streaming_latent_frames
        arrangement = Arrangement(pipeline, outlook.plans, device) if outlook.plans else None
        all_decode = False
        if ranks.mesh is not None:
            rows = {request.height // pipeline.vae.strides.spatial for request in requests}
            all_decode = share_generating(pipeline.transformer, pipeline.vae, ranks.mesh, rows=rows)
        if options.compile:  # last: it is the blocks as they are now that are compiled
            compile_blocks(pipeline.transformer)
        shown = options.progress and ranks.first
        pipeline.set_progress_bar_config(desc="denoising", unit="step", disable=not shown)
        return cls(
            pipeline,
            _told_model(options),
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
        """Leave the other processes, if there are any. The pipeline stays usable."""
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
        asked after each step and, of one process, after each chunk of decoded frames: True ends the request,
        and the result has the latents so far. Of several processes, all give it or none does.

        Raises ValueError for a request that the session was not opened for, NonFiniteLatentsError if latents
        become NaN, FloatingPointError if frames do, and MemoryError for a size that does not fit.
        """
        self.check(request)
        record = self.record(request)
        kept: SavedLatents | None = None
        done, stopped = 0, False

        def asked_to_stop() -> bool:
            nonlocal stopped
            stopped = stopped or (should_stop is not None and self.ranks.any(should_stop()))
            return stopped

        def after_step(latents: Tensor, step: int, velocity: Tensor) -> None:
            nonlocal kept, done
            done = step
            if self.can_continue(request):
                velocity_needed = velocity if request.solver == "adams" and step < request.steps else None
                kept = SavedLatents(latents, step, record, {}, velocity=velocity_needed)
            if on_step is not None:
                on_step(step, latents)
            if asked_to_stop():
                self.pipeline._interrupt = True

        def make(_again: bool) -> tuple[Tensor, Tensor | None]:
            latents = self.denoise(request, start=kept, after_step=after_step)
            if output == "latents" or stopped:
                return latents, None
            return latents, self._frames(latents, asked_to_stop)

        latents, frames = self.attempt(request, make)
        return Result(latents, done if stopped else request.steps, record, frames)

    def check(self, request: Request) -> None:
        """Warn of words that cleaning removes from its prompts. Raises ValueError for prompts of which next
        to nothing is left, and for a request that the session was not opened for.
        """
        negatives = [request.negative_prompt] if request.guidance > 1 else []
        for warning in self.pipeline.prompt_settings.check_all([request.prompt], negatives):
            logger.warning(warning)
        if request.step_cache and not self.step_ratios:
            raise ValueError(
                f"step_cache {request.step_cache:g} needs a session that was opened for a request with a "
                "step cache, of a model that `osp calibrate` has seen"
            )
        for file in request.lora_strengths():
            if file not in self.loras:
                raise ValueError(f"this session was opened for no request with the LoRA {file}")
        strides = self.pipeline.vae.strides
        area, volume = _size(request, strides)
        if not self.largest:
            return
        sizes = {_size(one, strides): one for one in self.largest}
        if not any(area <= size[0] and volume <= size[1] for size in sizes):
            most = sizes[max(sizes)]
            raise ValueError(
                f"{_named_size(request)} are more than this session was opened for, {_named_size(most)}: "
                "open one for the largest request"
            )
        rows, count = request.height // strides.spatial, self.ranks.count
        if self.all_decode and rows % count:
            raise ValueError(
                f"{rows} rows of latents (height {request.height}) are not {count} equal shares for the "
                "processes of this session: open it for a request of this height, too"
            )

    def can_continue(self, request: Request) -> bool:
        """Whether a video can begin in the middle: with other schedulers than the default one it cannot, nor
        with a step cache, which would have nothing cached.
        """
        return self.pipeline.has_default_scheduler and not request.step_cache

    def attempt(self, request: Request, work: Callable[[bool], Made]) -> Made:
        """What `work(False)` returns. If memory is full and there is a leaner plan, what `work(True)` returns
        under that. Raises MemoryError if none is left.
        """
        what = f"{_named_size(request)} do not fit into memory: ask for fewer or smaller ones"
        with explained_memory(what):
            return work(False) if self.arrangement is None else self.arrangement.run(work)

    def denoise(
        self,
        request: Request,
        *,
        start: SavedLatents | None = None,
        after_step: Callable[[Tensor, int, Tensor], None] | None = None,
    ) -> Tensor:
        """Normalised latents [1, C, T, H, W] of a request, from noise or from where it was stopped.
        `after_step` gets the latents, how many steps are done, and the last one's velocity.
        """
        if start is not None and start.step == request.steps:
            return start.latents
        pipeline = self.pipeline
        pipeline.is_decoding = False  # of an earlier video that was broken off

        def tell(_pipeline: object, index: int, _timestep: object, tensors: dict[str, Tensor]) -> None:
            if after_step is not None:
                after_step(tensors["latents"], index + 1, tensors["velocity"])

        use_loras(pipeline.transformer, self.loras, request.lora_strengths())
        prompt, negative = self.embeds.of(request)
        cached = nullcontext()
        if request.step_cache:
            cached = skipping(
                pipeline.transformer, self.step_ratios, threshold=request.step_cache, steps=request.steps
            )
        with cached:
            output = pipeline(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                num_frames=request.frames,
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
                seed=request.seed,
                latents=None if start is None else start.latents,
                first_step=0 if start is None else start.step,
                previous_velocity=None if start is None else start.velocity,
                output_type="latent",
                callback_on_step_end=tell,
                callback_on_step_end_tensor_inputs=("latents", "velocity"),
            )
        assert isinstance(output, VideoOutput)
        assert isinstance(output.frames, Tensor)
        return output.frames

    def record(self, request: Request) -> dict[str, Any]:
        """All that decides how a video looks, to be stored with it. Values are those of JSON."""
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
            "weights": weights_of(pipeline.transformer),
            "vae_dtype": dtype_name(pipeline.vae.dtype),
            "vae_tiling": pipeline.vae.tiling,
            "opensoraplan": version("opensoraplan"),
        }
        if self.fingerprints:
            record["fingerprint"] = {**self.fingerprints, "configs": _hash_configs(pipeline)}
            if request.step_cache:
                record["fingerprint"]["step_cache"] = hash_text(json.dumps(list(self.step_ratios)))
        strengths = request.lora_strengths()
        del record["lora"]
        if strengths:
            record["lora"] = [
                {"file": file.name, "strength": strength, "fingerprint": fingerprint_weights(file)}
                for file, strength in strengths.items()
            ]
        return json.loads(json.dumps(record))

    def share_decoding(self, latents: Tensor) -> None:
        """In other processes than the first: have a share in decoding, if they have one."""
        for _ in self.pipeline.iter_decode(latents) if self.all_decode else ():
            pass

    def _frames(self, latents: Tensor, asked_to_stop: Callable[[], bool]) -> Tensor | None:
        """uint8 frames [frames, height, width, 3] in the first process; None if it is stopped meanwhile."""
        if not self.ranks.first:
            self.share_decoding(latents)
            return None
        chunks = []
        for chunk in self.pipeline.iter_pictures(latents):
            chunks.append(chunk)
            if self.ranks.mesh is None and asked_to_stop():
                return None
        return torch.cat(chunks)


def _completed(options: SessionOptions, requests: Sequence[Request]) -> SessionOptions:
    """The options with the model's fingerprints and, if a request needs it, its calibration."""
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
            raise ValueError("a step cache needs a model in one folder, that `osp calibrate` has seen")
        calibration = Calibration.of(folder)
        calibration.check_weights(fingerprints["transformer"], folder)
        ratios = calibration.ratios
    return replace(options, fingerprints=fingerprints, step_ratios=ratios)


def _check_loras(model: SparseUMMDiT, options: SessionOptions, requests: Sequence[Request]) -> list[Path]:
    """The files of all LoRAs that the requests use. Raises ValueError for one that does not fit the model, of
    which no weights are needed; warns of one that was trained on another.
    """
    files = list({file: None for request in requests for file in request.lora_strengths()})
    if files and options.tp > 1:
        raise ValueError(
            f"tp {options.tp} splits the layers that a LoRA is for: share the video's tokens instead"
        )
    for file in files:
        config = check_lora(model, file)
        if config["use_dora"] and options.weights != "whole":
            raise ValueError(f"{file} is a DoRA, which needs whole weights, not {options.weights}")
        base = read_origin(file).get("base_fingerprint")
        if base and base != (options.fingerprints or {}).get("transformer", base):
            logger.warning("%s was trained on another model than this one: results may be poor", file)
    return files


def _load_pipeline(
    opened: assemble.OpenedPipeline,
    options: SessionOptions,
    place: Place,
    outlook: Outlook,
    loras: Sequence[Path],
) -> OpenSoraPlanPipeline:
    """The pipeline with its weights, tuned, on the device unless there are plans for where it is kept."""
    device = place.device
    with explained_memory(f"the model does not fit onto {device}: on one, --memory auto finds room"):
        try:
            pipeline = _read_weights(opened, options, place, device=outlook.loaded_on)
        except MemoryError as error:
            raise MemoryError(f"{error}{outlook.advice}") from None
        if options.prompts is not None:
            pipeline.register_to_config(
                prompt_template=options.prompts.template,
                default_negative_prompt=options.prompts.negative_prompt,
                clean_prompts=options.prompts.clean,
                keep_chinese=options.prompts.keep_chinese,
            )
        set_decoding(pipeline.vae, options)
        load_loras(pipeline.transformer, loras)
        tune(pipeline, options, device, masked=outlook.masked)
        if not outlook.plans:
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
    # Weights are not left to diffusers, which lets some be missing; scheduler and settings are.
    parts = assemble.load_parts(opened, dtype=place.dtype, vae_dtype=place.vae_dtype, device=device)
    with wrong_types_told(str(folder / SCHEDULER)):  # of schedulers that only diffusers knows
        return OpenSoraPlanPipeline.from_pretrained(folder, **parts, local_files_only=True)


def _told_model(options: SessionOptions) -> str | dict[str, Any]:
    """What records say of where the model came from."""
    if options.folder is not None:
        return str(options.folder)
    sources = options.sources
    paths: dict[str, Any] = {name: str(path) for name, path in sources.paths().items()}
    return paths if sources.ema is None else {**paths, "ema": sources.ema}


def _hash_configs(pipeline: OpenSoraPlanPipeline) -> str:
    """Of the configs of denoiser and VAE, which need not be those of their files."""
    models = (pipeline.transformer, pipeline.vae)
    configs = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in models]
    return hash_text(json.dumps(configs, sort_keys=True))


def _size(request: Request, strides: Strides) -> tuple[int, int]:
    """Positions of a latent frame, and of all that is denoised at a time."""
    frames, rows, columns = request.grid(strides)
    return rows * columns, frames * rows * columns * (2 if request.batched_guidance else 1)


def _named_size(request: Request) -> str:
    return f"{request.frames} frames of {request.width} x {request.height}"
