"""The card of an artifact: what it says, what it keeps to itself, and that nothing else changes with it."""

import re
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from compress import recipe
from compress.model.folder import CARD, check_folder
from compress.model.source import Source, fingerprint
from compress.report import card
from compress.results.stages import StageRecord
from tests.conftest import TASKS, recipe_for
from tests.report.test_files import made

BASE = "---\nlicense: other\nlicense_name: toy-1.0\nlicense_link: LICENSE\nlanguage: en\nbase_model: someone/toy-base\n---\nA toy.\n"


@pytest.fixture
def run(toys, rows, write_recipe, tmp_path):
    """A recipe over a copy of a toy and the record of its stage, whose artifact is another copy."""

    def run(kind="t5", folder="my models/toy", stages=None, **changes):
        base, artifact = tmp_path / folder, tmp_path / "artifacts" / f"toy-{len(list(tmp_path.iterdir()))}"
        if not base.exists():
            shutil.copytree(toys[kind], base)
        shutil.copytree(toys[kind], artifact)
        stages = stages or [{"quantize": "int8_dynamic"}]
        loaded = recipe.load(write_recipe(recipe_for(kind, base, rows, stages=stages, **changes)))
        record = StageRecord(
            stage=loaded.stages[0].as_written(), artifact=str(artifact), seconds=1, reused=False, said=[f"kept in {tmp_path}/x/teachers"]
        )
        return loaded, Source(str(base), TASKS[kind], "float32"), [record]

    return run


def read(records):
    return ModelCard.load(Path(records[-1].artifact) / CARD)


def measured(loaded, **changes):
    settings = {**loaded.as_written(), "benchmark": {"confidence": 0.95}, "check": {}}
    return made(settings=settings, environment={"device": "cpu", "cpu": "Abacus 3", "threads": 2}, **changes)


def test_it_is_there_without_figures_and_gets_them(run):
    loaded, source, records = run()
    card.write(loaded, source, records)
    first = read(records)
    assert "Not measured yet" in first.text and "| rougeL |" not in first.text
    card.write(loaded, source, records, measured(loaded, run="r1"))
    second = read(records)
    assert "| rougeL | 71.50 | 70.90 |" in second.text and "Measured on 2 examples of" in second.text and "Abacus 3" in second.text
    assert second.data.to_dict()[card.RUN] == "toy/r1"
    card.write(loaded, source, records)
    assert read(records).content == second.content, "a run that comes upon the artifact leaves what was measured"
    card.write(loaded, source, records, measured(loaded, run="r2", verdict="fail", decided_by="rougeL drop is 9"))
    assert "**FAIL**: rougeL drop is 9" in read(records).text


def test_it_says_what_was_done_and_whose_model_it_was(run):
    loaded, source, records = run("bert", stages=[{"prune": "magnitude", "sparsity": 0.3}])
    (Path(source.id) / CARD).write_text(BASE)
    card.write(loaded, source, records, measured(loaded))
    data, text = read(records).data, read(records).text
    assert (data.license, data.license_name, data.language, data.library_name) == ("other", "toy-1.0", "en", "transformers")
    assert data.pipeline_tag == "text-classification" and data.tags == ["compress", "magnitude"] and data.metrics == ["rouge"]
    assert data.base_model is None, "a folder has no name on the hub"
    assert data.license_link is None, "nor a file there"
    assert "by its card made from someone/toy-base | other, toy-1.0, LICENSE |" in text
    assert "sparsity: 0.3" in text and "    - prune: magnitude\n" in text


def test_what_nobody_states_is_not_made_up(run):
    loaded, source, records = run()
    card.write(loaded, source, records)
    assert not {"license", "base_model", "base_model_relation", "pipeline_tag", "model-index"} & read(records).data.to_dict().keys()
    assert "not stated" in read(records).text


@pytest.mark.parametrize("odd", ["license: [mit, other]\nlicense_link: 7", "license: {a: 1}\nlanguage: 3", "[", "- a"])
def test_an_odd_card_of_the_base_model_stops_nothing(run, odd):
    loaded, source, records = run()
    (Path(source.id) / CARD).write_text(f"---\n{odd}\n---\n")
    card.write(loaded, source, records, measured(loaded))
    assert "## How to load it" in read(records).text


def test_a_card_without_metadata_is_nothing_to_tell_a_person(run, capfd, caplog):
    loaded, source, records = run()
    (Path(source.id) / CARD).write_text("A toy.\n")
    card.write(loaded, source, records, measured(loaded))
    assert "## How to load it" in read(records).text
    assert not capfd.readouterr().err and not caplog.records


def test_a_base_model_on_the_hub_is_named(run, monkeypatch):
    loaded, _, records = run("llama", data={"source": "someone/texts", "prompt": "{said}", "target": "{short}"})
    monkeypatch.setattr(card.Origin, "card", {"license": "mit", "license_link": "LICENSE"})
    card.write(loaded, Source("someone/llama", "causal-lm", "float32", "c0ffee"), records, measured(loaded))
    data = read(records).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == (["someone/llama"], "quantized")
    assert data.license_link == "https://huggingface.co/someone/llama/blob/c0ffee/LICENSE"
    result = data.eval_results[0]
    assert (result.dataset_name, result.metric_type, result.metric_name, result.metric_value) == ("someone/texts", "rouge", "rougeL", 70.9)
    assert result.dataset_args["samples"] == 2
    assert "revision c0ffee" in read(records).text


def test_a_licence_that_models_do_not_share_is_left_to_the_reader(run, toys):
    stages = [{"distill": "logits", "teacher": {"id": str(toys["t5"])}}]
    loaded, source, records = run(stages=stages)
    (Path(source.id) / CARD).write_text(BASE)
    card.write(loaded, source, records)
    assert read(records).data.license is None
    assert re.search(r"\| teacher of distill: logits \| t5 \| .* \| not stated", read(records).text)


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_its_code_loads_the_model(run, kind, monkeypatch, capsys):
    loaded, source, records = run(kind)
    card.write(loaded, source, records)
    monkeypatch.chdir(records[0].artifact)
    exec(re.search(r"```python\n(.*?)```", read(records).text, re.DOTALL)[1])
    assert capsys.readouterr().out


def test_it_tells_no_folder_of_the_machine(run, tmp_path):
    loaded, source, records = run()
    broken = measured(loaded, verdict="cannot_tell", decided_by=f"not everything could be measured: {tmp_path}/artifacts/toy: damaged")
    card.write(loaded, source, records, broken)
    text = read(records).content
    assert str(tmp_path) not in text and "/tmp" not in text
    assert "not everything could be measured: toy: damaged" in text and "kept in teachers" in text and "id: toy\n" in text


def test_texts_of_others_stay_texts(run):
    wild = "Say <b>it</b>\n---\nlicense: mit\n---\n```\n\x1b[31m {said}"
    loaded, source, records = run(data={"source": "builtin", "prompt": wild, "target": "{short}"})
    card.write(loaded, source, records, measured(loaded, decided_by="<script>\u202ex</script>"))
    content = read(records).content
    assert "<script>" not in content and "\x1b" not in content and "\u202e" not in content
    assert read(records).data.license is None
    assert all(line.startswith("    ") for line in content.split("Defaults filled in.")[1].splitlines() if line)


def test_a_card_is_no_part_of_the_model_and_changes_at_once(run):
    loaded, source, records = run()
    artifact, seen, stop = Path(records[0].artifact), set(), threading.Event()
    before = fingerprint(Source(str(artifact), "seq2seq"))

    def read_on():
        while not stop.is_set():
            seen.update([(artifact / CARD).read_text()[-20:]] if (artifact / CARD).exists() else [])
            seen.add(str(fingerprint(Source(str(artifact), "seq2seq")) == before))

    reader = threading.Thread(target=read_on)
    reader.start()
    for number in range(20):
        card.write(loaded, source, records, measured(loaded, run=f"r{number}"))
    stop.set()
    reader.join()
    check_folder(artifact)
    assert "False" not in seen and "" not in seen
    assert [f.name for f in artifact.parent.iterdir()] == [artifact.name], "nothing is left beside it"


def test_a_card_that_can_not_be_written_loses_no_run(run):
    loaded, source, records = run()
    artifact = Path(records[0].artifact)
    (artifact / CARD).mkdir()
    card.write(loaded, source, records, measured(loaded))
    assert (artifact / CARD).is_dir() and [f.name for f in artifact.parent.iterdir()] == [artifact.name]
