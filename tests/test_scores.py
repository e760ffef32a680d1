"""The scoring path against a worked example and against the definitions."""

import math
import re

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from compress import scores
from compress.benchmark.figures import quality
from compress.benchmark.statistics import corpus_value
from compress.metrics import COMPARED, Missing
from compress.scores import Likelihood
from compress.scripts import Tokenizers

CANDIDATE, REFERENCE = "the cat sat on the big red mat", "the cat sat on the mat"


def test_the_worked_example():
    shares = {name: rows[0][0] / 100 for name, rows in scores.rouge([CANDIDATE], [[REFERENCE]]).items()}
    assert (shares["rouge1_recall"], shares["rouge1_precision"], shares["rouge1"]) == pytest.approx((1.0, 6 / 8, 6 / 7))
    assert (shares["rouge2_recall"], shares["rouge2_precision"], shares["rouge2"]) == pytest.approx((4 / 5, 4 / 7, 2 / 3))
    assert shares["rougeL"] == pytest.approx(6 / 7)


def test_the_best_of_several_references_counts():
    single = scores.rouge([CANDIDATE], [[REFERENCE]])
    many = scores.rouge([CANDIDATE], [["nothing alike", REFERENCE, "the mat"]])
    assert many["rouge1"] == single["rouge1"]


def test_rouge_lsum_takes_sentences_one_by_one():
    # the same two sentences in the other order: the longest common subsequence breaks, sentence by sentence nothing is lost
    samples = scores.rouge(["Dogs bark loudly. Cats sleep all day."], [["Cats sleep all day. Dogs bark loudly."]])
    assert samples["rougeLsum"][0][0] == pytest.approx(100)
    assert samples["rougeL"][0][0] == pytest.approx(100 * 4 / 7)


def test_stemming_is_on():
    assert scores.rouge(["cats running"], [["cat runs"]])["rouge1"][0][0] == pytest.approx(100)


def test_an_empty_output_scores_zero():
    samples = scores.score_texts(["rouge", "bleu"], [""], [["a cat"]], Tokenizers("latin", "13a"))
    assert corpus_value("rougeL", samples["rougeL"]) == 0
    assert corpus_value("bleu", samples["bleu"]) == 0


def test_labels_count_as_accuracy_and_f1():
    samples = scores.labels([0, 1, 1, 1], [0, 0, 1, 1], 2)
    assert corpus_value("accuracy", samples["accuracy"]) == 75
    assert corpus_value("f1", samples["f1"]) == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)  # as scikit-learn's macro average


texts = st.lists(
    st.sampled_from(["the", "cats", "running", "ran.", "on", "a", "mat!", "x-ray", "schön", "12", "\n", "is?"]), max_size=25
).map(" ".join)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_rouge_is_that_of_rouge_score(prediction, references):
    def lines(text):
        return "\n".join(part for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+", line))

    expected = {
        **RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score_multi(references, prediction),
        **RougeScorer(["rougeLsum"], use_stemmer=True).score_multi(list(map(lines, references)), lines(prediction)),
    }
    samples = scores.rouge([prediction], [references])
    if not any(re.search("[a-zA-Z0-9]", text) for text in references):
        assert set(map(tuple, samples.values())) == {(Missing.UNSEEN,)}
        return
    for name, score in expected.items():
        parts = [samples[name], samples[f"{name}_precision"], samples[f"{name}_recall"]]
        assert parts == [[[100 * score.fmeasure]], [[100 * score.precision]], [[100 * score.recall]]]


@given(st.lists(st.tuples(texts, texts.filter(str.strip), texts.filter(str.strip)), min_size=1, max_size=6), st.booleans())
def test_chrf_is_sacrebleus(rows, several):
    outputs, references = [row[0] for row in rows], [list(row[1 : 2 + several]) for row in rows]
    expected = sacrebleu.corpus_chrf(outputs, [list(column) for column in zip(*references, strict=True)]).score
    assert corpus_value("chrf", scores.chrf(outputs, references)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("tokenizer", ["13a", "intl", "zh", "char", "none"])
def test_bleu_is_sacrebleus_with_each_of_its_tokenizers(tokenizer):
    outputs, references = (
        ["今天天气很好，我们去公园。", "The cat, sat on the mat."],
        ["今天天气不错，我们去了公园。", "The cat sat on a mat."],
    )
    expected = sacrebleu.corpus_bleu(outputs, [references], tokenize=tokenizer).score
    bleu = corpus_value("bleu", scores.bleu(outputs, [[text] for text in references], tokenizer))
    assert bleu == pytest.approx(expected, abs=1e-9)


@given(st.text("abc", max_size=14), st.text("abc", max_size=14))
def test_edits_are_those_of_the_table(ours, theirs):
    row = list(range(len(theirs) + 1))
    for number, a in enumerate(ours, 1):
        before, row = row, [number]
        for place, b in enumerate(theirs, 1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (a != b)))
    assert scores.edits(ours, theirs) == row[-1]


def test_error_rates_and_exact_matches_by_hand():
    rows = scores.cer(["kitten ", "cafe\u0301", ""], [["sitting", "mitten"], ["café"], ["abcd"]])
    assert rows == [[1, 6], [0, 4], [4, 4]]
    assert corpus_value("cer", rows) == pytest.approx(100 * 5 / 14)
    assert scores.exact_match([" yes\n", "no", ""], [["no", "yes"], ["No"], ["x"]]) == [[100], [0], [0]]


@pytest.mark.parametrize("reference", ["", " \n", "\U0001f600"])
def test_a_reference_without_a_token_is_missing(reference):
    """An emoji is a token to BLEU and a character to chrF, but no letter."""
    samples = scores.score_texts(sorted(COMPARED), ["a cat", "a cat"], [[reference], ["a cat"]], Tokenizers("words", "13a"))
    for metric, (first, second) in samples.items():
        if reference.strip() and not metric.startswith("rouge"):
            assert isinstance(first, list)
        else:
            assert first is Missing.UNSEEN, metric
            assert (quality(metric, [first, second]).missing, quality(metric, [first]).value) == (1, None)
        assert isinstance(second, list)


def test_outputs_that_are_all_empty_score_nothing():
    samples = scores.score_texts(sorted(COMPARED), [""] * 3, [["a cat"]] * 3, Tokenizers("words", "13a"))
    values = {metric: corpus_value(metric, rows) for metric, rows in samples.items()}
    assert values.pop("cer") == 100
    assert set(values.values()) == {0}


def test_likelihoods_that_make_no_perplexity_are_missing():
    rows = [Likelihood(*row) for row in ([7.0, 2.0], [math.nan, 3.0], [math.inf, 3.0], [0.0, 0.0], [3000.0, 4.0])]
    perplexity = quality("perplexity", scores.perplexity(rows))
    assert perplexity.samples == [[7.0, 2.0], Missing.NAN, Missing.INFINITE, Missing.UNPREDICTED, Missing.INFINITE]
    assert (perplexity.value, perplexity.missing) == (pytest.approx(math.exp(3.5)), 4)
    none = quality("perplexity", scores.perplexity(rows[2:3]))
    assert (none.value, none.reason) == (None, "none: infinite in 1 of 1 examples")


def test_divergence_is_a_mean_over_tokens_with_the_first_ones_apart():
    rows = [Likelihood(9, 4, 2.0, 3, 1.4), Likelihood(9, 1, 0.5, 0, 0.5), Likelihood(), Likelihood(9, 3, math.inf, 3, 0.1)]
    divergences = {metric: quality(metric, samples) for metric, samples in scores.divergence(rows).items()}
    assert {metric: divergence.value for metric, divergence in divergences.items()} == {
        "divergence": pytest.approx(2.5 / 5),
        "equal_top": pytest.approx(100 * 6 / 8),
        "divergence_first": pytest.approx(2.0 / 3),
        "divergence_rest": pytest.approx(0.6 / 3),
    }
    assert divergences["divergence"].samples[2:] == [Missing.UNPREDICTED, Missing.INFINITE]
    assert divergences["divergence_rest"].samples[1:] == [Missing.UNPREDICTED, Missing.UNPREDICTED, Missing.INFINITE]


def test_a_label_from_scores_that_are_no_numbers_is_missing():
    samples = scores.labels([0, None], [0, 1], 2)
    assert samples["accuracy"] == [[100], Missing.NAN]
    assert samples["f1"][1] is Missing.NAN
