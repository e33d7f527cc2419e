"""What happens to a prompt before it is encoded: template, negative prompt, cleaning; what cleaning loses.

The rules of cleaning are in captions.py, the encoders in text.py. No torch here, for quick checks of options.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from opensoraplan.models.captions import clean_caption, find_loss, is_chinese

DEFAULT_TEMPLATE = "high quality, {}"
DEFAULT_NEGATIVE_PROMPT = (
    "Worst quality, Normal quality, Low quality, Low res, Blurry, Jpeg artifacts, Grainy, watermark, banner, "
    "Cropped, Out of frame, Out of focus, Bad anatomy, Bad proportions, Deformed, Disconnected limbs, "
    "Disfigured, username, error, sketch, duplicate, ugly, monochrome, horror, geometry, mutation, "
    "disgusting, overexposed, underexposed."
)

# Words and characters of a prompt that a message shows.
_MOST_LISTED = 8
_LONGEST_SHOWN = 300


@dataclass(frozen=True)
class PromptSettings:
    """What happens to a prompt before it is encoded. The defaults are the original's.

    `template` holds `{}` once, where the prompt goes; None switches it off. `negative_prompt` comes before
    the user's own; "" switches it off. `clean` passes both through `clean_caption`, as the training
    captions were; off, the text is used as it is. `keep_chinese` leaves Chinese characters in when
    cleaning. A template without exactly one `{}` is a ValueError.
    """

    template: str | None = DEFAULT_TEMPLATE
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    clean: bool = True
    keep_chinese: bool = False

    def __post_init__(self) -> None:
        if self.template is not None and self.template.count("{}") != 1:
            raise ValueError(
                f"the prompt template must hold {{}} once, where the prompt goes; it is in {self.template!r} "
                f"{self.template.count('{}')} times: use {DEFAULT_TEMPLATE!r}, say, or None for no template"
            )

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """From the keys of a pipeline's config, of which some may be absent."""
        names = {
            "prompt_template": "template",
            "default_negative_prompt": "negative_prompt",
            "clean_prompts": "clean",
            "keep_chinese": "keep_chinese",
        }
        return cls(**{field: config[key] for key, field in names.items() if key in config})

    def positive(self, prompt: str) -> str:
        """The text to encode for `prompt`: put into the template, then cleaned. Its braces are plain text."""
        return self._cleaned(prompt if self.template is None else self.template.replace("{}", prompt))

    def negative(self, user_negative: str | None) -> str:
        """The text to encode to guide away from: the default, a space and the user's own, then cleaned."""
        return self._cleaned(" ".join(part for part in (self.negative_prompt, user_negative) if part))

    def check(self, prompt: str, *, negative: bool = False) -> str | None:
        """A warning that says which words cleaning removes from a prompt; None if it removes none. Raises
        ValueError if next to nothing is left of it.
        """
        if not self.clean:
            return None
        encoded = self.negative(prompt) if negative else self.positive(prompt)
        loss = find_loss(prompt, encoded)
        if not loss.removed:
            return None
        name = f"{'negative prompt' if negative else 'prompt'} {_shown(prompt)}"
        keep = "--no-clean-prompts (clean_prompts=False) leaves the text as it is"
        if any(map(is_chinese, loss.removed)):
            keep = f"--keep-chinese (keep_chinese=True) keeps Chinese characters, {keep}"
        if loss.emptied:
            raise ValueError(
                f"cleaning leaves nothing of the {name}: the model was trained on English captions, so write "
                f"it in English; {keep}"
            )
        more = ", ..." if len(loss.removed) > _MOST_LISTED else ""
        removed = ", ".join(loss.removed[:_MOST_LISTED]) + more
        left = self._cleaned(prompt) if negative else encoded  # the default negative prompt is long
        return f"cleaning removes {removed} from the {name}: the model reads {_shown(left)}; {keep}"

    def check_all(self, prompts: Iterable[str], negatives: Iterable[str] = ()) -> list[str]:
        """`check` of prompts and negative prompts, each once: the warnings of those that lose words."""
        found = [self.check(prompt) for prompt in dict.fromkeys(prompts)]
        found += [self.check(prompt, negative=True) for prompt in dict.fromkeys(negatives)]
        return [warning for warning in found if warning is not None]

    def _cleaned(self, text: str) -> str:
        return clean_caption(text, keep_chinese=self.keep_chinese) if self.clean else text


def _shown(text: str) -> str:
    """A prompt for messages: all of a usual one, the beginning of a long one."""
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "...")
