"""The guide's inference JSON, comments and all, MindSpeed-MM's own too, translated to ours; and what selects
samples in its data.json. Every key is used, or named as having no meaning here; an unknown key is an error.
What the keys mean is in table.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensoraplan.changes import apply_changes
from opensoraplan.data.selection import SelectionSettings
from opensoraplan.documents import read_json_object
from opensoraplan.formats.mindspeed.inference_mm import is_mindspeed_mm, to_guide
from opensoraplan.formats.mindspeed.meaning import Document, translate
from opensoraplan.formats.mindspeed.table import InferenceFile, Preprocess, with_fewest_pixels
from opensoraplan.models import original

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """What an inference file says. `sources`: paths by component, `generate`: settings of the run by our
    names, `transformer_config`, `vae_config`: our constructors' arguments. `allow_tf32` None: as
    torch has it.
    """

    sources: dict[str, Path]
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    streaming: bool
    max_text_tokens: int
    allow_tf32: bool | None
    scheduler: dict[str, Any]
    generate: dict[str, Any]


def read_inference(path: Path, *, changes: Sequence[str] = ()) -> Inference:
    """Translate an inference file, the guide's or MindSpeed-MM 2.x's own, in which no weights of the denoiser
    need be named. `changes`: values to take instead of its own, as "section.key=value".

    Raises ValueError for unknown keys, and for values that v1.5.0 does not have.
    """
    content = apply_changes(read_json_object(path, comments=True), changes)
    if of_mindspeed_mm := is_mindspeed_mm(content):
        content, idle = to_guide(content, where=str(path))
        logger.info("%s is MindSpeed-MM's own inference file, not the guide's", path)
        if idle:
            logger.info(
                "%s: without meaning here: %s (text encoders compute in dtype; the VAE streams, whatever the "
                "chunks, with the same result)",
                *(path.name, ", ".join(idle)),
            )
    document = Document(InferenceFile, content, path)
    file = document.file
    for note in document.idle_notes():
        logger.info("%s", note)
    configs: dict[str, Any] = {
        "transformer_config": original.denoiser_config(file.predictor, where=f"section predictor of {path}"),
        "vae_config": original.vae_config(file.ae, where=f"section ae of {path}"),
    }
    values = translate(document)
    sources, generate = values["sources"], values["generate"]
    if of_mindspeed_mm and not sources["transformer"]:
        del sources["transformer"]
    for part, section in (("transformer", "predictor"), ("vae", "ae")):
        if not sources.get(part, True):
            raise ValueError(f"{path}: {section} needs from_pretrained, the path of its weights")
    # The original divides integers; at an interval of 1 a rate such as 23.976 stays what it is.
    if file.frame_interval > 1:
        generate["fps"] = file.fps // file.frame_interval
    if not generate["fps"]:
        raise ValueError(
            f"{path}: fps // frame_interval is {file.fps:g} // {file.frame_interval}, which is 0: "
            f"frame_interval must be at most {max(1, int(file.fps))}"
        )
    values["streaming"] = values["streaming"] is not False
    return Inference(**values, **configs)


def read_selection(path: Path | None, *, changes: Sequence[str] = ()) -> SelectionSettings:
    """Which samples the guide's data.json selects (None: as printed there), with `changes` as "key=value".

    Raises ValueError for unknown keys and for values that cannot be.
    """
    if path is None:
        return SelectionSettings.read(
            apply_changes({}, changes, kind=SelectionSettings), where="the selection"
        )
    section: Any = read_json_object(path, comments=True)
    for key in ("dataset_param", "preprocess_parameters"):
        section = section.get(key) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path} has no dataset_param.preprocess_parameters: is it the guide's data.json?")
    values = apply_changes(with_fewest_pixels(section), changes, kind=SelectionSettings)
    return SelectionSettings(**Preprocess.read(values, where=f"{path}, preprocess_parameters").selection())
