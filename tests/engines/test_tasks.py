"""A task of lm_eval with data of its own, against likelihoods by plain transformers."""

import json

import pytest
import torch

from compress.engines.transformers.tasks import evaluate
from compress.errors import DataError
from compress.metrics import METRICS
from compress.model.loading import Bundle
from compress.model.source import Source

CHOICES = ["dog ran", "red hat", "mat"]


@pytest.mark.slow
def test_scores_are_an_examples_each_and_those_of_the_likeliest_choice(toys, tmp_path):
    rows = [{"said": text, "right": n % 3} for n, text in enumerate(["the cat sat", "a big dog", "the", "blue hat on it", "was it", "in"])]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{said}}", "doc_to_choice": CHOICES, "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    bundle = Bundle(Source(str(toys["gpt2"]), "causal-lm", "float32"), "cpu")
    model, words = bundle.model, bundle.tokenizer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    samples, remarks = evaluate(model, words, task, 5)
    expected = []
    for row in rows[:5]:
        sums = []
        for choice in CHOICES:
            prompt_ids = words(row["said"], add_special_tokens=False)["input_ids"]
            ids = prompt_ids + words(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                told = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(told[place - 1, ids[place]].item() for place in range(len(prompt_ids), len(ids))))
        expected.append([100.0 * (sums.index(max(sums)) == row["right"])])
    assert samples == {"lm_eval:toy:acc": expected}
    assert len({score for (score,) in expected}) == 2, "some right, some wrong"
    assert remarks == []
    assert (METRICS["lm_eval:toy:acc"].unit, METRICS["lm_eval:toy:acc"].better) == ("points", "higher")
    with pytest.raises(DataError, match="lm_eval has no task 'mmluu'; near it are mmlu"):
        evaluate(model, words, "mmluu", None)
