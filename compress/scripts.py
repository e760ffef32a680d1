"""Which scripts texts are written in, and how that decides what ROUGE and BLEU count.

ROUGE's own tokenizer keeps nothing but the letters a to z and digits. Of a text in Cyrillic nothing is left, so no loss can show. BLEU's
13a cuts at spaces and at ASCII punctuation, so a sentence in Chinese is a single word.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import regex

ROUGE = ("latin", "words", "characters")
BLEU = ("13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab")  # sacreBLEU's
PACKAGES = {"ja-mecab": ("MeCab", "ja"), "ko-mecab": ("mecab_ko", "ko")}  # the module that each needs, and the extra with it
MODERN = (
    "Arabic", "Armenian", "Bengali", "Bopomofo", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati", "Gurmukhi", "Han",
    "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer", "Lao", "Latin", "Malayalam", "Myanmar", "Oriya", "Sinhala", "Tamil",
    "Telugu", "Thaana", "Thai", "Tibetan",
)  # in common use, Unicode Standard Annex 31, table 5  # fmt: skip
UNSPACED = (
    "Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Nushu", "Tangut", "Khitan_Small_Script", "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le",
    "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Ahom", "Javanese", "Balinese", "Cuneiform", "Egyptian_Hieroglyphs", "Anatolian_Hieroglyphs",
)  # without spaces between words  # fmt: skip
FEW = 0.05  # of a text's letters, or of the texts: the share that a choice may ignore
PLAIN = 0.8  # of a text's letters must be a to z and digits, for the rest of Latin is dropped with its accents

_ANY = r"[\p{L}\p{N}]"
_CLASS = "".join(rf"\p{{Script_Extensions={script}}}" for script in UNSPACED)
_LETTER = regex.compile(_ANY)
_FOREIGN = regex.compile(r"(?V1)[\p{L}--\p{Latin}]")
_UNSPACED = regex.compile(rf"(?V1)[{_ANY}&&[{_CLASS}]]")
_HAN = regex.compile(r"(?V1)[[\p{L}\p{N}]&&\p{Han}]")
_CHARACTER = regex.compile(rf"{_ANY}\p{{M}}*")
_WORD = regex.compile(
    rf"(?V1)[{_ANY}&&[{_CLASS}]]\p{{M}}*"  # a character with its marks
    rf"|[{_ANY}--[{_CLASS}]](?:[\u200c\u200d]?[[{_ANY}\p{{M}}]--[{_CLASS}&&{_ANY}]])*"  # a word, with its joiners
)
_SENTENCE_END = regex.compile(r"(?<=\p{Sentence_Terminal})\s+|(?<=[。！？｡])")
_PLAIN_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Tokenizers:
    """What ROUGE and BLEU cut texts with, one of `ROUGE` and of `BLEU`; `auto` where the references decide."""

    rouge: str = "auto"
    bleu: str = "auto"


def choose(tokenizers: Tokenizers, references: Sequence[Sequence[str]]) -> Tokenizers:
    """These tokenizers, with those for the references' scripts in the place of `auto`. References without letters don't count.

    ROUGE: `latin` where it sees nearly all of nearly all references, else `words`. BLEU: 13a; where more than a few references are in
    scripts without spaces, `zh` for Han and `char` for the others.
    """
    texts = [text for texts in references if _LETTER.search(text := "\n".join(texts))]
    rouge = "latin" if sum(map(_is_plain, texts)) >= (1 - FEW) * len(texts) else "words"
    bleu = "13a"
    if sum(map(_is_unspaced, texts)) > FEW * len(texts):
        unspaced, han = (sum(_count(pattern, text) for text in texts) for pattern in (_UNSPACED, _HAN))
        bleu = "zh" if han >= (1 - FEW) * unspaced else "char"
    return Tokenizers(rouge if tokenizers.rouge == "auto" else tokenizers.rouge, bleu if tokenizers.bleu == "auto" else tokenizers.bleu)


def shares(references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Each script's share of the references' letters (from 0, to a thousandth), the largest first."""
    letters = Counter("".join(text for texts in references for text in texts))
    counts = Counter[str]()
    for letter, times in letters.items():
        if letter.isalpha():
            counts[_script(letter)] += times
    return {script: share for script, times in counts.most_common() if (share := round(times / counts.total(), 3))}


def words(text: str) -> list[str]:
    """Words of any script with their marks; of scripts without spaces each character is one. Case doesn't count."""
    return list(map(str, _WORD.findall(_folded(text))))


def characters(text: str) -> list[str]:
    """Each letter or digit of any script with its marks. Case doesn't count."""
    return list(map(str, _CHARACTER.findall(_folded(text))))


def sentences(text: str, tokenizer: str) -> list[str]:
    """The sentences of a text, for ROUGE-Lsum; line breaks end them too."""
    end = _PLAIN_SENTENCE_END if tokenizer == "latin" else _SENTENCE_END
    return [part for line in text.splitlines() for part in end.split(line)]


def _is_plain(text: str) -> bool:
    letters = _count(_LETTER, text)
    return _count(_FOREIGN, text) <= FEW * letters and len(re.findall("[a-z0-9]", text.lower())) >= PLAIN * letters


def _is_unspaced(text: str) -> bool:
    return _count(_UNSPACED, text) > FEW * _count(_LETTER, text)


def _count(pattern: "regex.Pattern[str]", text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


@cache
def _script(letter: str) -> str:
    return next((script for script in MODERN if regex.match(rf"\p{{Script={script}}}", letter)), "other scripts")
