"""Texts and labels become statistics of single examples, without torch. What these add up to is in compress/benchmark/statistics.py."""

import math
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from compress import scripts
from compress.metrics import GROUPS, Missing
from compress.rouge import by_sentence, longest, ngrams
from compress.scripts import Tokenizers

Row = list[float] | Missing  # what an example adds to the sums, or why it adds nothing
Samples = dict[str, list[Row]]  # metric -> a row an example

LARGEST = math.log(sys.float_info.max)  # nats a token, beyond which a perplexity overflows
ORDER = 6  # of chrF's n-grams


class Likelihood(NamedTuple):
    """A text's likelihood by a model, summed over the tokens that it predicts.

    nats         negative log-likelihood
    tokens       how many there are
    divergence   of the model's distributions from the original's, nats; `first` that of the first token
    equal        tokens at which both have the same likeliest token
    """

    nats: float = 0.0
    tokens: float = 0.0
    divergence: float = 0.0
    equal: float = 0.0
    first: float = 0.0

    def plus(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(*(a + b for a, b in zip(self, other, strict=True)))


def score_texts(groups: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizers: Tokenizers) -> Samples:
    """Statistics of the metrics in `groups` that compare generated texts with one or several references each."""
    samples: Samples = {}
    if "rouge" in groups:
        samples.update(rouge(predictions, references, tokenizers.rouge))
    if "bleu" in groups:
        samples["bleu"] = bleu(predictions, references, tokenizers.bleu)
    for name, statistics in (("chrf", chrf), ("exact_match", exact_match), ("cer", cer)):
        if name in groups:
            samples[name] = statistics(predictions, references)
    return samples


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "latin") -> Samples:
    """ROUGE-1, -2, -L and -Lsum in points, as Google's rouge-score computes them, with its tokenizer and stemmer or with other tokens.

    Of several references the one with the best F1 counts, for each kind of ROUGE separately. For ROUGE-Lsum texts are split into sentences
    at . ! and ? (with other tokenizers at what ends sentences in any script), and at line breaks.
    """
    cut = _tokenizer(tokenizer)

    def sentences(text: str) -> list[list[str]]:
        return [cut(sentence) for sentence in scripts.sentences(text, tokenizer)]

    samples: Samples = {name: [] for name in GROUPS["rouge"]}
    for prediction, texts in zip(predictions, references, strict=True):
        seen = [(tokens, text) for text in texts if (tokens := cut(text))]
        if not seen:
            for rows in samples.values():
                rows.append(Missing.UNSEEN)
            continue
        whole, parts = cut(prediction), sentences(prediction)
        scored = {
            "rouge1": [ngrams(whole, tokens, 1) for tokens, _ in seen],
            "rouge2": [ngrams(whole, tokens, 2) for tokens, _ in seen],
            "rougeL": [longest(whole, tokens) for tokens, _ in seen],
            "rougeLsum": [by_sentence(parts, sentences(text)) for _, text in seen],
        }
        for name, scores in scored.items():
            best = max(scores, key=lambda score: score.f1)
            samples[name].append([100 * best.f1])
            samples[f"{name}_precision"].append([100 * best.precision])
            samples[f"{name}_recall"].append([100 * best.recall])
    return samples


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a") -> list[Row]:
    """The ten sums that corpus BLEU is made of, for each sentence: matches and totals of 1- to 4-grams, both lengths."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenizer)
    rows: list[Row] = []
    for prediction, texts in zip(predictions, references, strict=True):
        if not any(text.strip() for text in texts):
            rows.append(Missing.UNSEEN)
            continue
        score = metric.corpus_score([prediction], [[text] for text in texts])
        rows.append([float(x) for x in (*score.counts, *score.totals, score.sys_len, score.ref_len)])
    return rows


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Row]:
    """The 18 sums that corpus chrF (Popović 2015) is made of, as sacreBLEU counts them.

    They count the 1- to 6-grams of characters, without white space, in the output, in the reference, and in both. Of several references the
    one with the best chrF counts.
    """
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    metric = CHRF()
    rows: list[Row] = []
    for prediction, texts in zip(predictions, references, strict=True):
        seen = [text for text in texts if text.strip()]
        if not seen:
            rows.append(Missing.UNSEEN)
            continue
        best = max(seen, key=lambda text: metric.sentence_score(prediction, [text]).score) if len(seen) > 1 else seen[0]
        row: list[float] = []
        for ours, theirs in zip(extract_all_char_ngrams(prediction, ORDER), extract_all_char_ngrams(best, ORDER), strict=True):
            row += [float(ours.total() if theirs else 0), float(theirs.total()), float((ours & theirs).total())]
        rows.append(row)
    return rows


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Row]:
    """100 where an output is one of its references, white space around both left out, else 0."""
    return [
        [100.0 * (prediction.strip() in {text.strip() for text in texts})] if any(text.strip() for text in texts) else Missing.UNSEEN
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def cer(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Row]:
    """Edits that make an output its reference, and the reference's length, both in characters (NFC, white space around left out).

    Of several references the one with the lowest rate counts.
    """
    rows: list[Row] = []
    for prediction, texts in zip(predictions, references, strict=True):
        ours, *seen = (unicodedata.normalize("NFC", text.strip()) for text in (prediction, *texts))
        rates = [[float(edits(ours, text)), float(len(text))] for text in seen if text]
        rows.append(min(rates, key=lambda row: row[0] / row[1]) if rates else Missing.UNSEEN)
    return rows


def edits(ours: str, theirs: str) -> int:
    """The fewest insertions, deletions and substitutions that make one text of the other (Levenshtein 1966).

    A column of the table is two integers with a bit a row, for where it rises and where it falls (Myers 1999; Hyyrö 2003).
    """
    if not ours or not theirs:
        return len(ours) + len(theirs)
    every, last = (1 << len(ours)) - 1, 1 << (len(ours) - 1)
    places: dict[str, int] = {}
    for place, letter in enumerate(ours):
        places[letter] = places.get(letter, 0) | 1 << place
    rises, falls, distance = every, 0, len(ours)
    for letter in theirs:
        equal = places.get(letter, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        up, down = falls | (every & ~(diagonal | rises)), rises & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, (down << 1) & every
        rises, falls = down | (every & ~(diagonal | up)), up & diagonal
    return distance


def perplexity(likelihoods: Sequence[Likelihood]) -> list[Row]:
    """Rows of a negative log-likelihood in nats and its tokens, where they make a perplexity."""
    return [_perplexity(row.nats, row.tokens) for row in likelihoods]


def divergence(likelihoods: Sequence[Likelihood]) -> Samples:
    """Rows of how far distributions are from the original's: a sum and its tokens."""
    return {
        "divergence": [_a_token(row.divergence, row.tokens) for row in likelihoods],
        "equal_top": [_a_token(row.equal, row.tokens) for row in likelihoods],
        "divergence_first": [_a_token(row.first, min(row.tokens, 1)) for row in likelihoods],
        "divergence_rest": [_a_token(row.divergence - row.first, row.tokens - 1) for row in likelihoods],
    }


def labels(predicted: Sequence[int | None], right: Sequence[int], count: int) -> Samples:
    """Accuracy (100 or 0) and, for macro F1, true positives, false positives and false negatives of each label.

    predicted   None where the model's scores are NaN
    """
    samples: Samples = {"accuracy": [], "f1": []}
    for guess, truth in zip(predicted, right, strict=True):
        if guess is None:
            samples["accuracy"].append(Missing.NAN)
            samples["f1"].append(Missing.NAN)
            continue
        row = [0.0] * (3 * count)
        if guess == truth:
            row[3 * truth] = 1
        else:
            row[3 * guess + 1] = 1
            row[3 * truth + 2] = 1
        samples["accuracy"].append([100.0 * (guess == truth)])
        samples["f1"].append(row)
    return samples


def finite(score: float) -> Row:
    """A score as a row, or why it is none."""
    if math.isfinite(score):
        return [score]
    return Missing.NAN if math.isnan(score) else Missing.INFINITE


def _tokenizer(name: str) -> Callable[[str], list[str]]:
    """One of ROUGE's, by name."""
    if name == "latin":
        from rouge_score.tokenizers import DefaultTokenizer

        own: Callable[[str], list[str]] = DefaultTokenizer(use_stemmer=True).tokenize
        return own
    return {"words": scripts.words, "characters": scripts.characters}[name]


def _a_token(total: float, tokens: float) -> Row:
    if tokens < 1:
        return Missing.UNPREDICTED
    score = finite(total)
    return [*score, tokens] if isinstance(score, list) else score


def _perplexity(nats: float, tokens: float) -> Row:
    if math.isnan(nats):
        return Missing.NAN
    if not tokens:
        return Missing.UNPREDICTED
    return [nats, tokens] if nats / tokens < LARGEST else Missing.INFINITE
