"""A recipe foretold: from config.json alone, on a named GPU, and refused by name where it can't be."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import DeviceError, ModelError
from compress.forecast import machine
from compress.forecast.plan import plan, remarks
from compress.recipe import load
from tests.conftest import recipe_for
from tests.test_cli import program

LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip


@pytest.fixture
def seven(tmp_path, rows, write_recipe):
    """A recipe for a Llama of 6.7 billion weights, of which there is nothing but the config."""
    folder = tmp_path / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    data = recipe_for("llama", folder, rows, stages=[{"quantize": "bnb_nf4"}], benchmark="standard")
    data["model"]["dtype"] = "auto"
    return write_recipe(data)


def test_layers_that_a_group_size_does_not_divide_are_said_before_anything_is_loaded(seven, tmp_path):
    config = {**LLAMA_7B, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    (tmp_path / "seven" / "config.json").write_text(json.dumps(config))
    overrides = ["stages=[{quantize: rtn, group_size: 128}]"]
    notes = plan(load(seven, overrides), machine.named("t4-16gb")).said
    assert notes[:1] == remarks(load(seven, overrides)), "first"
    assert re.fullmatch(r"quantize: rtn: group_size 128 does not divide .*, in layers of 576 columns, have a scale a row.*", notes[0])
    assert "group_size is 64" in remarks(load(seven, ["stages=[{quantize: rtn}]"]))[0]
    assert remarks(load(seven, ["stages=[{quantize: rtn}]", "model.id=someone/model"])) == [], "of shapes that aren't known"
    assert remarks(load(seven, ["stages=[{quantize: rtn, group_size: 32}]"])) == remarks(load(seven)) == []


def test_a_config_is_enough(seven):
    forecast = plan(load(seven), machine.named("t4-16gb"))
    assert (forecast.architecture, forecast.dtype) == ("Llama", "FP16")
    assert forecast.parameters == pytest.approx(6.738e9, rel=0.001)
    by_dtype = {row.dtype: row for row in forecast.rows if (row.batch_size, row.prompt_tokens) == (1, 128)}
    assert by_dtype["FP16"].weights == pytest.approx(2 * 6.738e9, rel=0.001)
    assert by_dtype["INT4"].weights < 0.35 * by_dtype["FP16"].weights
    assert by_dtype["INT4"].held.activations == by_dtype["FP16"].held.activations
    assert "quantize: bnb_nf4 leaves INT4 in memory; what it doesn't pack stays FP16" in forecast.said
    # 2 x layers x heads x width x tokens x 2 bytes
    assert by_dtype["FP16"].held.cache == 2 * 32 * 32 * 128 * (128 + 32 - 1) * 2
    assert (by_dtype["FP32"].fits, by_dtype["FP16"].fits) == (False, True)
    assert forecast.disk_bytes == by_dtype["INT4"].weights
    faster = plan(load(seven), machine.named("h100-80gb"))
    assert all(row.fits for row in faster.rows)
    assert sum(faster.seconds.values()) < sum(forecast.seconds.values())
    calibrated = plan(load(seven, ["stages=[{quantize: gptq}]"]), machine.named("t4-16gb"))
    assert calibrated.seconds["quantize: gptq"] > 2 * forecast.seconds["quantize: bnb_nf4"], "which passes over no examples"
    stages = "stages=[{prune: depth, drop: 1}, {%s, samples: 9000}]"
    tuned, taught = (
        plan(load(seven, [stages % method]), machine.named("t4-16gb")).seconds[method] for method in ("finetune: full", "distill: logits")
    )
    assert taught / tuned == pytest.approx(4 / 3, rel=0.01), "of a step's passes one is the teacher's"


@pytest.mark.parametrize(
    ("stage", "dtypes", "note"),
    [
        (
            {"quantize": "rtn", "bits": 4},
            set(),
            "rtn: plain transformers unpacks the weights, which then take as much as FP32; only files are smaller",
        ),
        ({"quantize": "int8_dynamic"}, {"INT8"}, "quantize: int8_dynamic leaves INT8 in memory; what it doesn't pack stays FP32"),
        ({"quantize": "cast"}, set(), ""),
    ],
)
def test_rows_are_what_transformers_holds(toys, rows, write_recipe, stage, dtypes, note):
    """The foretold weights against those of the model that the stage makes, which is what is measured."""
    forecast = plan(load(write_recipe(recipe_for("gpt2", toys["gpt2"], rows, stages=[stage]))), machine.here(None))
    assert {row.dtype for row in forecast.rows} == {"FP32", "FP16", "BF16"} | dtypes
    assert note in " ".join(forecast.said)


def test_the_table_fits_80_and_120_columns(seven, monkeypatch):
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        done = program("plan", seven, "--gpu", "t4-16gb")
        assert done.returncode == 0, done.stderr
        assert max(map(len, done.stdout.splitlines())) <= columns
        assert sum(line.lstrip().startswith(("FP32", "FP16", "BF16", "INT8", "INT4")) for line in done.stdout.splitlines()) == 4 * 4
    printed = json.loads(program("plan", seven, "--gpu", "t4-16gb", "--json").stdout)
    assert {row["dtype"] for row in printed["rows"]} == {"FP32", "FP16", "BF16", "INT4"}
    assert printed["rows"][0]["peak"] == sum(printed["rows"][0]["held"].values())


def test_an_unknown_gpu_is_refused_by_name():
    with pytest.raises(DeviceError, match="--gpu h100: its memory and speed aren't known here; supported: t4-16gb"):
        machine.named("h100")


def test_this_machines_own_gpu_is_found(monkeypatch):
    told = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda number: number, nvmlDeviceGetName=lambda device: "NVIDIA H100 80GB HBM3",
        nvmlDeviceGetMemoryInfo=lambda device: types.SimpleNamespace(free=70 * 10**9),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", told)
    gpu = machine.here(None)
    assert (gpu.device, gpu.memory_bytes, gpu.bytes_per_s) == ("cuda", 70 * 10**9, 3350e9)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.here(1).device == "cpu"


def test_another_architecture_is_read_from_its_headers_or_refused(seven, tmp_path):
    folder = tmp_path / "seven"
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match=r"'mamba'.*With its safetensors in the folder their headers would be read"):
        plan(load(seven), machine.named("t4-16gb"))
    save_file(
        {"in_proj.weight": torch.ones(30, 20), "embed.weight": torch.ones(7, 20), "norm.weight": torch.ones(20)},
        folder / "model.safetensors",
    )
    forecast = plan(load(seven), machine.named("t4-16gb"))
    assert forecast.parameters == 600 + 140 + 20
    assert forecast.rows[0].held is None
    assert "'mamba' isn't known here" in forecast.said[0]


def test_no_config_is_said(seven, tmp_path):
    shutil.rmtree(tmp_path / "seven")
    done = program("plan", seven)
    assert done.returncode == 2
    assert "seven" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "seven").mkdir()
    (tmp_path / "seven" / "config.json").write_text("{")
    done = program("plan", seven)
    assert done.returncode == 2
    assert "config.json: can't be read" in done.stderr


def test_without_the_hub_the_way_out_is_said(rows, write_recipe):
    data = recipe_for("llama", "somebody/no-such-model", rows)
    data["model"]["id"] = "somebody/no-such-model"
    done = program("plan", write_recipe(data))
    assert done.returncode == 2
    assert "the hub does not answer" in done.stderr
