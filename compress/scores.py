"""Texts and labels become per-example statistics; no torch. What the statistics add up to is in statistics.py."""

import re
from collections.abc import Sequence

from compress.metrics import GROUPS

Samples = dict[str, list[list[float]]]  # metric -> (examples, k)

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def score_texts(groups: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Samples:
    """Statistics of the metrics in `groups` (rouge, bleu) for generated texts, one or several references each."""
    samples: Samples = {}
    if "rouge" in groups:
        samples.update(rouge(predictions, references))
    if "bleu" in groups:
        samples["bleu"] = bleu(predictions, references)
    return samples


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Samples:
    """ROUGE-1, -2, -L and -Lsum in points, by Google's rouge-score with stemming (Lin 2004).

    With several references the one with the best F1 counts, for each kind apart. For ROUGE-Lsum texts are split into
    sentences at . ! and ?, and at line breaks.
    """
    from rouge_score.rouge_scorer import RougeScorer

    plain, by_sentence = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True), RougeScorer(["rougeLsum"], use_stemmer=True)
    samples: Samples = {name: [] for name in GROUPS["rouge"]}
    for prediction, texts in zip(predictions, references, strict=True):
        best = {
            **plain.score_multi(list(texts), prediction),
            **by_sentence.score_multi([_sentences(text) for text in texts], _sentences(prediction)),
        }
        for name, score in best.items():
            samples[name].append([100 * score.fmeasure])
            samples[f"{name}_precision"].append([100 * score.precision])
            samples[f"{name}_recall"].append([100 * score.recall])
    return samples


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[float]]:
    """The ten sums that corpus BLEU is made of, for each sentence: matches and totals of 1- to 4-grams, both lengths."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    rows = []
    for prediction, texts in zip(predictions, references, strict=True):
        score = metric.corpus_score([prediction], [[text] for text in texts])
        rows.append([float(x) for x in (*score.counts, *score.totals, score.sys_len, score.ref_len)])
    return rows


def labels(predicted: Sequence[int], right: Sequence[int], count: int) -> Samples:
    """Accuracy (100 or 0) and, for macro F1, true positives, false positives and false negatives of each label."""
    samples: Samples = {"accuracy": [], "f1": []}
    for guess, truth in zip(predicted, right, strict=True):
        row = [0.0] * (3 * count)
        if guess == truth:
            row[3 * truth] = 1
        else:
            row[3 * guess + 1] = 1
            row[3 * truth + 2] = 1
        samples["accuracy"].append([100.0 * (guess == truth)])
        samples["f1"].append(row)
    return samples


def _sentences(text: str) -> str:
    return "\n".join(part for line in text.splitlines() for part in SENTENCE_END.split(line))
