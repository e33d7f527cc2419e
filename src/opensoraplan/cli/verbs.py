"""The verbs of `osp`: finds the verb of a command line, parses its options and runs it. Slow imports are
inside the verbs, so that --help is quick.
"""

import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opensoraplan.cli import data, decoding, doctor, generating, launch, models, plan, serving, training
from opensoraplan.cli.effects import given_options
from opensoraplan.cli.help import Groups
from opensoraplan.cli.options import check_exists
from opensoraplan.cli.parse import Hint, check_options, help_width, no_hint, parse_options
from opensoraplan.cli.parts import read_config, read_defaults, spell_out_ema
from opensoraplan.names import did_you_mean

if TYPE_CHECKING:
    from opensoraplan.formats.mindspeed.inference import Inference


@dataclass(frozen=True)
class Verb:
    """A verb: the dataclass of its options, whose docstring is its help, and the function that runs it."""

    options: type
    run: Callable[..., None]
    with_config: bool = False
    """Whether it has --config, the guide's inference JSON, which `run` then gets as second argument."""
    groups: Groups = field(default_factory=dict)
    """Groups of options in --help, by title; options of no group come first."""
    hint: Hint = field(default=no_hint)

    @property
    def summary(self) -> str:
        """The first paragraph of its help."""
        return " ".join((self.options.__doc__ or "").partition("\n\n")[0].split())


GROUPS = {
    "Generate": {
        "generate": Verb(
            generating.Generate, generating.generate, True, generating.GROUPS, hint=generating.hint
        ),
        "decode": Verb(decoding.Decode, decoding.decode),
        "calibrate": Verb(decoding.Calibrate, decoding.calibrate),
        "reconstruct": Verb(models.Reconstruct, models.reconstruct),
    },
    "Serve": {
        "serve": Verb(serving.Serve, serving.serve, groups=serving.GROUPS),
        "serve worker": Verb(serving.ServeWorker, serving.serve_worker, groups=serving.WORKER_GROUPS),
    },
    "Train": {
        "data check": Verb(data.DataCheck, data.data_check),
        "data sheet": Verb(data.DataSheet, data.data_sheet),
        "cache": Verb(training.Cache, training.cache, hint=training.hint),
        "train": Verb(training.Train, training.train, hint=training.hint),
        "train-vae": Verb(training.TrainVAE, training.train_vae, hint=training.hint),
        "export": Verb(training.Export, training.export),
    },
    "Models and machines": {
        "convert": Verb(models.Convert, models.convert, True),
        "inspect": Verb(models.Inspect, models.inspect),
        "plan": Verb(plan.Plan, plan.plan, hint=training.hint),
        "doctor": Verb(doctor.Doctor, doctor.doctor),
        "launch": Verb(launch.Launch, launch.launch, hint=launch.hint),
    },
}
# Verbs that several processes can run together.
LAUNCHED = ("train", "cache", "generate")
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}


def run(words: list[str]) -> None:
    """Run the verb that a command line names, or show help."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if words[:1] in ([], ["-h"], ["--help"]):
        (sys.stdout if words else sys.stderr).write(overview(GROUPS, "osp"))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        sys.stdout.write(f"opensoraplan {version('opensoraplan')}\n")
        return
    verb, options, inference, rest = _parse(words)
    if isinstance(options, launch.Launch):
        _check_launched(options)
    if isinstance(options, generating.Generate):
        generating.generate(options, inference, given_options(rest))
    elif verb.with_config:
        verb.run(options, inference)
    else:
        verb.run(options)


def _parse(words: list[str]) -> "tuple[Verb, Any, Inference | None, list[str]]":
    """The verb, its options, the content of --config, and the words after the verb. Raises ValueError or
    SystemExit for words that cannot be read.
    """
    name, rest = _verb_of(words)
    verb = VERBS[name]
    check_options(verb.options, rest, program=f"osp {name}", hint=verb.hint)
    if verb.with_config:
        rest = spell_out_ema(rest)
    inference = read_config(rest) if verb.with_config else None
    defaults = read_defaults(rest, inference) if verb.options is generating.Generate else {}
    program, groups = f"osp {name}", verb.groups
    options = parse_options(
        verb.options, rest, program=program, groups=groups, defaults=defaults, hint=verb.hint
    )
    return verb, options, inference, rest


def _check_launched(options: launch.Launch) -> None:
    """Check the command to launch, before torchrun starts and wraps its error in a report of its own. With
    --print, files are not checked: they may be on another machine.
    """
    command = [*options.command]
    if not command:
        return  # `launch` raises an error for this
    if command[0] not in LAUNCHED:
        near = did_you_mean(command[0], LAUNCHED)
        raise ValueError(f"osp launch runs {', '.join(LAUNCHED)}, not {command[0]!r}{near}")
    if {"-h", "--help"} & {*command}:
        raise ValueError(f"ask for help without launch: osp {command[0]} --help")
    _, job, inference, rest = _parse(command)
    if options.print:
        return
    if isinstance(job, generating.Generate):
        generating.check(job, inference, given_options(rest))
    else:
        for path in (job.files.config, job.files.model, job.files.data):
            if path is not None:
                check_exists(path)


def _verb_of(words: list[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, and the rest of it. Shows the help of `osp data`."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in VERBS:
            return name, words[count:]
    family = {name: verb for name, verb in VERBS.items() if name.startswith(f"{words[0]} ")}
    if family and words[1:2] in (["-h"], ["--help"]):
        sys.stdout.write(overview({"Verbs": family}, f"osp {words[0]}"))
        sys.exit(0)
    if family:
        raise ValueError(f"osp {words[0]} needs one of {', '.join(name.split()[1] for name in family)}")
    known = did_you_mean(words[0], VERBS) or f": it is one of {', '.join(VERBS)}"
    raise ValueError(f"there is no verb {words[0]!r}{known}")


def overview(groups: dict[str, dict[str, Verb]], program: str) -> str:
    """The page of --help that lists the verbs."""
    lines = [f"usage: {program} VERB ...    ({program} VERB --help shows the options of a verb)", ""]
    if program == "osp":
        lines += ["Open-Sora Plan v1.5.0: video from text.", ""]
    for title, verbs in groups.items():
        lines.append(f"{title}:")
        for name, verb in verbs.items():
            lines += textwrap.wrap(
                verb.summary, help_width(), initial_indent=f"  {name:<13}", subsequent_indent=" " * 15
            )
        lines.append("")
    return "\n".join(lines)
