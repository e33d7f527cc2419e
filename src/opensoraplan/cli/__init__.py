"""The command `osp`. Heavy imports are inside the verbs, so that --help is quick.

A user's mistake ends in one line on stderr and exit code 2; a traceback is a bug of ours.
"""

import itertools
import logging
import os
import sys
from typing import Annotated

import tyro
from tyro.conf import subcommand

from opensoraplan.cli.data import (
    Data,
    DataCheck,
    DataRender,
    DataSheet,
    data_check,
    data_render,
    data_sheet,
)
from opensoraplan.cli.generating import Calibrate, Decode, Generate, calibrate, decode, generate
from opensoraplan.cli.models import Convert, Inspect, Reconstruct, convert, inspect, reconstruct
from opensoraplan.cli.parts import read_config, read_defaults
from opensoraplan.cli.plan import Launch, Plan, launch, plan
from opensoraplan.cli.training import Cache, Export, Train, TrainVAE, cache, export, train, train_vae

logger = logging.getLogger("opensoraplan")


def main() -> None:
    """Run the command. Mistakes of the user end with exit code 2 and one message, anything else is a bug."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    # transformers reads this when it is imported. Its bars would break into ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        inference = read_config(sys.argv[1:])
        defaults = Generate(**read_defaults(sys.argv[1:], inference))
        verbs = (
            Annotated[Generate, subcommand("generate", default=defaults, prefix_name=False)]
            | Annotated[Decode, subcommand("decode", prefix_name=False)]
            | Annotated[Calibrate, subcommand("calibrate", prefix_name=False)]
            | Annotated[Convert, subcommand("convert", prefix_name=False)]
            | Annotated[Reconstruct, subcommand("reconstruct", prefix_name=False)]
            | Annotated[Inspect, subcommand("inspect", prefix_name=False)]
            | Annotated[Data, subcommand("data", prefix_name=False)]
            | Annotated[Cache, subcommand("cache", prefix_name=False)]
            | Annotated[Train, subcommand("train", prefix_name=False)]
            | Annotated[TrainVAE, subcommand("train-vae", prefix_name=False)]
            | Annotated[Export, subcommand("export", prefix_name=False)]
            | Annotated[Plan, subcommand("plan", prefix_name=False)]
            | Annotated[Launch, subcommand("launch", prefix_name=False)]
        )  # type: ignore[operator]
        try:
            options = tyro.cli(verbs, prog="osp", description="Open-Sora Plan v1.5.0: video from text.")  # type: ignore[arg-type]
        except SystemExit as end:
            if end.code and (hint := _hint(sys.argv[1:])):
                sys.stderr.write(f"osp: {hint}\n")
            raise
        match options:
            case Generate():
                generate(options, inference)
            case Decode():
                decode(options)
            case Calibrate():
                calibrate(options)
            case Convert():
                convert(options, inference)
            case Reconstruct():
                reconstruct(options)
            case Inspect():
                inspect(options)
            case Data(DataCheck() as job):
                data_check(job)
            case Data(DataRender() as job):
                data_render(job)
            case Data(DataSheet() as job):
                data_sheet(job)
            case Cache():
                cache(options)
            case Train():
                train(options)
            case TrainVAE():
                train_vae(options)
            case Export():
                export(options)
            case Plan():
                plan(options)
            case Launch():
                launch(options)
    except KeyboardInterrupt:
        sys.stderr.write("osp: stopped\n")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        sys.stderr.write(f"osp: error: {error}\n")
        sys.exit(2)
    except RuntimeError as error:
        from opensoraplan.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"osp: error: memory is full: {str(error).partition(chr(10))[0]}\n")
        sys.exit(2)


def _hint(arguments: list[str]) -> str | None:
    """What was probably forgotten in a line that cannot be read."""
    verb, *rest = arguments or [""]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    if verb == "generate" and len(words) > 1:
        return f'put quotes around a prompt: osp generate "{" ".join(words)}"'
    if verb == "launch" and "--" not in rest:
        return "the command goes behind --: osp launch --processes 8 -- train RUN.toml"
    return None
