"""Caption cleaning against the measured pairs and against diffusers' own function on generated strings."""

import html
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from opensoraplan.models import captions
from opensoraplan.models.captions import Loss, clean_caption, find_loss

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))
EDGE = json.loads((FOLDER / "captions_edge.json").read_text(encoding="utf-8"))

# One entry per line of the rules and then some, so that random joins of them meet every rule and its borders.
PIECES = """
http:// https:/a https:x www:b www. a.com x.co/uk- user@site.org @bob_1 @ .com [a](b.com) e.g. U.S. com it
<b> </b> <person> <br/> < > <!--c--> <?xml?> <script>x</script> <a%20href="b.it">
&amp; &ampx &quot; &quot &quotp &lt;b&gt; &#65;bc1 &nbsp; &eacute; &amp;amp;quot; & %20 %3Cb%3E %26amp%3B +
#1 #12 #1234 #12345 # 123456 12345 1.2.3.4 192.168.100.200.5 12:30 1:23 \\n \\ /
jpg a.jpg img_1.png mp4 images pdf%20image page 12 free shipping worldwide download
click%20on%20here click for on
jc6640 jc6640vc 66a77 a1b2c3 3d-render 4K 1920x1080 1.5\u04452 10\u00d720 x X
- -- \u2014 \u2013 _ \u3030 \uff0d this-is-my_cute-cat
' " '' \u201c \u201d \u2018 \u2019 `
\u00ab \u00a8 \u00b4 ... . .. , : ; ! ? ( ) [ ] { } | * ~ \u00ae \u2122 \u00bd \u00bf \u2022
\u732b \u8349\u5730 \u3231 \u337f \u31f0 \u4dc0 \u3400
\u30ab\u30bf \ud55c\uad6d \u0130 \u00df \u00c9 \u00c3\u00a9 \u00e2\u20ac\u2122 \ufb01 \uff0c \uff26
a b cat the dog 1 22 Time lapse
"""
GAPS = ["", "", " ", "  ", "\n", "\t", " : ", " . "]


def nasty_strings(count: int) -> list[str]:
    rng = random.Random(0)
    pieces = PIECES.split()
    return [
        "".join(rng.choice(pieces) + rng.choice(GAPS) for _ in range(rng.randint(1, 14)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("pair", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_pairs(pair: dict[str, str]) -> None:
    assert clean_caption(pair["caption"]) == pair["clean"]


def test_odd_captions_of_the_original() -> None:
    assert len(EDGE) == 156
    assert [[caption, clean_caption(caption)] for caption, _ in EDGE] == EDGE


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # the reference lets beautifulsoup4 guess that a caption is a file
def test_equals_diffusers_on_nasty_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is the same, but that it strips white space once more, when entities are decoded."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha

    stripping = SimpleNamespace(unescape=lambda text: html.unescape(text).strip())
    monkeypatch.setattr(pipeline_pixart_alpha, "html", stripping)
    # The method reads one class attribute and nothing of an instance, so no pipeline has to be built.
    kind = pipeline_pixart_alpha.PixArtAlphaPipeline
    reference = kind.__new__(kind)
    texts = ["", " ", *nasty_strings(1500)]
    assert [clean_caption(text) for text in texts] == reference._text_preprocessing(texts, clean_caption=True)


@pytest.mark.filterwarnings("error")
def test_a_caption_that_looks_like_a_path_raises_no_warning() -> None:
    assert clean_caption("/home/cats&dogs.html") == "home cats dogs. html"


def test_cleaning_goes_over_the_text_twice() -> None:
    # The first pass only turns the entities into tags, the second takes the tags out.
    assert clean_caption("a &lt;b&gt; cat") == "a cat"


def test_chinese_is_removed_unless_kept() -> None:
    text = "\u732b\u5728\u8349\u5730\u4e0a\u5954\u8dd1 A Cat\u3231 running"
    assert clean_caption(text) == "a cat running"
    kept = clean_caption(text, keep_chinese=True)
    assert kept.startswith("\u732b\u5728\u8349\u5730\u4e0a\u5954\u8dd1 a cat")
    assert kept.endswith("running")


def test_keep_chinese_changes_nothing_else() -> None:
    for pair in GOLDEN:
        if pair["caption"].isascii():
            assert clean_caption(pair["caption"], keep_chinese=True) == pair["clean"]


def test_texts_that_are_taken_as_plain_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in nasty_strings(6000) if find_loss(text, "") == Loss()]
    assert len({text for text in texts if any(map(str.isalpha, text))}) > 100
    monkeypatch.setattr(captions, "_USUAL", frozenset())
    for text in texts:
        assert find_loss(text, clean_caption(text)) == Loss(), text
