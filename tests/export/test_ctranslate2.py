"""What is carried over to CTranslate2 against plain transformers: the same tokens, the same likelihoods, the very integers."""

import json

import numpy as np
import pytest
import torch

from compress import engines, exports
from compress.engines import Opening, Piece
from compress.errors import BrokenPromise, ModelError, RecipeError
from compress.export import ctranslate2 as export
from compress.methods import quiet
from compress.model.folder import check_folder, file_bytes
from compress.model.source import BUILTIN, Source
from compress.recipe import Generation, Runtime, load
from tests import blocks
from tests.conftest import TASKS, recipe_for

pytest.importorskip("ctranslate2")


def artifact(source, kind, target, method="ctranslate2", family="export", **settings):
    """The artifact of one stage."""
    return blocks.made(Source(str(source), TASKS.get(kind, kind)), family, method, settings, target)


def opened(name, folder, kind, **settings):
    module = engines.find(name)
    dtype = "float32" if name == "transformers" else "auto"
    engine = module.make(Opening(Source(str(folder), TASKS.get(kind, kind), dtype), "cpu", 1, Runtime(), module.Settings(**settings)))
    engine.open()
    return engine


def pieces(encodes):
    rows = [[5, 9, 3, 17, 8, 1], [4, 4, 12, 1], [20, 7, 6, 9, 11, 14, 2, 1]]
    return [Piece(n, row, [*row[::-1][1:], 1] if encodes else [-100, *row[1:]]) for n, row in enumerate(rows)]


def nats(engine, encodes):
    return [row.nats for row in engine.read(pieces(encodes), quiet)]


@pytest.mark.parametrize("kind", ["t5", "bart", "llama", "gpt2"])
def test_floats_say_the_same_as_in_transformers(toys, tmp_path, kind):
    folder = artifact(toys[kind], kind, tmp_path / "made", weights="float32")
    plain, engine = opened("transformers", toys[kind], kind), opened("ctranslate2", folder, kind)
    encodes = engine.traits.encodes
    assert encodes == plain.traits.encodes
    assert nats(engine, encodes) == pytest.approx(nats(plain, encodes), rel=1e-4)
    prompts = [[5, 9, 3], [4, 4, 12, 8, 6], [20]]
    generation = Generation(max_new_tokens=7)
    assert engine.write(prompts, generation, quiet).tokens == plain.write(prompts, generation, quiet).tokens
    told = []
    engine.run(engine.prepare([[5, 9, 3], [4, 4, 12]]), 6, lambda: told.append(1))
    assert len(told) == 6, "each step is told once for the whole batch, ends passed over"
    assert engine.weights().parameters == plain.weights().parameters
    assert file_bytes(folder) == (folder / "ctranslate2" / "model.bin").stat().st_size


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_integers_of_a_stage_are_kept(toys, tmp_path, kind):
    """By likelihoods: the engine unpacks them to floats, and transformers does of the artifact before."""
    packed = artifact(toys[kind], kind, tmp_path / "packed", "rtn", "quantize", bits=8, group_size=-1, symmetric=True)
    folder = artifact(packed, kind, tmp_path / "made")
    assert exports.read(folder).weights == "int8"
    assert "0.0% were rounded" in json.loads((folder / "compress_notes.json").read_text())["said"][0]
    encodes = TASKS[kind] == "seq2seq"
    engine = opened("ctranslate2", folder, kind, compute="float32")
    assert nats(engine, encodes) == pytest.approx(nats(opened("transformers", packed, kind), encodes), rel=1e-5)
    again = artifact(toys[kind], kind, tmp_path / "again", weights="int8")
    assert nats(opened("ctranslate2", again, kind, compute="float32"), encodes) != pytest.approx(nats(engine, encodes), rel=1e-5)


def test_what_others_packed_is_unpacked_and_keeps_its_integers(toys, tmp_path):
    """torchao's layers in 8 bits a row: the dense model says what transformers says of them, and all lie on the grid."""
    packed = artifact(toys["t5"], "t5", tmp_path / "packed", "int8_dynamic", "quantize")
    folder = artifact(packed, "t5", tmp_path / "made")
    assert exports.read(folder).weights == "int8"
    packed_nats, engine_nats = nats(opened("transformers", packed, "t5"), True), nats(opened("ctranslate2", folder, "t5"), True)
    assert engine_nats == pytest.approx(packed_nats, rel=0.01)


def test_a_grid_is_found_whatever_its_step_and_sign():
    draw = np.random.default_rng(0)
    integers = draw.integers(-128, 128, (64, 96))
    integers[0], integers[1, 0], integers[2] = 0, -128, 2 * (integers[2] // 4)
    step = draw.uniform(1e-4, 1e-1, (64, 1)) * np.where(draw.random((64, 1)) < 0.5, -1, 1)
    matrix = (integers * step).astype(np.float32)
    held, scale = export._grid(matrix)
    assert held.dtype == np.int8
    assert held / scale[:, None] == pytest.approx(matrix, rel=1e-5)
    matrix[5, 7] += 0.3 * abs(step[5, 0])
    assert export._grid(matrix) is None
    held, scale = export._nearest(matrix)
    assert np.abs(held / scale[:, None] - matrix).max(axis=1) == pytest.approx(0, abs=float(np.abs(matrix).max()) / 254 * 1.01)


def test_what_is_misread_is_no_artifact(tmp_path, monkeypatch):
    """The converter scales the scores of a T5 with tied embeddings by its config, as transformers 4 meant it."""
    monkeypatch.setattr(export, "_as_it_reads", lambda loaded: loaded)
    with pytest.raises(BrokenPromise, match=r"ctranslate2 has \d+\.\d+ nats a token for \d+ tokens where transformers has"):
        artifact(BUILTIN, "seq2seq", tmp_path / "made", weights="float32")
    assert not (tmp_path / "made").exists()


def test_what_the_engine_cannot_do_is_refused(toys, tmp_path, rows, write_recipe):
    folder = artifact(toys["llama"], "llama", tmp_path / "made", weights="float32")
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**own, "bad_words_ids": [[3]]}))
    with pytest.raises(ModelError, match="bad_words_ids isn't supported"):
        opened("ctranslate2", folder, "llama").write([[3, 4]], Generation(max_new_tokens=2), quiet)
    with pytest.raises(ModelError, match="float16 comput"):
        opened("ctranslate2", folder, "llama", compute="float16")
    (folder / "ctranslate2" / "model.bin").unlink()
    with pytest.raises(ModelError, match="not all of them exist"):
        check_folder(folder)
    grouped = [{"quantize": "rtn", "bits": 4, "group_size": 32}, {"export": "ctranslate2"}]
    with pytest.raises(RecipeError, match=r"it holds 8 bits or fewer a row, symmetric; in `quantize: rtn` give group_size: -1"):
        load(write_recipe({**recipe_for("llama", toys["llama"], rows, stages=grouped), "engine": "ctranslate2"}))


def test_a_type_that_is_not_known_is_named(toys, tmp_path, monkeypatch):
    from ctranslate2.converters import transformers as converter

    monkeypatch.delitem(converter._MODEL_LOADERS, "GPT2Config")
    with pytest.raises(ModelError, match="it can't convert a gpt2: No conversion is registered"):
        artifact(toys["gpt2"], "gpt2", tmp_path / "made")


def test_what_is_the_converters_own_is_still_there():
    from ctranslate2.converters import TransformersConverter
    from ctranslate2.specs import model_spec

    for owner, name in ((TransformersConverter, "_load"), (TransformersConverter, "load_model"), (TransformersConverter, "load_tokenizer")):
        assert callable(getattr(owner, name))
    assert callable(model_spec.visit_spec)
    assert callable(model_spec.LayerSpec.optimize)
    assert hasattr(model_spec.NumpyVariable(torch.zeros(1).numpy()), "is_scalar")
