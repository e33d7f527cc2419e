"""What happens to prompts before they are encoded, and what is said where words of them are lost."""

import re
import subprocess
import sys

import pytest

from opensoraplan.models.prompts import DEFAULT_NEGATIVE_PROMPT, PromptSettings


def test_the_defaults_are_the_originals() -> None:
    settings = PromptSettings()
    assert settings.positive("A Cat") == "high quality, a cat"
    original = "\n        high quality,\n        {}\n        "
    assert PromptSettings(template=original).positive("A Cat") == settings.positive("A Cat")
    negative = settings.negative(None)
    assert negative.startswith(
        "worst quality, normal quality, low quality, low res, blurry, artifacts, grainy"
    )
    assert negative.endswith("overexposed, underexposed.")
    assert settings.negative("") == negative
    assert settings.negative("Heavy rain") == f"{negative} heavy rain"


def test_each_part_can_be_replaced_or_switched_off() -> None:
    assert PromptSettings(template=None).positive("A Cat") == "a cat"
    assert PromptSettings(template="{}, at night").positive("A Cat") == "a cat, at night"
    assert PromptSettings(negative_prompt="").negative("Rain") == "rain"
    assert PromptSettings(negative_prompt="").negative(None) == ""
    assert PromptSettings(negative_prompt="Snow").negative("Rain") == "snow rain"
    assert PromptSettings(keep_chinese=True).positive("\u732b") == "high quality, \u732b"
    assert PromptSettings().positive("\u732b") == "high quality"


def test_without_cleaning_text_is_used_as_it_is() -> None:
    settings = PromptSettings(clean=False)
    assert settings.positive("  A <b>Cat</b>\n") == "high quality,   A <b>Cat</b>\n"
    assert settings.negative("Rain ") == f"{DEFAULT_NEGATIVE_PROMPT} Rain "


def test_braces_in_a_prompt_are_text() -> None:
    prompt = "a {} in {0} {cat!r} }{"
    assert PromptSettings(clean=False).positive(prompt) == f"high quality, {prompt}"


@pytest.mark.parametrize(
    ("template", "count"), [("high quality", 0), ("{} and {}", 2), ("{prompt}", 0), ("", 0)]
)
def test_a_template_needs_one_place_for_the_prompt(template: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} times: use 'high quality, \{{\}}'"):
        PromptSettings(template=template)


# What is lost

CAT, DOG = "一只猫在海滩上奔跑", "一只狗"


@pytest.mark.parametrize(
    ("prompt", "removed", "read"),
    [
        (f"{CAT}, a cat", CAT, "high quality, , a cat"),
        ("猫カフェ, warm light", "猫", "high quality, カフェ, warm light"),  # kana next to kanji
        ("a wall 1920x1080 wide", "1920x1080", "high quality, a wall wide"),
        ("the year 1234567 in numbers", "1234567", "high quality, the year in numbers"),
        ("as in cat.png, a dog", "cat, png", "high quality, as in , a dog"),
        ("a photo of p3rs0n, smiling", "p3rs0n", "high quality, a photo of , smiling"),
        ("a photo of <trigger>, smiling", "trigger", "high quality, a photo of , smiling"),
        ("a ball and a ball.jpg", "ball, jpg", "high quality, a ball and a"),
        ("plus %3Cb%3E bold", "b", "high quality, plus bold"),
    ],
)
def test_words_that_are_lost_are_named_with_what_is_left(prompt: str, removed: str, read: str) -> None:
    settings = PromptSettings()
    warning = settings.check(prompt)
    assert warning is not None
    said = f"cleaning removes {removed} from the prompt {prompt!r}: the model reads {read!r}; "
    assert warning.startswith(said)
    assert ("--keep-chinese" in warning) == bool(re.search("[一-鿿]", removed))
    assert "--no-clean-prompts (clean_prompts=False) leaves the text as it is" in warning
    assert settings.positive(prompt) == read
    assert PromptSettings(clean=False).check(prompt) is None


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "",
            "  ",
            "A red ball.",
            "café, naïve; “quoted” — it\u2019s",
            "rock &amp; roll",
            "50%25 caf%C3%A9 a+b",
        ),
        *("this-is-my_cute-cat", "f/1.8, 4K, 3d-render (best)", "🎉🎉", "...", "schÃ¶n", "ﬁre", "İstanbul"),
        *("Ein großes Kätzchen", "кошка", "カフェ", "고양이"),
    ],
)
def test_text_that_only_changes_its_form_loses_nothing(prompt: str) -> None:
    assert PromptSettings().check(prompt) is None
    assert PromptSettings(template=None).check(prompt) is None


@pytest.mark.parametrize("prompt", [CAT, DOG, f"{DOG}。", f"{CAT} 4", "video.mp4", "1920x1080", "<trigger>"])
def test_a_prompt_of_which_nothing_is_left_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"cleaning leaves nothing of the prompt '.*write it in English; --"):
        PromptSettings().check(prompt)
    assert PromptSettings(clean=False).check(prompt) is None


def test_chinese_can_be_kept() -> None:
    settings = PromptSettings(keep_chinese=True)
    assert settings.check(CAT) is None
    assert settings.positive(CAT) == f"high quality, {CAT}"
    assert "1920x1080" in (settings.check(f"{CAT} 1920x1080") or "")
    assert "keep-chinese" not in (settings.check(f"{CAT} 1920x1080") or "")


def test_negative_prompts_are_checked_too() -> None:
    settings = PromptSettings()
    assert settings.check("", negative=True) is None
    assert settings.check("rain", negative=True) is None  # the default one loses "jpeg", which nobody wrote
    warning = settings.check("雨, rain", negative=True)
    assert warning is not None
    assert "cleaning removes 雨 from the negative prompt '雨, rain': the model reads 'rain';" in warning
    with pytest.raises(ValueError, match="nothing of the negative prompt '低质量'"):
        settings.check("低质量", negative=True)


def test_prompts_are_checked_without_torch() -> None:
    code = "import sys, opensoraplan.models.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
