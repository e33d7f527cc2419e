"""Caption cleaning, the same for training captions and for prompts. Templates and tokenizers are in text.py.

The rules are those of DeepFloyd-IF and PixArt-alpha, applied twice in a row as Open-Sora Plan does. The model
was trained on their output, so their odd corners count too: the tests hold them to diffusers' own.
"""

import html
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from string import ascii_letters, digits
from urllib.parse import unquote_plus

# An ordered list of (pattern, replacement): each acts on what the ones before it left.
_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# On lower-case text that may still be HTML.
_LINKS = _rules(
    ("<person>", "person"),
    # "www:" too gets a pass of its own: taking the first links out can leave new ones.
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)

# On the plain text of it, up to the point where entities are decoded.
_HANDLES = _rules((r"@\w+\b", ""))
_CHINESE = _rules(
    # CJK strokes, phonetic extensions, enclosed letters, compatibility forms, hexagrams and all ideographs.
    (r"[\u31c0-\u9fff]+", ""),
)
_SYMBOLS = _rules(
    # One kind of dash and of each quote.
    (rf"[{_DASHES}]+", "-"),
    (r"[`\u00b4«»“”¨]", '"'),
    (r"[\u2018\u2019]", "'"),
    # What is left of entities after broken HTML.
    (r"&quot;?", ""),
    (r"&amp", ""),
    # IP addresses, article numbers, a line break that was escaped, "#12", long numbers, file names.
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    # Repeated quotes and full stops, signs that carry no meaning, a full stop that stands alone.
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINERS = re.compile("[-_]")

# On decoded text, where capitals can be back.
_WORDS = _rules(
    # Identifiers: jc6640, jc6640vc, 6640vc231.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    # The phrases of shops and stock sites.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    # Identifiers that change between letters and digits more than once; sizes such as 1920x1080.
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    # Spacing around punctuation.
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # Quotes around the whole, then one stray sign at either end, then a caption that is only ".something".
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

# Chinese is written without spaces: a run of its characters is a word beside letters of other scripts.
_WORD = re.compile(r"[\u31c0-\u9fff]+|[^\W_\u31c0-\u9fff]+")
# What most captions are made of, and where rules may take words of them all the same.
_USUAL = frozenset(f"{ascii_letters}{digits} \t\n\r,;:.!?'\"()-\u2018\u2019\u201c\u201d\u2013\u2014")
_PHRASES = ("http", "www", "shipping", "download", "click", *_FILE_TYPES.split("|"))
_NAMES = re.compile(r"\.[a-z]")
_NUMBERS = re.compile(r"[a-z]\d|\d[a-z]|\d{6}|\d\.\d+\.|page\s+\d|\d:\d\d\s*$")


def clean_caption(text: str, *, keep_chinese: bool = False) -> str:
    """Lower-case plain text without links, markup, handles, identifiers and stray signs, as in training.

    `keep_chinese` leaves Chinese characters (U+31C0 to U+9FFF) in; otherwise they are removed.
    """
    return _clean_once(_clean_once(text, keep_chinese), keep_chinese)


@dataclass(frozen=True)
class Loss:
    """The words of a text, in lower case, that cleaning has `removed`, each once and in their order, and
    whether next to nothing is left of it.
    """

    removed: tuple[str, ...] = ()
    emptied: bool = False


def loses_nothing(text: str) -> bool:
    """Whether cleaning is known to remove no word, by a look that is much quicker than cleaning."""
    characters, text = set(text), text.lower()
    return (
        characters <= _USUAL
        and not any(phrase in text for phrase in _PHRASES)
        and not ("." in characters and _NAMES.search(text))
        and (characters.isdisjoint(digits) or not _NUMBERS.search(text))
    )


def find_loss(text: str, cleaned: str) -> Loss:
    """What of `text` is not in `cleaned`, which may have words around it. Entities, escapes and broken
    encodings are not words: they are undone first, as cleaning does.
    """
    if loses_nothing(text):
        return Loss()
    from ftfy import fix_text

    left = Counter(_WORD.findall(cleaned.lower()))
    words = _WORD.findall(fix_text(html.unescape(unquote_plus(text).lower())).lower())
    removed: dict[str, None] = {}
    letters = 0
    for word in words:
        left[word] -= 1
        if left[word] < 0:
            removed[word] = None
        else:
            letters += len(word)
    return Loss(tuple(removed), emptied=bool(removed) and letters <= 1)


def is_chinese(word: str) -> bool:
    """Whether a word has characters that cleaning keeps with `keep_chinese` only."""
    return any("\u31c0" <= character <= "\u9fff" for character in word)


def _clean_once(text: str, keep_chinese: bool) -> str:
    from ftfy import fix_text

    text = unquote_plus(text).strip().lower()
    text = _apply(_LINKS, text)
    text = _plain_text(text)
    text = _apply(_HANDLES, text)
    if not keep_chinese:
        text = _apply(_CHINESE, text)
    text = _apply(_SYMBOLS, text)
    # Joined words are words (this-is-my-cat), but one compound in a sentence stays one.
    if len(_JOINERS.findall(text)) > 3:
        text = _JOINERS.sub(" ", text)
    # Without white space at the ends, where the rules that follow look for stray signs.
    text = html.unescape(html.unescape(fix_text(text))).strip()
    return _apply(_WORDS, text).strip()


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _plain_text(markup: str) -> str:
    if "<" not in markup and "&" not in markup:
        return markup  # the parser would return it as it is, slowly
    from bs4 import BeautifulSoup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "looks more like a file name than markup": yes, captions do
        return BeautifulSoup(markup, features="html.parser").text
