"""Training that looks at the validation split, keeps its best weights and ends when nothing gets better; and the curve it leaves."""

import copy
from dataclasses import replace

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from compress import artifacts, recipe, stage
from compress.errors import DataError, RecipeError, RunError
from compress.execution import Execution
from compress.methods import Context
from compress.model.source import Source
from compress.training.material import Batch
from tests.blocks import bundle, examples
from tests.conftest import recipe_for
from tests.finetune.loops import calm, lost, tune
from tests.test_training import Here, Killed, often, until  # noqa: F401

STEPS = {"batch_size": 2, "learning_rate": 2e-2, "schedule": "constant", "warmup": 0}
OTHERS = examples(10)[6:]
# what was learned, answered otherwise: sooner or later it gets worse
CONTRARY = [replace(example, references=examples()[number - 3].references) for number, example in enumerate(examples()[:4])]


def watched(bundled, told, method="full", **stopping):
    """The model after training that looks at OTHERS."""
    return tune(bundled, method, told, steps=24, early_stopping=stopping, **STEPS)


def seen(scratch=None, kill=None, steps=None):
    return Context("cpu", until(kill, [] if steps is None else steps), examples(), 32, scratch=scratch, validation=OTHERS)


def looks(told):
    return {point["step"]: point["validation"] for point in told.curve if point["validation"] is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_best_weights_are_kept_and_training_ends_after_patience(tmp_path, kind):
    told, folder = replace(seen(), validation=CONTRARY), calm(kind, tmp_path)
    model = watched(bundle(folder, kind), told, every=2, patience=3)
    values = looks(told)
    best = min(values, key=values.get)
    assert 2 <= best <= 16, f"it gets worse, so the last weights aren't the best: {values}"
    assert list(values) == list(range(2, best + 7, 2)), "three looks behind the best"
    assert told.said[-1].startswith("loss on 4 examples of the validation split was best after")
    assert f"best after {best} steps, {values[best]:.4g}, and those weights were kept; ended {24 - best - 6} steps early" in told.said[-1]
    as_long = tune(bundle(folder, kind), "full", Context("cpu", until(None, []), examples(), 32), steps=best, **STEPS)
    assert all(torch.equal(weight, other) for weight, other in zip(model.state_dict().values(), as_long.state_dict().values(), strict=True))
    exact = copy.deepcopy(model).double()
    sums = [lost(exact, bundle(folder, kind).tokenizer, example) for example in CONTRARY]
    assert values[best] == pytest.approx(sum(loss for loss, _ in sums).item() / sum(count for _, count in sums), rel=1e-5)


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_rouge_is_of_what_the_model_writes_greedily(tmp_path, kind):
    told, bundled = seen(), bundle(calm(kind, tmp_path), kind)
    model = watched(bundled, told, metric="rougeL", every=6, patience=9, samples=4)
    values = looks(told)
    assert list(values) == [6, 12, 18, 24]
    assert max(values.values()) > 0
    best, scorer, scores = max(values.values()), RougeScorer(["rougeL"], use_stemmer=True), []
    end = bundled.tokenizer.eos_token_id
    most = 1 + max(len(bundled.tokenizer(example.references[0], add_special_tokens=False).input_ids) for example in OTHERS)
    for example in OTHERS:
        ids = bundled.tokenizer(example.prompt, add_special_tokens=False).input_ids
        prompt = torch.tensor([[*ids, end] if kind == "bart" else ids])
        text = model.generate(prompt, max_new_tokens=most, do_sample=False, pad_token_id=0)[0, 1 if kind == "bart" else len(ids) :]
        scores.append(scorer.score(example.references[0], bundled.tokenizer.decode(text, skip_special_tokens=True))["rougeL"].fmeasure)
    assert best == pytest.approx(100 * sum(scores) / len(scores), rel=1e-6)


@pytest.mark.parametrize("kill", [5, 9, 12])
def test_a_killed_training_remembers_what_it_saw(tmp_path, often, kill):  # noqa: F811
    told, folder, scratch = seen(), calm("llama", tmp_path), tmp_path / "scratch"
    whole = watched(bundle(folder, "llama"), told, every=3, patience=2)
    ended = max(looks(told))
    assert kill <= ended < 24, "or there is nothing to remember"
    with pytest.raises(Killed):
        watched(bundle(folder, "llama"), seen(scratch, kill), every=3, patience=2)
    steps: list = []
    again = seen(scratch, None, steps)
    model = watched(bundle(folder, "llama"), again, every=3, patience=2)
    assert steps == list(range(kill, ended + 1))
    assert again.said == told.said
    assert again.curve == told.curve
    assert all(torch.equal(weight, other) for weight, other in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    assert len(list(scratch.glob("best-*"))) == 1, "what is no longer needed goes"


def test_looks_are_twenty_where_nothing_is_said(toys):
    told = seen()
    tune(bundle(toys["llama"], "llama"), "full", told, steps=40, early_stopping={"patience": 99}, **STEPS)
    assert list(looks(told)) == list(range(2, 41, 2))


def test_a_validation_split_without_targets_is_refused(toys):
    told = Context("cpu", until(None, []), examples(), 32)
    with pytest.raises(DataError, match="early_stopping: the validation split gives nothing to learn from"):
        watched(bundle(toys["llama"], "llama"), told)


def test_a_validation_loss_that_is_no_number_names_the_examples(toys, monkeypatch):
    plain = Batch.logits_of
    monkeypatch.setattr(Batch, "logits_of", lambda self, model: plain(self, model) * (1 if torch.is_grad_enabled() else float("nan")))
    with pytest.raises(RunError, match=r"early_stopping: the loss became nan on the examples 6, 7 of the validation split"):
        watched(bundle(toys["llama"], "llama"), seen(), every=2)


def test_the_pipeline_draws_the_validation_split_and_reports_the_curve(toys, rows, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "Child", Here)
    shown = []
    plain = stage.run
    monkeypatch.setattr(stage, "run", lambda progress, request: shown.append(request.shown) or plain(progress, request))
    stopping = {"samples": 3, "every": 2}
    data = recipe_for("llama", toys["llama"], rows)["data"] | {"splits": {"train": "train", "validation": "test", "evaluation": "test"}}
    stages = [{"finetune": "full", "steps": 4, "batch_size": 4, "early_stopping": stopping}]
    loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, data=data, stages=stages)))
    source = Source(str(toys["llama"]), "causal-lm", "float32")
    (record,) = artifacts.make(loaded, source, tmp_path / "out", Execution("cpu", tmp_path / "log"))
    assert len(shown[0].validation) == 3
    assert [point.step for point in record.curve if point.validation is not None] == [2, 4]
    assert [point.step for point in record.curve if point.loss is not None] == [1, 2, 3, 4]


@pytest.mark.parametrize(("kind", "splits", "metric", "expected"), [
    ("llama", {"train": "train", "evaluation": "test"}, "loss", r"early_stopping: data.splits names no split for validation"),
    ("bert", {"train": "train", "validation": "test", "evaluation": "test"}, "rougeL", r"metric: rougeL is for tasks that generate"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_refused_before_anything_is_loaded(toys, rows, write_recipe, kind, splits, metric, expected):
    data = recipe_for(kind, toys[kind], rows)["data"] | {"splits": splits}
    stages = [{"distill": "logits", "early_stopping": {"metric": metric}}]
    with pytest.raises(RecipeError, match=expected):
        recipe.load(write_recipe(recipe_for(kind, toys[kind], rows, data=data, stages=stages)))
