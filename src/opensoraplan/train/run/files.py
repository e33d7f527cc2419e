"""Reading what describes a training run: TOML files that extend each other, a run's own config.json, the
guide's pair of JSON files, and changes of single values; and comparing two runs. What the settings mean is in
config.py, the guide's keys are in formats/mindspeed/table.py.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from opensoraplan.changes import apply_changes, merge, replace_none_words
from opensoraplan.data.selection import SelectionSettings
from opensoraplan.documents import read_json_object, read_toml
from opensoraplan.formats.mindspeed.table import LAUNCH_SCRIPT, RECOMPUTED_FEED_FORWARDS
from opensoraplan.formats.mindspeed.training import read_guide
from opensoraplan.settings import Settings, shown
from opensoraplan.train.config import (
    DataSettings,
    OptimizerSettings,
    RunSettings,
    TrainSettings,
    VAETrainSettings,
)

logger = logging.getLogger(__name__)

EXTENDS = "extends"
# Sections that only the guide's files have.
OF_THE_GUIDE = ("predictor", "dataset_param", "dataloader_param")

METHOD = "method"
_NONE = "none"
# The settings of a run of each method.
SETTINGS: Mapping[str, type[RunSettings]] = {"flow": TrainSettings, "vae": VAETrainSettings}
# To begin with one's own.
EXAMPLE = "configs/finetune.toml"

# What may be different when a run is resumed: it changes how long, how fast and how loud, not what is
# learned at a step. What happens to outliers is the remedy for a run that they have stopped. Clips may lie
# elsewhere: that they are the same ones is known from the checkpoint.
RESUMABLE_CHANGES = (
    "output",
    "device",
    "model.attention",
    "vae.chunk",
    "data.manifest",
    "data.root",
    "data.workers",
    "data.reader",
    "data.max_bad_files",
    "data.other_clips",
    "optimizer.steps",
    "optimizer.ema_device",
    "clip.outlier",
    "clip.patience",
    "memory.*",
    "parallel.*",
    "log.*",
    "validation.*",
    "checkpoint.*",
)


# Paths that may be others if what is in them is the same, which a checkpoint tells by fingerprints.
MOVABLE = (
    "model.pretrained",
    "vae.pretrained",
    *(f"text.{name}" for name in ("t5", "clip", "t5_tokenizer", "clip_tokenizer")),
    "data.features",
)
# A denoiser's checkpoints know how many samples a step has, in all processes; what makes them up may change.
KNOWN_TO_CHECKPOINTS = ("data.batch_size", "optimizer.accumulate")


def read_run(
    path: Path | None,
    *,
    model_json: Path | None = None,
    data_json: Path | None = None,
    changes: Sequence[str] = (),
    to_cache: bool = False,
) -> TrainSettings:
    """The denoiser's run that `path` (.toml, or the config.json of a run) describes, or the guide's two
    files, or both: then `path` goes before them. `changes` go before all: see `read_settings`. `to_cache`,
    for `osp cache`: the guide's files name clips also where they say that features are loaded.

    Raises one ValueError for files that are missing or wrong, which names every key that is. Whether the
    paths in it exist is not looked at.
    """
    if model_json is not None and model_json.is_dir():
        raise ValueError(
            f"{model_json} is a folder, --model takes the guide's JSON: to start from weights in a folder, "
            f"use --set model.pretrained={model_json}"
        )
    if (model_json is None) != (data_json is None):
        given, other = ("--model", "--data") if data_json is None else ("--data", "--model")
        raise ValueError(f"{given} {model_json or data_json} needs {other}: the guide's files go together")
    if model_json is None or data_json is None:
        if path is None:
            raise ValueError(
                f"no run is given: use a .toml file such as {EXAMPLE}, or the guide's two files: --model and "
                "--data"
            )
        settings = read_settings(path, changes=changes)
        if not isinstance(settings, TrainSettings):
            raise ValueError(f'{path} trains no denoiser: it has method = "{settings.method}"')
        return settings
    values, notes = read_guide(model_json, data_json, to_cache=to_cache)
    for note in notes:
        logger.info("%s", note)
    where = f"{model_json} and {data_json}"
    if path is not None:
        over, names, kind = _read_file(path, method="flow")
        if kind is not TrainSettings:
            raise ValueError(f"{path} trains no denoiser, which the guide's two files describe")
        values = merge(values, over)
        where = f"{where} and {names}"
    values = apply_changes(values, changes, kind=TrainSettings)
    defaults, note = _launch_script_defaults(values)
    values = merge(defaults, values)
    logger.info("%s", note)
    data = values.get("data")
    if isinstance(data, dict) and data.get("features") is None and data.get("manifest") is None:
        raise ValueError(
            f"{where} load features, but data.features is missing: give data.features=FOLDER, which "
            "osp cache writes with the same two files, or set load_video_features, load_text_features and "
            "use_feature_data to false"
        )
    return TrainSettings.read(values, where=_describe_source(where, changes))


def read_settings(path: Path, *, changes: Sequence[str] = (), method: str = "flow") -> RunSettings:
    """The settings that a .toml or .json file has, and the file that it `extends`, with `changes` as
    "section.key=value" (see changes.py). `method`: what the run is taken for if the files name none.
    """
    values, where, kind = _read_file(path, method=method)
    return kind.read(apply_changes(values, changes, kind=kind), where=_describe_source(where, changes))


def nearest_key(name: str, *kinds: type[Settings]) -> str | None:
    """The setting, with its section, that is called `name` or nearly so: "optimizer.lr" for "lr"."""
    keys = [f"{section}{key}" for kind in kinds for section, keys in kind.sections() for key in keys]
    last = {key.rpartition(".")[2]: key for key in reversed(keys)} | {key: key for key in keys}
    near = difflib.get_close_matches(name, last, n=1, cutoff=0.8)
    return last[near[0]] if near else None


def refuse_changes(old: Settings, new: Settings) -> None:
    """Raise ValueError if `new` cannot go on with what `old` began: something but RESUMABLE_CHANGES
    differs, or the end of a schedule that tells the learning rate of every step before it. What `moved_paths`
    gives is left to `refuse_other_files`.
    """
    allowed = RESUMABLE_CHANGES + (KNOWN_TO_CHECKPOINTS if isinstance(new, TrainSettings) else ())
    allowed += tuple(moved_paths(old, new))
    lines = [
        f"  {name}: {before} -> {after}"
        for name, (before, after) in _find_differences(old, new).items()
        if not any(fnmatchcase(name, pattern) for pattern in allowed)
    ]
    steps = _find_differences(old, new).get("optimizer.steps")
    if steps is not None and dict(_flatten(old.model_dump())).get("optimizer.schedule") == "cosine":
        lines.append(
            f"  optimizer.steps: {steps[0]} -> {steps[1]}, which changes the learning rate of every "
            "step with optimizer.schedule cosine"
        )
    if lines:
        raise ValueError(
            "this run was started with other settings and cannot be resumed with these:\n"
            + "\n".join(lines)
            + "\nResume it with the old settings, or start a new run: without --resume, in another "
            "output folder, and with model.pretrained to start from this run's weights"
        )


def moved_paths(old: Settings, new: Settings) -> dict[str, str]:
    """The settings of MOVABLE that name another path than before, and both paths for messages."""
    found = _find_differences(old, new)
    return {
        name: f"{before} -> {after}"
        for name in MOVABLE
        if name in found and _NONE not in (before := found[name][0], after := found[name][1])
    }


def refuse_other_files(moved: Mapping[str, str], before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ValueError unless what is in the `moved_paths` is the same, by the fingerprints of a checkpoint
    and of `now`.
    """
    lines = [
        f"  {name}: {paths}" + ("" if name in before else " (the checkpoint does not know what was in it)")
        for name, paths in moved.items()
        if before.get(name) is None or before[name] != now.get(name)
    ]
    if lines:
        raise ValueError(
            "this run cannot be resumed with other files than it was started with:\n"
            + "\n".join(lines)
            + "\nName the old ones or copies of them, or start a new run"
        )


def _find_differences(old: Settings, new: Settings) -> dict[str, tuple[str, str]]:
    before, after = dict(_flatten(old.model_dump(mode="json"))), dict(_flatten(new.model_dump(mode="json")))
    return {
        name: (_show(before.get(name)), _show(after.get(name)))
        for name in before | after
        if before.get(name) != after.get(name)
    }


def _flatten(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield before + key, value


def _show(value: object) -> str:
    return _NONE if value is None else str(value)


def _read_file(path: Path, *, method: str) -> tuple[dict[str, Any], str, type[RunSettings]]:
    """The values of a file over those of the file that it extends, the names of both for messages, and whose
    settings they are.
    """
    chain = _read_chain(path)
    named = {file: content[METHOD] for file, content in chain.items() if METHOD in content}
    for file, name in named.items():
        if name not in SETTINGS:
            raise ValueError(f"{file}: {METHOD} must be one of {', '.join(SETTINGS)}, got {shown(name)}")
    kind = SETTINGS[next(iter(named.values()), method)]
    values: dict[str, Any] = {}
    for file, content in chain.items():
        if problems := kind.unknown_keys(content, also=[EXTENDS]):
            for other, settings in SETTINGS.items():
                if not named and not settings.unknown_keys(content):
                    keys = ", ".join(problems)
                    raise ValueError(f'{file} has {keys}: to train that, it needs {METHOD} = "{other}"')
            raise ValueError(f"{file}: " + "; ".join(problems.values()))
        values = merge(content, values)
    return values, " over ".join(map(str, chain)), kind


def _read_chain(path: Path) -> dict[Path, dict[str, Any]]:
    """The content of a file, of the one that it extends, and so on."""
    chain: dict[Path, dict[str, Any]] = {}
    seen: list[Path] = []
    while True:
        content = chain[path] = _load(path)
        seen.append(path.resolve())
        base = content.pop(EXTENDS, None)
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ValueError(f"{path}: {EXTENDS} must be the name of one other file, got {base!r}")
        found = path.parent / base
        if found.resolve() in seen:
            circle = ", ".join(file.name for file in seen[seen.index(found.resolve()) :])
            raise ValueError(f"{path} {EXTENDS} {base}, which is a circle: {circle}, {found.name}")
        if not found.is_file():
            raise ValueError(f"{path} {EXTENDS} {base}, but {found} does not exist")
        path = found


def _load(path: Path) -> dict[str, Any]:
    """The content of one file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix not in (".toml", ".json") or not path.is_file():
        raise ValueError(
            f"{path}: a run is described by a .toml file such as {EXAMPLE}, or by the config.json of a run"
        )
    if path.suffix == ".json":
        content = _add_method(_drop_defaults(read_json_object(path, comments=True)))
    else:
        content = replace_none_words(read_toml(path))
    if any(key in content for key in OF_THE_GUIDE):
        raise ValueError(f"{path} is one of the guide's two files: give them as --model and --data")
    return content


def _drop_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json, which has every value, as if defaults of the selection and the reader had not been
    given where features without clips are held against what is given (`open_source`).
    """
    data = content.get("data")
    if not isinstance(data, dict) or data.get("features") is None or data.get("manifest") is not None:
        return content
    data = dict(data)
    if data.get("reader") == DataSettings.model_fields["reader"].default:
        del data["reader"]
    if isinstance(data.get("selection"), dict):
        defaults = SelectionSettings().model_dump(mode="json")
        data["selection"] = {
            key: value
            for key, value in data["selection"].items()
            if key not in defaults or value != defaults[key]
        }
    return {**content, "data": data}


def _add_method(content: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json as if it named its method, which the first runs did not: it has every section, and
    only a VAE's has losses.
    """
    return content if METHOD in content else {METHOD: "vae" if "loss" in content else "flow", **content}


def _describe_source(where: str, changes: Sequence[str]) -> str:
    return " with ".join([where, *([" ".join(changes)] if changes else [])])


def _launch_script_defaults(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What the original's start of a new model and the guide's launch script set for a run of these values,
    to go below them, and a note that names it, and what of the script is not taken over.
    """

    def given(section: str) -> Mapping[str, Any]:
        return found if isinstance(found := values.get(section), dict) else {}

    defaults: dict[str, Any] = dict(LAUNCH_SCRIPT)
    if not given("memory").get("recompute_blocks"):
        config = given("model").get("config")
        layers = config.get("num_layers") if isinstance(config, dict) else None
        depth = RECOMPUTED_FEED_FORWARDS
        if isinstance(layers, list) and all(isinstance(count, int) for count in layers):
            depth = min(depth, sum(layers))
        defaults["memory"] = {"recompute_feed_forwards": depth}
    if not given("model").get("pretrained"):
        defaults["model"] = {"init": "original"}
    taken = [f"seed = {defaults['seed']}"] if "seed" not in values else []
    for section in ("checkpoint", "log", "memory", "model"):
        new = {key: value for key, value in defaults.get(section, {}).items() if key not in given(section)}
        taken += [f"{section}.{key} = {value}" for key, value in new.items()]
    steps = given("optimizer").get("steps", OptimizerSettings().steps)
    accumulate = given("optimizer").get("accumulate", OptimizerSettings().accumulate)
    return defaults, (
        f"as the original and its launch script have it: {', '.join(taken) or 'nothing'}; not as there: "
        f"optimizer.steps is {steps} (there one epoch), optimizer.accumulate is {accumulate} (there 1: the "
        "number in data.json only reaches the sampler), parallel.tp is for you to set (there 8)"
    )
