"""`osp cache`, `train`, `train-vae` and `export`: options, and checks before work starts."""

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.options import Changes, OptionalPath, check_exists, optional

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFiles:
    """What to train."""

    config: Annotated[Positional[Path | None], optional("RUN.toml")] = None
    """The run's settings; docs/settings.md lists all of them."""
    model: OptionalPath = None
    """The guide's model_opensoraplan1_5.json; give --data, too."""
    data: OptionalPath = None
    """The guide's data.json."""
    set: Annotated[Changes, optional("KEY=VALUE ...")] = ()
    """Change settings, for example optimizer.lr=1e-4 data.manifest=clips."""


@dataclass(frozen=True)
class Train:
    """Train or fine-tune the denoiser on captioned clips, or on features that `osp cache` has encoded. With
    method = "vae" in the run's file, train the VAE.

    Ctrl-C and SIGTERM save a checkpoint before the run ends (exit code 130 or 143). Continue with the same
    command and --resume latest.
    """

    files: OmitArgPrefixes[RunFiles] = RunFiles()
    resume: Annotated[str | None, optional("latest|STEP")] = None
    """Continue from a checkpoint in the run's output folder. latest: the newest one, or a new run if
    there is none.
    """


@dataclass(frozen=True)
class TrainVAE:
    """Train or fine-tune the WF-VAE on clips, without captions. The same as `osp
    train` with method = "vae".
    """

    config: Positional[Path]
    """The run's settings; docs/settings.md lists all of them."""
    set: Annotated[Changes, optional("KEY=VALUE ...")] = ()
    """Change settings, for example optimizer.lr=1e-4 data.manifest=clips."""
    resume: Annotated[str | None, optional("latest|STEP")] = None
    """Continue from a checkpoint in the run's output folder. latest: the newest one, or a new run if
    there is none.
    """


@dataclass(frozen=True)
class Cache:
    """Encode the clips and captions of a run once, so that training needs neither the VAE nor
    the text encoders.

    If stopped, continue with the same command. Training refuses features that come from another VAE, other
    text encoders or other clips.
    """

    files: OmitArgPrefixes[RunFiles] = RunFiles()
    out: OptionalPath = None
    """Folder to write to. Default: the run's data.features."""
    engine: Literal["torchrun", "ray"] = "torchrun"
    """torchrun: this process, or all that torchrun started. ray: the workers of a Ray cluster."""


@dataclass(frozen=True)
class Export:
    """Export a training run, or one of its checkpoints, for `osp generate` or in the original's formats.

    A whole model folder is written if the run's settings name the VAE and the text encoders. For an
    unfinished run of `osp train-vae` the VAE alone is written; a finished one has already written RUN/vae.
    """

    run: Positional[Path]
    """Output folder of `osp train` or `osp train-vae`."""
    out: Path
    """Folder to write, new or empty; for a LoRA, but for lora-peft, the .safetensors file to write."""
    step: Annotated[str, optional("latest|best|STEP")] = "latest"
    """Checkpoint to export; best: the one with the lowest held-out loss (of a VAE, the highest PSNR)."""
    ema: bool = True
    """Export the EMA weights instead of the latest weights."""
    to: Annotated[
        Literal["diffusers", "megatron", "release", "lora", "lora-comfy", "lora-kohya", "lora-peft"] | None,
        optional("FORMAT", "(default: lora for a run with an [adapter], else diffusers)"),
    ] = None
    """diffusers (a folder), megatron (shards) or release (the release's pickle): the whole model, with an
    adapter merged into it. lora, lora-comfy or lora-kohya (a .safetensors file with the names of diffusers,
    ComfyUI or kohya) or lora-peft (a folder): the adapter alone.
    """
    tp: int = 1
    """Tensor-parallel size of the Megatron shards."""
    dtype: Annotated[Literal["bf16", "fp32"] | None, optional("bf16|fp32", "(default: as trained)")] = None
    """Precision to write."""
    max_shard_size: str = "2GB"
    """Largest size of a file in the diffusers folder."""
    prompt_template: Annotated[str | None, optional("TEXT", "(default: the run's pipeline's)")] = None
    """Template around each prompt. {} stands for the prompt; '{}' alone switches the template off."""
    default_negative_prompt: Annotated[str | None, optional("TEXT", "(default: the run's pipeline's)")] = None
    """Default negative prompt of the exported model; '' for none."""


def hint(words: list[str]) -> str | None:
    """What to do about unknown words: a setting of the run, as in --lr 1e-4, is changed with --set."""
    if not words[0].startswith("--"):
        return None
    from opensoraplan.train.config import TrainSettings, VAETrainSettings
    from opensoraplan.train.run.files import nearest_key

    option, _, value = words[0].removeprefix("--").partition("=")
    value = value or next((word for word in words[1:2] if not word.startswith("-")), "VALUE")
    key = nearest_key(option.replace("-", "_"), TrainSettings, VAETrainSettings)
    return key and f"it is a setting of the run, --set {key}={value}"


def train(options: Train) -> None:
    """`osp train`."""
    from opensoraplan.train.run.files import read_run, read_settings
    from opensoraplan.train.run.trainer import train as job

    files, changes = options.files, [*chain(*options.files.set)]
    if files.config is not None and files.model is None and files.data is None:
        settings = read_settings(files.config, changes=changes)
    else:
        settings = read_run(files.config, model_json=files.model, data_json=files.data, changes=changes)
    with _report_errors():
        job(settings, resume=options.resume)


def train_vae(options: TrainVAE) -> None:
    """`osp train-vae`: `osp train` for a file that need not say method = "vae"."""
    from opensoraplan.train.config import VAETrainSettings
    from opensoraplan.train.run.files import read_settings
    from opensoraplan.train.run.trainer import train as job

    settings = read_settings(options.config, changes=[*chain(*options.set)], method="vae")
    if not isinstance(settings, VAETrainSettings):
        raise ValueError(f'{options.config} has method = "{settings.method}": use osp train')
    with _report_errors():
        job(settings, resume=options.resume)


@contextmanager
def _report_errors() -> Iterator[None]:
    """Report a run that a signal stopped with exit code 128 + its number, as shells and schedulers do, and a
    bug of ours with its traceback and exit code 1.
    """
    from opensoraplan.device import is_out_of_memory
    from opensoraplan.parallel.ranks import explain
    from opensoraplan.train.run.loop import RunStoppedError

    try:
        yield
    except RunStoppedError as stop:
        sys.stderr.write(f"osp: {stop}\n")
        sys.exit(128 + stop.signal)
    except (ValueError, OSError, FloatingPointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        traceback.print_exc()
        sys.stderr.write(f"osp: error: {explain(error)} (a bug: please report it with what is above)\n")
        sys.exit(1)


def cache(options: Cache) -> None:
    """`osp cache`. Under torchrun, each process writes some of the shards."""
    from opensoraplan.parallel.ranks import place_in_job
    from opensoraplan.train.inputs.cache import write_cache
    from opensoraplan.train.run.files import read_run

    files = options.files
    settings = read_run(
        files.config,
        model_json=files.model,
        data_json=files.data,
        changes=[*chain(*files.set)],
        to_cache=True,
    )
    out = options.out or settings.data.features
    if out is None:
        raise ValueError(
            "no output folder is given: use --out FOLDER, or data.features in the run's settings"
        )
    rank, ranks = place_in_job()
    if options.engine == "torchrun":
        if rank:
            logging.getLogger("opensoraplan").setLevel(logging.WARNING)
        with _report_errors():
            write_cache(settings, out, rank=rank, ranks=ranks)
        return
    if ranks > 1:
        raise ValueError(
            f"--engine ray starts its own workers: run it without torchrun, which started {ranks}"
        )
    from opensoraplan.train.inputs.cache_ray import write_cache_by_ray

    write_cache_by_ray(settings, out)


def export(options: Export) -> None:
    """`osp export`."""
    check_exists(options.run)
    if options.tp != 1 and options.to != "megatron":
        raise ValueError(f"--tp {options.tp} goes with --to megatron")

    from opensoraplan.device import DTYPES
    from opensoraplan.train.run.export import ExportOptions, PromptDefaults, export_run
    from opensoraplan.train.run.files import read_settings
    from opensoraplan.train.run.folder import CONFIG

    config = options.run / CONFIG
    if config.is_file() and read_settings(config).method == "vae":
        if options.to not in (None, "diffusers") or not options.ema or options.dtype is not None:
            raise ValueError(f"{options.run} has trained a VAE: give --out and --step only")
        from opensoraplan.train.methods.vae import export_vae

        export_vae(options.run, options.out, step=options.step)
        return

    export_run(
        options.run,
        options.out,
        ExportOptions(
            step=options.step,
            ema=options.ema,
            to=options.to,
            tensor_parallel=options.tp,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            max_shard_size=options.max_shard_size,
            prompts=PromptDefaults(options.prompt_template, options.default_negative_prompt),
        ),
    )
