"""Distillation as a stage of a recipe: who teaches whom, what names the artifact, what is refused before anything is loaded."""

import json
import shutil

import pytest

from compress import artifacts, pipeline, recipe
from compress.distill import _pair
from compress.errors import ModelError, RecipeError
from compress.execution import Execution
from compress.model.loading import load_model, load_tokenizer
from compress.model.source import Source
from tests.conftest import recipe_for
from tests.test_pipeline import name_of
from tests.test_training import Here

QUICK = {"steps": 1, "batch_size": 4}


@pytest.fixture
def run_stages(toys, rows, write_recipe, tmp_path, monkeypatch):
    """Runs stages on the toy Llama; the records, and teacher and student as they were loaded."""
    monkeypatch.setattr(artifacts, "Child", Here)
    pairs, plain = [], _pair.pair
    monkeypatch.setattr(_pair, "pair", lambda *arguments: pairs.append(plain(*arguments)) or pairs[-1])
    source = Source(str(toys["llama"]), "causal-lm", "float32")

    def make(*stages):
        loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=list(stages))))
        return artifacts.make(loaded, source, tmp_path / "artifacts", Execution("cpu", tmp_path / "log")), pairs

    return make


def test_what_pruning_left_learns_from_the_recipes_own_model(run_stages, toys):
    records, ((teacher, student),) = run_stages({"prune": "depth", "drop": 1}, {"distill": "logits", **QUICK})
    assert teacher.source == Source(str(toys["llama"]), "causal-lm", "float32")
    assert (teacher.model.config.num_hidden_layers, student.model.config.num_hidden_layers) == (2, 1)
    assert load_model(Source(records[-1].artifact, "causal-lm"), "cpu").config.num_hidden_layers == 1


def test_teacher_and_student_lie_beside_the_recipe(run_stages, toys, tmp_path):
    for name in ("big", "little"):
        shutil.copytree(toys["llama"], tmp_path / name)
    stage = {"distill": "logits", "teacher": {"id": "./big", "dtype": "bfloat16", "bits": 8}, "student": {"id": "little"}, **QUICK}
    _, ((teacher, student),) = run_stages(stage)
    assert (teacher.source.id, student.source.id) == (str(tmp_path / "big"), str(tmp_path / "little"))
    assert str(teacher.model.dtype) == "torch.bfloat16"
    assert str(teacher.model.model.layers[0].mlp.up_proj.weight.dtype) == "torch.int8"


def test_a_student_with_fresh_weights_is_an_ordinary_model(run_stages):
    (record,), _ = run_stages({"distill": "hidden", "student": {"config": {"hidden_size": 32, "num_hidden_layers": 1}}, **QUICK})
    model = load_model(Source(record.artifact, "causal-lm"), "cpu")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 1)
    load_tokenizer(Source(record.artifact, "causal-lm"))
    assert record.said


def test_the_other_models_name_the_artifact(toys, rows, write_recipe, tmp_path, monkeypatch):
    teacher, moved = tmp_path / "teacher", tmp_path / "moved"
    shutil.copytree(toys["llama"], teacher)
    shutil.copytree(toys["llama"], moved)

    def name(**settings):
        loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=[{"distill": "logits", **settings}])))
        return name_of(monkeypatch, loaded, Source(str(toys["llama"]), "causal-lm", "float32"), tmp_path)

    before = name(teacher={"id": str(teacher)})
    assert name(teacher={"id": str(teacher)}) == before
    names = {before, name(student={"id": str(teacher)}), name(teacher={"id": str(teacher), "dtype": "bfloat16"})}
    names.add(name(teacher={"id": str(teacher), "bits": 8}))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    names.add(name(teacher={"id": str(teacher)}))
    assert len(names) == 5


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("llama", "logits", "teacher and student would be the same model"),
        ("llama", "on_policy", "teacher and student would be the same model"),
        ("bert", "sequence", "sequence is for task seq2seq and causal-lm, not for sequence-classification"),
        ("bert", "on_policy", "on_policy is for task seq2seq and causal-lm, not for sequence-classification"),
        ("bert", "universal", "universal is for task seq2seq and causal-lm, not for sequence-classification"),
    ],
)
def test_what_can_teach_nothing_is_refused_with_the_recipe(toys, rows, write_recipe, kind, method, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(write_recipe(recipe_for(kind, toys[kind], rows, stages=[{"distill": method}])))


def test_a_model_may_learn_what_it_writes_itself(toys, rows, write_recipe):
    recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=[{"distill": "sequence"}])))


def test_a_teacher_that_is_not_there_is_refused_before_anything_is_done(toys, rows, write_recipe, tmp_path):
    stages = [{"prune": "depth", "drop": 1}, {"distill": "logits", "teacher": {"id": "./nowhere"}}]
    path = write_recipe(recipe_for("llama", toys["llama"], rows, stages=stages))
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere"):
        pipeline.run(path, tmp_path / "reports", "cpu")
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": {"name": "x"}}, "unknown key 'name'"),
        ({"student": {"id": ""}}, r"student\.id: is empty"),
        ({"divergence": "forwards"}, "did you mean 'forward'"),
        ({"temperature": 0}, r"temperature: 0 is less than 0\.01"),
    ],
)
def test_mistakes_are_named_where_they_stand(toys, rows, write_recipe, settings, message):
    path = write_recipe(recipe_for("llama", toys["llama"], rows, stages=[{"distill": "logits", **settings}]))
    with pytest.raises(RecipeError, match=message):
        recipe.load(path)
