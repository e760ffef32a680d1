"""What is carried over to OpenVINO against plain transformers: the same tokens, the same likelihoods, the very integers."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from compress import engines, exports
from compress.engines import Opening, Piece
from compress.errors import ModelError, RecipeError
from compress.export import openvino as export
from compress.methods import quiet
from compress.model.folder import file_bytes
from compress.model.source import Source
from compress.recipe import Generation, Runtime, load
from tests import blocks
from tests.conftest import TASKS, make_model, make_tokenizer, recipe_for

pytest.importorskip("openvino")


def artifact(source, kind, target, method="openvino", family="export", **settings):
    """The artifact of one stage."""
    return blocks.made(Source(str(source), TASKS[kind]), family, method, settings, target)


def opened(name, folder, kind, **settings):
    module = engines.find(name)
    dtype = "float32" if name == "transformers" else "auto"
    engine = module.make(Opening(Source(str(folder), TASKS[kind], dtype), "cpu", 1, Runtime(), module.Settings(**settings)))
    engine.open()
    return engine


def restless(kind, folder):
    """A model that writes something else at each step, since its weights are drawn wider."""
    drawn = make_model(kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in drawn.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn_like(parameter))
    drawn.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pieces(encodes):
    rows = [[5, 9, 3, 17, 8, 1], [4, 4, 12, 1], [20, 7, 6, 9, 11, 14, 2, 1]]
    return [Piece(n, row, [*row[::-1][1:], 1] if encodes else [-100, -100, *row[2:]]) for n, row in enumerate(rows)]


def nats(engine):
    return [row.nats for row in engine.read(pieces(engine.traits.encodes), quiet)]


def note(folder):
    return json.loads((folder / "compress_notes.json").read_text())["said"][0]


@pytest.mark.parametrize("kind", ["t5", "bart", "llama", "gpt2"])
def test_floats_say_the_same_as_in_transformers(tmp_path, kind):
    source = restless(kind, tmp_path / "source")
    folder = artifact(source, kind, tmp_path / "made", weights="float32")
    plain, engine = opened("transformers", source, kind), opened("openvino", folder, kind)
    assert engine.traits.encodes == plain.traits.encodes
    assert nats(engine) == pytest.approx(nats(plain), rel=1e-4)
    prompts = [[5, 9, 3], [4, 4, 12, 8, 6], [20]]
    for penalty in (None, 1.3):
        generation = Generation(max_new_tokens=9, repetition_penalty=penalty)
        expected = plain.write(prompts, generation, quiet).tokens
        assert engine.write(prompts, generation, quiet).tokens == expected
    assert len({token for row in expected for token in row}) > 5, "a model that says little would not tell"
    told = []
    engine.run(engine.prepare([[5, 9, 3], [4, 4, 12]]), 6, lambda: told.append(1))
    assert len(told) == 6, "each step is told once for the whole batch, ends passed over"
    assert nats(engine) == pytest.approx(nats(plain), rel=1e-4), "nothing of what was written is left"
    assert engine.weights().parameters == plain.weights().parameters
    assert engine.weights().weight_bytes == file_bytes(folder)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"bits": 4, "group_size": 32, "symmetric": False}),
        ("llama", {"bits": 8, "group_size": -1, "symmetric": True}),
        ("llama", {"bits": {"*.0.*": 4, "*.1.*": 8}, "symmetric": True}),
        ("t5", {"bits": 4, "group_size": 32, "symmetric": True}),
        ("bart", {"bits": 8, "group_size": -1, "symmetric": False}),
        ("gpt2", {"bits": 4, "group_size": 64, "symmetric": False}),
    ],
)
def test_integers_of_a_stage_are_kept(toys, tmp_path, kind, settings):
    packed = artifact(toys[kind], kind, tmp_path / "packed", "rtn", "quantize", **settings)
    folder = artifact(packed, kind, tmp_path / "made")
    widths = {4, 8} if isinstance(settings["bits"], dict) else {settings["bits"]}
    assert all(f"% are int{bits}" in note(folder) for bits in widths)
    assert exports.read(folder).weights in {f"int{bits}" for bits in widths}
    assert nats(opened("openvino", folder, kind)) == pytest.approx(nats(opened("transformers", packed, kind)), rel=1e-4)


def test_rows_are_rounded_to_eight_bits(toys, tmp_path):
    folder = artifact(toys["llama"], "llama", tmp_path / "made", weights="int8")
    assert note(folder).startswith("of 94,728 weights 100.0% are int8")
    ours, theirs = nats(opened("openvino", folder, "llama")), nats(opened("transformers", toys["llama"], "llama"))
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours != pytest.approx(theirs, rel=1e-5)
    matrix = np.random.default_rng(0).normal(size=(8, 96)).astype(np.float32)
    matrix[3] = 0
    rounded = export._nearest(matrix)
    assert np.abs(rounded.integers).max(axis=1).tolist() == [127] * 3 + [0] + [127] * 4
    assert (np.abs(rounded.values() - matrix) <= np.abs(matrix).max(axis=1, keepdims=True) / 254 * 1.001).all()


@pytest.mark.parametrize("kind", ["t5", "llama"])  # a head that is the embedding, and one of its own
def test_embeddings_are_rounded_beside_integers_that_are_kept(toys, tmp_path, kind):
    packed = artifact(toys[kind], kind, tmp_path / "packed", "rtn", "quantize", bits=4, group_size=32, symmetric=True)
    folder = artifact(packed, kind, tmp_path / "made", embeddings="int8")
    assert {"int4", "int8"} <= set(re.findall(r"% are (\w+)", note(folder)))
    reference = opened("transformers", packed, kind)
    model = reference.model
    for table in {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        with torch.no_grad():
            step = (table.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # the padding token has a row of zeros
            table.copy_(torch.round(table / step) * step)
    assert nats(opened("openvino", folder, kind)) == pytest.approx(nats(reference), rel=1e-4)


def test_four_bits_by_nncf(toys, tmp_path):
    pytest.importorskip("nncf")
    folder = artifact(toys["llama"], "llama", tmp_path / "made", weights="int4")
    assert "% are int4" in note(folder)


def test_the_code_that_a_card_has_runs_alone(toys, tmp_path):
    for kind in ("t5", "llama", "gpt2"):
        folder = artifact(toys[kind], kind, tmp_path / kind, weights="float32")
        code = export.usage(TASKS[kind], ["ids = [4, 4, 12, 8, 6]"], 5)
        ran = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True, check=True)
        written = opened("openvino", folder, kind).write([[4, 4, 12, 8, 6]], Generation(max_new_tokens=5), quiet).tokens[0]
        assert ran.stdout.strip() == make_tokenizer().decode(written, skip_special_tokens=True).strip()


def test_what_cannot_be_held_or_done_is_refused(toys, tmp_path, rows, write_recipe):
    packed = artifact(toys["llama"], "llama", tmp_path / "packed", "rtn", "quantize", bits=3, group_size=-1)
    with pytest.raises(ModelError, match=r"layers\.\d\.\S+ has 3 bits a weight, and 4 or 8 can be stored; quantise it with bits: 4 or"):
        artifact(packed, "llama", tmp_path / "none")
    folder = artifact(packed, "llama", tmp_path / "made", weights="float32")
    engine = opened("openvino", folder, "llama")
    with pytest.raises(ModelError, match=r"num_beams: 2; it has no beam search"):
        engine.write([[3, 4]], Generation(max_new_tokens=2, num_beams=2), quiet)
    with pytest.raises(ModelError, match=r"do_sample: its draws aren't"):
        engine.write([[3, 4]], Generation(max_new_tokens=2, do_sample=True), quiet)
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**own, "bad_words_ids": [[3]]}))
    with pytest.raises(ModelError, match=r"bad_words_ids isn't supported; remove it from the recipe and generation_config.json"):
        opened("openvino", folder, "llama").write([[3, 4]], Generation(max_new_tokens=2), quiet)
    with pytest.raises(ModelError, match="is not in the format that it opens, which `export: openvino` writes"):
        opened("openvino", toys["llama"], "llama")
    (folder / "openvino" / "decoder.xml").write_text("no graph")
    with pytest.raises(ModelError, match=r"engine: openvino: \S+decoder.xml: "):
        opened("openvino", folder, "llama")
    stages = [{"quantize": "rtn", "bits": 3}, {"export": "openvino"}]
    with pytest.raises(RecipeError, match=r"it holds integers of 4 or 8 bits; in `quantize: rtn` give bits: 4 or bits: 8"):
        load(write_recipe({**recipe_for("llama", toys["llama"], rows, stages=stages), "engine": "openvino"}))


def test_a_type_that_cannot_be_traced_is_named(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=0, eos_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"export: openvino: a mamba can't be traced: "):
        artifact(tmp_path / "source", "llama", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_nothing_is_told_of_what_is_converted():
    done = subprocess.run(
        [sys.executable, "-c", "import compress.export.openvino, openvino.tools.ovc.telemetry_utils as told; print(told.tm.__name__)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "openvino.tools.ovc.telemetry_stub"
