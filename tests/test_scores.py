"""The scoring path against a worked example and against the definitions."""

import pytest

from compress import scores
from compress.benchmark.statistics import corpus_value

CANDIDATE, REFERENCE = "the cat sat on the big red mat", "the cat sat on the mat"


def test_the_worked_example():
    found = {name: rows[0][0] / 100 for name, rows in scores.rouge([CANDIDATE], [[REFERENCE]]).items()}
    assert (found["rouge1_recall"], found["rouge1_precision"], found["rouge1"]) == pytest.approx((1.0, 6 / 8, 6 / 7))
    assert (found["rouge2_recall"], found["rouge2_precision"], found["rouge2"]) == pytest.approx((4 / 5, 4 / 7, 2 / 3))
    assert found["rougeL"] == pytest.approx(6 / 7)


def test_the_best_of_several_references_counts():
    one = scores.rouge([CANDIDATE], [[REFERENCE]])
    many = scores.rouge([CANDIDATE], [["nothing alike", REFERENCE, "the mat"]])
    assert many["rouge1"] == one["rouge1"]


def test_rouge_lsum_takes_sentences_one_by_one():
    # the same two sentences in the other order: the longest common subsequence breaks, sentence by sentence nothing is lost
    found = scores.rouge(["Dogs bark loudly. Cats sleep all day."], [["Cats sleep all day. Dogs bark loudly."]])
    assert found["rougeLsum"][0][0] == pytest.approx(100)
    assert found["rougeL"][0][0] == pytest.approx(100 * 4 / 7)


def test_stemming_is_on():
    assert scores.rouge(["cats running"], [["cat runs"]])["rouge1"][0][0] == pytest.approx(100)


def test_an_empty_output_scores_zero():
    found = scores.score_texts(["rouge", "bleu"], [""], [["a cat"]])
    assert corpus_value("rougeL", found["rougeL"]) == 0
    assert corpus_value("bleu", found["bleu"]) == 0


def test_labels_count_as_accuracy_and_f1():
    found = scores.labels([0, 1, 1, 1], [0, 0, 1, 1], 2)
    assert corpus_value("accuracy", found["accuracy"]) == 75
    assert corpus_value("f1", found["f1"]) == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)  # as scikit-learn's macro average
