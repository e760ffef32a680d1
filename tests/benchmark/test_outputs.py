"""Outputs that are kept: by what they are named, that they are whole or made anew, that a second run takes them."""

import shutil
import time
from collections import Counter
from dataclasses import replace

import pytest

import compress
from compress import phases, recipe
from compress.benchmark import outputs
from compress.benchmark.messages import Loaded, Outputs
from compress.engines import Traits, Weights
from compress.methods import Example
from compress.metrics import Missing
from compress.model.source import Source
from compress.results.report import read_report
from tests.conftest import recipe_for

MACHINE = dict.fromkeys(outputs.MACHINE, "x")
MADE = Outputs({"rougeL": [[1.0], [0.1 + 0.2], Missing.NAN]}, ["a", "é", ""], remarks=["something"])


def test_they_are_named_by_all_that_they_depend_on(toys, rows, write_recipe, tmp_path, monkeypatch):
    def name(source=None, machine=MACHINE, changed=0, prompt="one", original=None, **changes):
        traits = Traits("float32", 64, 64, encodes=False, generates=True, changed={"cpu_int8": changed, "sparse_24": 0})
        told = Loaded(traits, Weights(1, 0, 1), 1, {}, 0, 0, False, {**machine, "threads": 7})
        loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, **changes)))
        return outputs.name(
            source or Source(str(toys["llama"]), "causal-lm", "float32"), loaded, [Example("0", prompt, ["two"])], told, original
        )

    first = name()
    copy = tmp_path / "moved"
    shutil.copytree(toys["llama"], copy)
    same = {name(), name(Source(str(copy), "causal-lm", "float32")), name(check={"rougeL": {"max_drop": 1.0}})}
    same.add(name(stages=[{"quantize": "cast"}]))
    same.add(name(benchmark={"rounds": 9, "threads": 1}))
    same.add(name(benchmark={"runtime": {"cpu_int8": True}}))  # which changed no layer of it
    same.add(name(benchmark={"runtime": {"cache": "static", "compile": True}}))  # of timed generations
    assert same == {first}, "the place, the stages, gates and timings don't count"
    others = {
        name(prompt="other"), name(generation={"max_new_tokens": 9}), name(generation={"max_new_tokens": 8, "seed": 1}),
        name(Source(str(toys["llama"]), "causal-lm", "bfloat16")), name(machine={**MACHINE, "cores": 2}), name(changed=3), name(metrics=["bleu"]),
    }  # fmt: skip
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    others.add(name(Source(str(copy), "causal-lm", "float32")))
    others |= {name(metrics=["divergence"], original=Source(str(folder), "causal-lm", "float32")) for folder in (toys["llama"], copy)}
    monkeypatch.setattr(outputs, "versions", lambda names: dict.fromkeys(names, "0"))
    others.add(name())
    assert len(others | {first}) == 12


@pytest.mark.parametrize("harm", ["", "{}", "[]", "cut short", "changed"])
def test_a_damaged_file_is_put_away(tmp_path, harm):
    outputs.keep(tmp_path, "abc", MADE)
    kept = outputs.find(tmp_path, "abc")
    assert kept == replace(MADE, remarks=["outputs and scores were taken from a former run (abc)", "something"])
    file = tmp_path / "abc" / "outputs.json"
    whole = file.read_text()
    file.write_text({"cut short": whole[:-20], "changed": whole.replace("[1.0]", "[2.0]")}.get(harm, harm))
    assert outputs.find(tmp_path, "abc") is None
    outputs.keep(tmp_path, "abc", MADE)
    assert outputs.find(tmp_path, "abc") == kept


@pytest.mark.slow
def test_a_second_run_takes_them_and_says_so(toys, rows, write_recipe, tmp_path):
    data = {"source": str(rows), "prompt": "{said}", "target": "{short}", "shots": 1}
    file = write_recipe(recipe_for("t5", toys["t5"], rows, data=data))
    began = time.monotonic()
    first = compress.bench(str(toys["t5"]), file, tmp_path / "out", device="cpu")
    took = time.monotonic() - began
    again = compress.bench(str(toys["t5"]), file, tmp_path / "out", device="cpu")
    (kept,) = (tmp_path / "out" / "artifacts" / "outputs").glob("*/outputs.json")
    (remark,) = first.candidate.said
    assert remark.startswith("4 examples were done once more, each alone: ")
    assert again.candidate.said == [f"outputs and scores were taken from a former run ({kept.parent.name})", remark]
    assert f"Candidate: {remark}." in again.notes
    assert first.predictions == again.predictions
    figures = [{m.label: m for m in report.candidate.measurements} for report in (first, again)]
    assert figures[0]["rougeL"] == figures[1]["rougeL"]
    timed = "latency_p50 [batch 1, prompt 8]"
    assert figures[0][timed].raw != figures[1][timed].raw, "times are never kept"
    spent = Counter[str]()
    for phase in first.phases:
        spent[phase.name] += phase.seconds
    assert {"imports", "loading", "warming up", "generating", "timing", "looking at steps", "report"} <= set(spent)
    assert spent.total() == pytest.approx(took, rel=0.05), "phases add up to the whole"
    assert spent[phases.REST] < 0.05 * took
    assert "generating" not in {phase.name for phase in again.phases}
    assert again.folder.joinpath("report.md").read_text().count("## Time\n\n| phase | baseline | candidate | neither | in all |") == 1
    assert read_report(first.folder).phases == first.phases
