"""What is seen before any work: models, tasks, data files, fields, packages; each by file, line and key."""

import json
import re
import shutil

import pytest

from compress import artifacts, methods, pipeline, preflight, recipe
from compress.errors import DataError, InputError, MissingPackage, ModelError
from compress.execution import Execution
from tests.conftest import WORDS, recipe_for


@pytest.fixture
def loaded(toys, rows, write_recipe):
    def load(kind="llama", model=None, **changes):
        return recipe.load(write_recipe(recipe_for(kind, model or toys[kind], rows, **changes)))

    return load


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mistakes(loaded_recipe, **options):
    return [line.rpartition("/")[2] if line.count("/") == 1 else line for line in preflight.look(loaded_recipe, **options).mistakes]


def test_nothing_is_wrong_with_what_is_right(loaded, toys, rows):
    sight = preflight.look(loaded(stages=[{"quantize": "gptq", "group_size": -1}]))
    assert sight.mistakes == []
    assert sight.seen == [
        f"{toys['llama'].resolve()} (config and headers)",
        f"{rows}/test.jsonl (all 24 rows)",
        f"{rows}/train.jsonl (all 24 rows)",
    ]
    sight = preflight.look(loaded(model="someone/model", data={"source": "someone/rows", "prompt": "{a}", "target": "{b}"}))
    assert (sight.mistakes, sight.seen, sight.unseen) == ([], [], ["someone/model", "someone/rows"])
    sight.end()


def test_every_mistake_is_told_at_once_by_line_and_key(loaded, rows, tmp_path):
    wrong = loaded(
        model=tmp_path / "nowhere",
        data={"source": str(rows), "prompt": "{sad}", "target": "{short}", "where": {"lang": "de"}, "splits": {"evaluation": "test"}},
        stages=[{"quantize": "gptq"}],
    )
    place = f"{tmp_path / 'toy.yaml'}:"
    sight = preflight.look(wrong)
    assert sight.mistakes == [
        f"{place}3: model.id: model '{tmp_path / 'nowhere'}': there is no folder {tmp_path / 'nowhere'}",
        f"{place}8: data.prompt: {rows}/test.jsonl: the field 'sad' that the prompt names isn't there; the columns are id, said, short, label; did you mean 'said'?",
        f"{place}10: data.where: {rows}/test.jsonl: the field 'lang' that data.where names isn't there; the columns are id, said, short, label",
        f"{place}12: data.splits: names no split for train, which a stage needs; it has evaluation",
    ]
    with pytest.raises(InputError) as caught:
        pipeline.refuse(wrong, "cpu", 1)
    assert str(caught.value) == "\n".join(sight.mistakes)


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("llama", "seq2seq", "names LlamaForCausalLM, which is for task causal-lm, not for seq2seq"),
        ("llama", "sequence-classification", "names LlamaForCausalLM, which is for task causal-lm, not for sequence-classification"),
        ("t5", "causal-lm", "names T5ForConditionalGeneration, which is for task seq2seq, not for causal-lm"),
        ("bart", "sequence-classification", "names BartForConditionalGeneration, which is for task seq2seq, not for"),
        ("gpt2", "seq2seq", "names GPT2LMHeadModel, which is for task causal-lm, not for seq2seq"),
        ("bert", "causal-lm", "names BertForSequenceClassification, which is for task sequence-classification, not for causal-lm"),
    ],
)
def test_a_task_that_the_model_is_not_for(toys, kind, task, message):
    assert message in preflight.task_problem(json.loads((toys[kind] / "config.json").read_text()), task)


def test_every_model_is_for_its_task(toys):
    from tests.conftest import TASKS

    for kind, folder in toys.items():
        assert preflight.task_problem(json.loads((folder / "config.json").read_text()), TASKS[kind]) is None
    for names, both, task in [
        (["T5WithLMHeadModel"], True, "seq2seq"), (["Gemma3ForConditionalGeneration"], None, "causal-lm"), ([], None, "seq2seq"),
        (["MBartForSequenceClassification"], True, "sequence-classification"), (None, None, "sequence-classification"),
    ]:  # fmt: skip
        assert preflight.task_problem({"architectures": names, "is_encoder_decoder": both}, task) is None
    assert "no head that classifies" in preflight.task_problem({"architectures": ["BertForMaskedLM"]}, "sequence-classification")


def test_a_wrong_task_is_the_key_task_and_of_a_teacher_its_stage(loaded, toys):
    wrong = loaded("llama", toys["bert"], stages=[{"distill": "logits", "teacher": {"id": str(toys["t5"])}}])
    first, second = preflight.look(wrong).mistakes
    assert "toy.yaml:4: model.task: " in first and "BertForSequenceClassification" in first
    assert ": stages[0].teacher: " in second and "T5ForConditionalGeneration" in second
    with pytest.raises(ModelError):
        preflight.look(wrong).end()


def test_chat_without_a_template(loaded, toys, tmp_path):
    folder = tmp_path / "chatty"
    shutil.copytree(toys["llama"], folder)
    data = {
        **recipe_for("llama", folder, tmp_path)["data"],
        "source": str(write(tmp_path / "d", "test.jsonl", [{"said": "a", "short": "b"}])),
        "chat": True,
    }
    assert "data.chat: the model's tokenizer has no chat template" in preflight.look(loaded(model=folder, data=data)).mistakes[0]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert preflight.look(loaded(model=folder, data=data)).mistakes == []


def test_packages_that_are_absent(loaded, monkeypatch):
    monkeypatch.setattr(methods, "lacking", list)
    wrong = loaded(stages=[{"quantize": "bnb_nf4"}])
    (line,) = preflight.look(wrong).mistakes
    assert "stages[0].quantize: quantize: bnb_nf4 needs bitsandbytes, not installed here. Install with: pip install 'bitsandbytes>=" in line
    assert preflight.look(wrong, stages=False).mistakes == [], "of no use where another model is only measured"
    with pytest.raises(MissingPackage):
        preflight.look(wrong).end()


def test_a_million_rows_are_looked_at_from_their_two_ends(loaded, tmp_path, rows):
    line = json.dumps({"said": " ".join(WORDS), "short": "a"}) + "\n"
    (tmp_path / "test.jsonl").write_text(line * 100_000 + '{"said": "b", "sh')
    wrong = loaded(data={"source": str(tmp_path / "test.jsonl"), "prompt": "{said}", "target": "{short}"})
    assert preflight.look(wrong).mistakes[0].endswith("test.jsonl: its last line: not JSON: Unterminated string starting at")
    (tmp_path / "test.jsonl").write_text(line * 100_000)
    assert preflight.look(wrong).seen[-1].endswith("test.jsonl (the first 200 rows)")


def test_cells_of_another_kind_and_empty_files(loaded, tmp_path):
    for row, message in [
        ([{"said": ["a"], "short": "b"}], "row 1: the field 'said' that the prompt names holds list"),
        ([], "has no rows"),
    ]:
        folder = write(tmp_path / "d", "test.jsonl", row)
        assert message in preflight.look(loaded(data={"source": str(folder), "prompt": "{said}", "target": "{short}"})).mistakes[0]


def test_a_mistake_in_the_last_row_that_is_used_shows_before_any_stage(loaded, tmp_path, monkeypatch):
    """The train split has it, far behind what `validate` looks at."""
    good = {"said": "a", "short": "b"}
    write(tmp_path / "d", "test.jsonl", [good] * 3)
    write(tmp_path / "d", "train.jsonl", [*[good] * 400, {"said": {"no": "text"}, "short": "b"}])
    monkeypatch.setattr(artifacts, "_make_one", lambda *_: pytest.fail("a stage began"))
    wrong = loaded(
        data={"source": str(tmp_path / "d"), "prompt": "{said}", "target": "{short}"},
        stages=[{"quantize": "cast"}, {"finetune": "full", "steps": 1}],
    )
    assert preflight.look(wrong).mistakes == []
    with pytest.raises(DataError, match=r"train\.jsonl, row 401: the field 'said' that the prompt names holds dict"):
        pipeline.prepare(wrong, tmp_path / "out", Execution("cpu"))


def test_data_that_changes_under_way_is_said_and_what_was_read_counts(loaded, tmp_path, monkeypatch):
    folder = write(tmp_path / "d", "test.jsonl", [{"said": "a", "short": "b"}] * 3)
    write(folder, "train.jsonl", [{"said": "c", "short": "d"}] * 3)
    shown = []

    def make(stage, source, models, seen, target, *_):
        shown.append([example.prompt for example in seen.examples])
        write(folder, "test.jsonl", [{"said": "other", "short": "b"}] * 3)
        write(folder, "train.jsonl", [{"said": "other", "short": "b"}] * 3)
        target.mkdir(parents=True)

    monkeypatch.setattr(artifacts, "_make_one", make)
    stages = [{"prune": "wanda", "sparsity": 0.5}, {"quantize": "gptq", "group_size": -1}]
    prepared = pipeline.prepare(
        loaded(data={"source": str(folder), "prompt": "{said}", "target": "{short}"}, stages=stages), tmp_path / "out", Execution("cpu")
    )
    assert shown == [["c"] * 3] * 2
    assert [example.prompt for example in prepared.examples] == ["a"] * 3
    from compress.data import compared
    from compress.report.quality import left_out

    remark = "has changed since it was read, before the first stage; all figures are of what it was then."
    assert left_out(compared(prepared.splits)) == [f"test.jsonl {remark}", f"train.jsonl {remark}"]


def test_layers_that_do_not_fit_a_format_show_before_any_work(loaded):
    """The toy Llama has layers of 172 columns, which blocks of 32 don't divide."""
    stages = [{"quantize": "rtn", "bits": 8, "group_size": -1, "symmetric": True}]
    reason = "layers of 172 columns don't fit its blocks of 32; name them under ignore of `quantize: rtn`"
    assert any(reason in line for line in preflight.look(loaded(stages=stages, engine="llama_cpp")).mistakes)
    assert any(reason in line for line in preflight.look(loaded(stages=[*stages, {"export": "gguf"}], engine="llama_cpp")).mistakes)
    assert preflight.look(loaded(stages=stages, engine="ctranslate2")).mistakes == []


def test_what_reads_an_artifact_is_wanted_where_transformers_has_to(loaded, monkeypatch):
    monkeypatch.setattr(preflight, "lacking", list)
    (mistake,) = preflight.look(loaded(stages=[{"quantize": "rtn", "format": "gptq"}])).mistakes
    assert re.search(
        r"transformers reads its artifact by gptqmodel, optimum, not installed here; .*install with: pip install 'gptqmodel", mistake
    )
    assert preflight.look(loaded(engine="fake", stages=[{"quantize": "rtn", "format": "gptq"}])).mistakes == []
    carried = [{"quantize": "rtn", "format": "gptq", "group_size": 32, "ignore": ["re:.*down_proj", "lm_head"]}, {"export": "onnx"}]
    assert not [line for line in preflight.look(loaded(engine="onnxruntime", stages=carried)).mistakes if "transformers reads" in line]
