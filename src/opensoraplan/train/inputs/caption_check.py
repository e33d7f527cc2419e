"""What cleaning removes from the captions of a run: for `osp data check`, and when the run begins."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opensoraplan.data.selection import EXAMPLES, Sample
from opensoraplan.models.captions import clean_caption, find_loss, loses_nothing
from opensoraplan.train.config import TextSettings

# Removed words that are listed, and characters of a caption.
_MOST_WORDS = 5
_LONGEST_SHOWN = 80
_EMPTIED = "captions are empty after cleaning: their clips train without a caption"
_SHORTENED = "captions lose words to cleaning"
_KEEP = "text.keep_chinese=true keeps Chinese characters, text.clean=false all of the text"


@dataclass
class CaptionLosses:
    """How many captions are `emptied` or `shortened` by cleaning, the first of each as lines to read, and how
    many captions lose each word.
    """

    emptied: int = 0
    shortened: int = 0
    emptied_examples: list[str] = field(default_factory=list)
    shortened_examples: list[str] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path, caption: str, cleaned: str) -> None:
        """Count a caption of the clip at `path` that has become `cleaned`."""
        loss = find_loss(caption, cleaned)
        self.words.update(loss.removed)
        line = f"{path}: {_shown(caption)} becomes {_shown(cleaned)}"
        if loss.emptied or not cleaned:
            self.emptied += 1
            self.emptied_examples += [line] if self.emptied <= EXAMPLES else []
        elif loss.removed:
            self.shortened += 1
            self.shortened_examples += [line] if self.shortened <= EXAMPLES else []

    def table(self) -> str:
        """For `osp data check`; empty if no caption loses a word."""
        if not (self.emptied or self.shortened):
            return ""
        lines = ["Captions"]
        for count, what, examples in (
            (self.emptied, _EMPTIED, self.emptied_examples),
            (self.shortened, f"{_SHORTENED}: {self._listed()}", self.shortened_examples),
        ):
            lines += [f"  {count} {what}", *(f"      {line}" for line in examples)] if count else []
        return "\n".join([*lines, f"  {_KEEP}"])

    def warnings(self) -> list[str]:
        """For the log of a run: a line for each kind of loss."""
        lines = []
        if self.emptied:
            lines.append(f"{self.emptied} {_EMPTIED}: {'; '.join(self.emptied_examples)}. {_KEEP}")
        if self.shortened:
            first = self.shortened_examples[0]
            lines.append(f"{self.shortened} {_SHORTENED}: {self._listed()} ({first}). {_KEEP}")
        return lines

    def _listed(self) -> str:
        """The words that most captions lose."""
        listed = [f"{word} ({count})" for word, count in self.words.most_common(_MOST_WORDS)]
        return ", ".join([*listed, "..."] if len(self.words) > _MOST_WORDS else listed)


def find_caption_losses(samples: Sequence[Sample], text: TextSettings) -> CaptionLosses:
    """What cleaning by these settings removes from all captions of the clips, each counted once a clip."""
    found = CaptionLosses()
    seen: set[tuple[Path, str]] = set()
    for sample in samples if text.clean else ():
        for caption in sample.record.captions:
            if not caption.strip() or (loses_nothing(caption) and any(map(str.isalnum, caption))):
                continue
            if (key := (sample.record.path, caption)) not in seen:
                seen.add(key)
                found.add(*key, clean_caption(caption, keep_chinese=text.keep_chinese))
    return found


def _shown(caption: str) -> str:
    return repr(caption if len(caption) <= _LONGEST_SHOWN else caption[:_LONGEST_SHOWN] + "...")
