"""Every script's letters are seen by what is chosen for them, and plain Latin is cut as it always was."""

import unicodedata

import pytest
import regex

from compress import scores, scripts
from compress.benchmark.statistics import corpus_value
from compress.scripts import Tokenizers, choose

LETTERS = [letter for letter in map(chr, range(0x110000)) if regex.match(r"\p{L}", letter)]
SAMPLES = {
    "Cyrillic": "Съешь же ещё этих мягких булок", "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία", "Arabic": "نص حكيم له سر قاطع وذو شأن",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों", "Hangul": "키스의 고유조건은 입술끼리 만나야", "Ethiopic": "ሰማይ አይታረስ ንጉሥ አይከሰስ",
    "Han": "天地玄黃宇宙洪荒", "Thai": "เป็นมนุษย์สุดประเสริฐ", "Myanmar": "သီဟိုဠ်မှ ဉာဏ်ကြီးရှင်", "Khmer": "ខ្ញុំអាចញ៉ាំកញ្ចក់បាន",
}  # fmt: skip


def runs(size=24):
    """Letters that follow each other in Unicode, of every script; of the long runs of Han, Hangul and the like every twentieth."""
    for start in range(0, len(LETTERS) - size, size):
        letters = LETTERS[start : start + size]
        if (not 0x3500 < ord(letters[0]) < 0xF900 and ord(letters[0]) < 0x17100) or start % (20 * size) == 0:
            yield letters


def text(letters):
    return " ".join("".join(letters[start : start + 4]) for start in range(0, len(letters), 4))


def folded(letters):
    return set(unicodedata.normalize("NFC", "".join(letters)).casefold())


def test_letters_of_every_script_are_seen():
    """Of a reference of 24 letters its own text has all, and one of other letters nothing."""
    before = LETTERS[:24]
    for letters in runs():
        reference = text(letters)
        own = folded(letters)
        other = text([letter for letter in before if not folded([letter]) & own] or ["x"])
        chosen = choose(Tokenizers(), [[reference]])
        for output, expected in ((reference, 100), (other, 0)):
            samples = scores.rouge([output], [[reference]], chosen.rouge)
            for name in ("rouge1", "rougeL", "rougeLsum"):
                assert samples[name] == [[pytest.approx(expected)]], (reference, other, chosen)
        assert corpus_value("bleu", scores.bleu([reference], [[reference]], chosen.bleu)) == pytest.approx(100), (reference, chosen)
        before = letters


def test_each_script_is_named():
    for script, words in SAMPLES.items():
        assert scripts.shares([[words]]) == {script: 1.0}
    assert scripts.shares([["abcd", "щщщ"], ["!? 12"]]) == {"Latin": 0.571, "Cyrillic": 0.429}
    assert scripts.shares([["\U00010400\U00010401"]]) == {"other scripts": 1.0}


@pytest.mark.parametrize(
    ("references", "rouge", "bleu"),
    [
        (["The cat sat on the mat.", "Zwölf Boxkämpfer jagen Viktor."], "latin", "13a"),
        (["Một con vịt xoè ra hai cái cánh, nó kêu rằng quác quác"], "words", "13a"),  # half of its letters would be dropped
        ([SAMPLES["Cyrillic"]], "words", "13a"),
        ([SAMPLES["Han"]], "words", "zh"),
        (["これは日本語です"], "words", "char"),
        ([SAMPLES["Thai"]], "words", "char"),
        (["the cat", SAMPLES["Cyrillic"], SAMPLES["Han"]], "words", "zh"),
        (["buy an iPhone купить айфон"] * 3, "words", "13a"),  # in one row
        (["the cat sat"] * 99 + [SAMPLES["Greek"]], "latin", "13a"),  # one of a hundred is named, not followed
        (["\U0001f600", "", "  ", "the cat"], "latin", "13a"),
        (["\U0001f600", SAMPLES["Han"]], "words", "zh"),
        ([], "latin", "13a"),
    ],
)
def test_what_is_chosen(references, rouge, bleu):
    assert choose(Tokenizers(), [[text] for text in references]) == Tokenizers(rouge, bleu)
    assert choose(Tokenizers("characters", "intl"), [[text] for text in references]) == Tokenizers("characters", "intl")


def test_vowel_signs_joiners_and_digits_do_not_split_words():
    assert scripts.words("नमस्ते, दुनिया!") == ["नमस्ते", "दुनिया"]
    assert scripts.words("می‌خواهم ٣٤ don't") == ["می‌خواهم", "٣٤", "don", "t"]
    assert scripts.words("iPhone在北京ñ") == ["iphone", "在", "北", "京", "ñ"]
    assert scripts.words("n\u0303") == scripts.words("Ñ") == ["ñ"], "composed or not"
    assert scripts.characters("स्ते ab") == ["स्", "ते", "a", "b"]


def test_sentences_end_in_any_script():
    assert scripts.sentences("猫がいる。犬もいる！なぜ？", "words") == ["猫がいる。", "犬もいる！", "なぜ？", ""]
    assert scripts.sentences("यह एक है। वह दो है।", "words") == ["यह एक है।", "वह दो है।"]
    assert scripts.sentences("One. Two? 3.5 is\nthree", "words") == ["One.", "Two?", "3.5 is", "three"]
