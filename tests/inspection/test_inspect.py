"""Looking at a model: counts against the files' own, planted zeros, shares, the table, the picture, and everything a person can type wrong."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import compress
from compress import held, terminal
from compress.cli import parser
from compress.errors import InputError, MissingPackage, ModelError
from compress.inspection import findings, measure, picture
from compress.inspection.findings import Inspection, Part, grouped
from compress.methods import quiet
from compress.model.loading import load_model, parameter_count, task_of
from compress.model.source import Source
from compress.report.numbers import count
from compress.requests import Inspect
from tests.conftest import TASKS, make_model, make_tokenizer
from tests.quantize.test_methods import make
from tests.test_cli import program

NEAR = ("zero", "below_hundredth", "below_tenth", "below_half")


def look(folder, task="", tokens=None) -> Inspection:
    answer = measure.inspect(quiet, Inspect(Source(str(folder), task), "cpu", 2, tokens))
    return Inspection.model_validate({"model": "toy", **json.loads(json.dumps(answer, allow_nan=False))})


def named(inspection: Inspection, name: str) -> Part:
    return next(part for part in inspection.parts if part.name == name)


def store(folder, changed):
    changed.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def looked(toys):
    return {kind: look(toys[kind]) for kind in TASKS}


@pytest.mark.parametrize("kind", TASKS)
def test_counts_are_those_of_the_file(toys, looked, kind):
    """The file holds every weight once, under the name of the module that has it first or another that shares it."""
    inspection, stored = looked[kind], load_file(toys[kind] / "model.safetensors")
    stored.pop("final_logits_bias", None)  # a buffer of BART's
    assert inspection.task == TASKS[kind], "told from the config"
    assert inspection.parameters == sum(part.parameters for part in inspection.parts) == sum(tensor.size for tensor in stored.values())
    loaded = load_model(Source(str(toys[kind]), TASKS[kind]), "cpu")
    assert inspection.bytes == sum(part.bytes for part in inspection.parts) == held.weight_bytes(loaded)
    linear = {part.name: part for part in inspection.parts if part.kind == "linear"}
    blocks = {"t5": 2 * 7 + 2 * 11, "bart": 2 * 6 + 2 * 10, "llama": 2 * 7, "gpt2": 2 * 4, "bert": 2 * 6 + 1}
    assert len(linear) == blocks[kind]
    for name, part in linear.items():
        weight = stored[f"{name}.weight"].astype(np.float64)
        own = weight.size + (stored[f"{name}.bias"].size if f"{name}.bias" in stored else 0)
        assert (part.parameters, part.bytes, part.weights, part.dtype) == (own, 4 * own, weight.size, "float32")
        rms = math.sqrt((weight**2).mean())
        assert part.rms == pytest.approx(rms, rel=1e-12)
        assert [part.zero, part.below_hundredth, part.below_tenth, part.below_half] == [
            (weight == 0).mean(), *((abs(weight) < bound * rms).mean() for bound in (0.01, 0.1, 0.5))
        ]  # fmt: skip
    heads = {"t5": "lm_head", "bart": "lm_head", "llama": "lm_head", "gpt2": "lm_head", "bert": "classifier"}
    assert [part.name for part in inspection.parts if part.kind == "head"] == [heads[kind]]


@pytest.mark.parametrize("kind", TASKS)
def test_shares_sum_to_one_and_stay_when_pooled(looked, kind):
    inspection = looked[kind]
    rows = [row for row, _ in grouped(inspection.parts)]
    for share in ("parameter_share", "byte_share", "time_share"):
        assert math.fsum(getattr(part, share) for part in inspection.parts) == pytest.approx(1, abs=1e-12)
        assert math.fsum(getattr(row, share) for row in rows) == pytest.approx(1, abs=1e-12)
        assert min(getattr(part, share) for part in inspection.parts) >= 0
    assert sum(row.parameters for row in rows) == inspection.parameters
    assert sum(row.weights for row in rows) == inspection.whole().weights
    assert inspection.parts[-1].kind == "rest"


@pytest.mark.parametrize(("kind", "owner"), [("bart", "model.shared"), ("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_tied_weights_are_counted_once_and_timed_where_they_are_used(looked, kind, owner):
    head = named(looked[kind], "lm_head")
    assert (head.parameters, head.bytes, head.weights, head.rms) == (0, 0, 0, None)
    assert head.remark == f"its weights are those of {owner}, and counted there"
    assert head.seconds > 0
    assert named(looked[kind], owner).parameters == 64 * 64


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A Llama with 11 zeros, 22 weights of 0.005, 33 of 0.05 and 44 of 0.3 among 11,008 of size 1 in one layer, and zeros only in another."""
    sown = make_model("llama")
    with torch.no_grad():
        sown.model.layers[1].mlp.down_proj.weight.zero_()
        weight = sown.model.layers[0].mlp.up_proj.weight.view(-1)
        weight.copy_(torch.ones(11008) - 2 * (torch.arange(11008) % 2))
        for size, first, last in ((0.0, 0, 11), (0.005, 11, 33), (0.05, 33, 66), (0.3, 66, 110)):
            weight[first:last] *= size
        sown.model.layers[0].mlp.gate_proj.weight[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    return store(tmp_path_factory.mktemp("planted") / "model", sown)


def test_planted_zeros_are_found_exactly(planted):
    inspection = look(planted)
    layer = named(inspection, "model.layers.0.mlp.up_proj")
    assert [getattr(layer, name) for name in NEAR] == [share / 11008 for share in (11, 33, 66, 110)]
    empty = named(inspection, "model.layers.1.mlp.down_proj")
    assert [empty.rms, *(getattr(empty, name) for name in NEAR)] == [0, 1, 1, 1, 1]
    sick = named(inspection, "model.layers.0.mlp.gate_proj")
    assert (sick.remark, sick.weights, sick.zero) == ("3 of its weights are NaN or infinite", 0, None)
    assert "model.layers.0.mlp.gate_proj: 3 of its weights are NaN or infinite" in inspection.remarks
    row = next(row for row, _ in grouped(inspection.parts) if row.name == "model.layers.*.mlp.up_proj (2 layers)")
    other = named(inspection, "model.layers.1.mlp.up_proj")
    assert row.below_half == pytest.approx((110 + other.below_half * 11008) / 22016, rel=1e-12)
    assert "are zero. Zeros alone buy no speed" in inspection.said[2]


def test_a_chunk_at_a_time_is_the_same(planted, monkeypatch):
    expected = [[getattr(part, name) for name in NEAR] for part in look(planted).parts]
    monkeypatch.setattr(measure, "CHUNK", 1000)
    assert [[getattr(part, name) for name in NEAR] for part in look(planted).parts] == expected


def test_a_module_inside_another_is_taken_from_it():
    """outer from 0 to 10 with inner from 2 to 5 and from 6 to 7, then inner alone from 11 to 12, in a pass of 15."""
    visits = [["outer", None, 0, 10], ["inner", 0, 2, 5], ["inner", 0, 6, 7], ["inner", None, 11, 12]]
    assert measure._spent(visits, lambda start, end: end - start, 15) == {"outer": 6, "inner": 5, "the rest": 4}


def test_hooks_are_gone_afterwards():
    whole = make_model("bert")
    inputs = {"input_ids": torch.arange(8)[None]}
    _, seconds = measure._times(whole, ["classifier", "bert.pooler.dense", "bert.embeddings"], inputs, "cpu", quiet)
    assert seconds.keys() == {"classifier", "bert.pooler.dense", "bert.embeddings", "the rest"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.modules())


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "bnb_nf4"), ("llama", "bnb_int8"), ("gpt2", "int8_dynamic")])
def test_packed_layers_are_measured_packed_and_looked_at_unpacked(toys, looked, tmp_path, kind, method):
    artifact = make(toys[kind], kind, method, tmp_path / "made")
    loaded, inspection = load_model(Source(str(artifact), TASKS[kind]), "cpu"), look(artifact)
    assert inspection.bytes == held.weight_bytes(loaded) == sum(part.bytes for part in inspection.parts)
    assert inspection.parameters == parameter_count(loaded) == sum(part.parameters for part in inspection.parts)
    assert "quantised already" in inspection.said[0]
    for part in inspection.parts:
        if part.kind == "linear":
            assert part.weights > 0
            assert part.bytes < 1.3 * part.parameters
    assert inspection.of("linear").rms == pytest.approx(looked[kind].of("linear").rms, rel=0.05)
    assert inspection.of("linear").below_half == pytest.approx(looked[kind].of("linear").below_half, abs=0.03)


def test_gptq_packed_by_compressed_tensors(toys, tmp_path):
    artifact = make(toys["llama"], "llama", "gptq", tmp_path / "made", bits=4, group_size=32)
    inspection = look(artifact)
    assert inspection.parameters == look(toys["llama"]).parameters
    assert inspection.of("linear").bytes < 0.7 * inspection.of("linear").parameters, "packed as loaded"
    assert inspection.of("linear").weights == inspection.of("linear").parameters, "looked at after the pass that unpacks them"


def test_weights_packed_beyond_looking_are_refused():
    other = make_model("llama")
    other.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    with pytest.raises(
        ModelError, match=r"model\.layers\.0\.mlp\.up_proj: Linear holds its weights packed .* inspect the model that it was made of"
    ):
        measure._holdings(other)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="its package is installed")
def test_packed_weights_without_their_package_are_refused(toys, tmp_path):
    """GPTQ's own files, by their config, which is what transformers looks at first."""
    shutil.copytree(toys["llama"], tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": packing}))
    with pytest.raises(
        ModelError,
        match=r"packed: (the package that reads its packed weights isn't installed here|Loading a GPTQ quantized model requires optimum)",
    ):
        look(tmp_path / "packed")


def test_the_python_side(toys):
    inspection = compress.inspect(str(toys["bert"]), tokens=8)
    frame = inspection.frame
    assert (inspection.model, inspection.tokens, inspection.batch_size) == (str(toys["bert"]), 8, 1)
    assert list(frame.columns) == list(Part.model_fields)
    assert frame.parameters.sum() == inspection.parameters
    assert frame.set_index("name").loc["the rest", ["rms", "zero"]].isna().all()
    assert len(inspection.said) == 3


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_and_groups(looked, kind, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal.show_inspection(looked[kind], every=False)
    short = capsys.readouterr().out
    assert max(map(len, short.splitlines())) <= columns
    text = " ".join(short.split())
    for words in (
        "(2 layers)",
        "the whole model",
        "a normal distribution",
        "norms (5 layers)" if kind == "llama" else "norms",
        *looked[kind].said[:1],
    ):
        assert words in text
    assert ("size" in short) is (columns == 120)
    assert "…" not in short
    terminal.show_inspection(looked[kind], every=True)
    every = capsys.readouterr().out
    assert max(map(len, every.splitlines())) <= columns
    assert all(part.name.rsplit(".", 1)[-1] in every for part in looked[kind].parts)
    assert len(every.splitlines()) > len(short.splitlines())


def test_names_are_broken_after_dots():
    name = "encoder.block.*.layer.1.DenseReluDense.wi_0 (2 layers)"
    assert terminal._broken(name, 60) == name
    assert terminal._broken(name, 33).split("\n") == ["encoder.block.*.layer.1.", "  DenseReluDense.wi_0 (2 layers)"]
    assert terminal._broken(name, 24).split("\n") == ["encoder.block.*.layer.1.", "  DenseReluDense.wi_0", "  (2 layers)"]


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (65536, "65.5 k"), (999_900, "1 M"), (999_400, "999 k"), (8_030_261_248, "8.03 G")],
)
def test_counts_in_short(number, shown):
    assert count(number) == shown


def test_sentences_say_what_is_remarkable(looked):
    """The same model with other zeros: by chance, more than by chance, many."""
    parts = looked["t5"].parts

    def said(**shares):
        return looked["t5"].model_copy(update={"parts": [p.model_copy(update=shares) if p.kind == "linear" else p for p in parts]}).said[2]

    assert "8.0 % of the linear layers' weights" in said(below_tenth=0.08)
    assert "no more than by chance" in said(below_tenth=0.08)
    assert "pruning could take these at little loss" in said(below_tenth=0.2)
    assert "and 30.0 % are zero" in said(below_tenth=0.35, zero=0.3)
    nothing = looked["t5"].model_copy(update={"parts": [p for p in parts if p.kind != "linear"]})
    assert len(nothing.said) == 2


def test_what_a_normal_distribution_has():
    drawn = np.abs(np.random.default_rng(0).standard_normal(4_000_000))
    for name, bound in (("below_hundredth", 0.01), ("below_tenth", 0.1), ("below_half", 0.5)):
        assert findings.NORMAL[name] == pytest.approx((drawn < bound).mean(), abs=5e-4)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("ending", ["png", "SVG"])
def test_the_picture(looked, tmp_path, kind, ending):
    file = tmp_path / f"seen.{ending}"
    picture.draw(looked[kind].model_copy(update={"model": "a $broken^ name\x1b"}), file)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 10_000


def test_the_picture_has_the_tables_figures(looked):
    drawing = picture.figure(looked["llama"])
    bars, heat = drawing.axes[:2]
    rows = [row for row, _ in grouped(looked["llama"].parts)]
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx([100 * getattr(row, share) for share in picture.BARS for row in rows])
    drawn = heat.images[0].get_array()
    assert drawn.shape == (len(rows), 2)
    assert drawn[0, 1] == pytest.approx(100 * named(looked["llama"], "model.layers.1.self_attn.q_proj").below_tenth)
    assert drawn.mask[-1].all(), "the rest has no depth"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("seen.gif", r"seen.gif: there is no format '.gif' here; allowed are .png and .svg"),
        ("seen", "seen: there is no format 'without an ending' here"),
        ("nowhere/seen.png", "the folder .*nowhere isn't there"),
        ("folder.png", "folder.png: is a folder"),
    ],
)
def test_a_picture_that_cannot_be_is_refused(tmp_path, file, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=message):
        picture.refuse(tmp_path / file)


def test_a_picture_without_leave_or_matplotlib_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)
        with pytest.raises(InputError, match="can't be written to"):
            picture.refuse(tmp_path / "seen.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"needs matplotlib, not installed here. Install with: pip install 'matplotlib>="):
        picture.refuse(tmp_path / "seen.png")


def test_a_task_that_cannot_be_told(toys, tmp_path):
    config = json.loads((toys["bert"] / "config.json").read_text())
    for architectures in (["BertForMaskedLM"], None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(
            ModelError, match=r"no task can be told from its config's architectures, .*; give --task, one of seq2seq, causal-lm"
        ):
            task_of(Source(str(tmp_path), ""))
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(ModelError, match="its config can't be read"):
        task_of(Source(str(tmp_path), ""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "there is no folder"),
        (["builtin", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["builtin", "--tokens", "-3"], "--tokens -3: must be 1 or more"),
        (["builtin", "--tokens", "many"], "invalid int value: 'many'"),
        (["builtin", "--task", "translate"], "--task translate: there is no such task; allowed are seq2seq, causal-lm, sequence-classification"),
        (["builtin", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["builtin", "--picture", "seen.gif"], "there is no format '.gif' here"),
        (["builtin", "--picture", "nowhere/seen.png"], "the folder nowhere isn't there"),
        (["pickled"], "only pickled weights (pytorch_model.bin)"),
        (["toy", "--tokens", "65"], "--tokens 65: the model's context holds 64 tokens at most"),
        (["toy", "--task", "seq2seq"], "can't be loaded for task seq2seq"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_status_2(arguments, message, toys, tmp_path):
    (tmp_path / "toy").symlink_to(toys["llama"])
    (tmp_path / "pickled").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / "pickled" / file).write_bytes((toys["llama"] / file).read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    done = program("inspect", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(f.name for f in tmp_path.iterdir()) == ["pickled", "toy"]


def test_the_verb_prints_one_document_and_draws(toys, tmp_path):
    done = program("inspect", toys["t5"], "--json", "--picture", "seen.svg", "--tokens", "16", "--batch-size", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.keys() == {*Inspection.model_fields, "said", "remarks"}
    assert (answer["task"], answer["tokens"], answer["batch_size"], answer["device"]) == ("seq2seq", 16, 2, "cpu")
    assert all(part.keys() == set(Part.model_fields) for part in answer["parts"])
    assert len(answer["parts"]) == len(look(toys["t5"]).parts)
    assert (tmp_path / "seen.svg").stat().st_size > 10_000


def test_the_builtin_model_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    done = program("inspect", "builtin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("builtin: seq2seq, float16, 3.41 M parameters")
    assert "encoder.block.*.layer.0.SelfAttention.q (2 layers)" in done.stdout
    assert "over 1 x 128 tokens" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_refused(toys, tmp_path):
    broken = store(tmp_path / "broken", make_model("llama"))
    stored = load_file(broken / "model.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if "up_proj" not in name}, broken / "model.safetensors")
    with pytest.raises(ModelError, match="2 weights are missing"):
        look(broken)


def test_the_help_names_every_option():
    options = parser().parse_args(["inspect", "builtin"])
    defaults = (1, None, None, "auto", False, None)
    assert (options.batch_size, options.tokens, options.task, options.device, options.all, options.picture) == defaults
