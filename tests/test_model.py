"""Model folders: what is refused without torch, what is loaded, and how big it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from compress import held
from compress.architectures.gpt2 import as_linear
from compress.errors import DeviceError, InputError, ModelError
from compress.hardware import pick_device
from compress.model.folder import check_folder, file_bytes
from compress.model.loading import load_model, parameter_count
from compress.model.source import Source, locate
from compress.structure import context_length, linear_layers
from tests.conftest import TASKS, make_model


@pytest.fixture
def broken(toys, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(toys["t5"], folder)
    return folder


def refused(folder, message):
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


def test_a_whole_folder_is_accepted(toys):
    for folder in toys.values():
        check_folder(folder)


def test_no_config(broken):
    (broken / "config.json").unlink()
    refused(broken, r"no config\.json")
    (broken / "config.json").write_text("{")
    refused(broken, "not JSON")
    (broken / "config.json").write_text("{}")
    refused(broken, "no model_type")


def test_no_weights_or_a_pickle_only(broken):
    (broken / "model.safetensors").unlink()
    refused(broken, "no weights")
    (broken / "pytorch_model.bin").write_bytes(b"")
    refused(broken, r"only pickled weights \(pytorch_model\.bin\), which can run code")


@pytest.mark.parametrize("size", [0, 4, 100, -1000])
def test_truncated_safetensors(broken, size):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(broken, r"model\.safetensors: .*truncated")


def test_an_index_that_names_what_is_not_there(broken):
    (broken / "model.safetensors").unlink()  # else the index isn't looked at
    index = {"weight_map": {"a": "model-00001.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(broken, "names model-00001.safetensors, which isn't there")
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(broken, "which isn't there")


def test_missing_weights_are_not_made_up(broken):
    weights = load_file(broken / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, such as encoder\.final_layer_norm\.weight"):
        load_model(Source(str(broken), "seq2seq"), "cpu")


def test_weights_of_another_shape_are_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "d_ff": 256}))
    with pytest.raises(ModelError, match="don't fit its config"):
        load_model(Source(str(broken), "seq2seq"), "cpu")


def test_the_wrong_task(toys):
    with pytest.raises(ModelError, match="can't be loaded for task seq2seq"):
        load_model(Source(str(toys["llama"]), "seq2seq"), "cpu")


@pytest.mark.parametrize(
    ("id", "message"), [("./nowhere", "there is no folder"), ("a b", "neither a folder"), ("a/b/c", "there is no folder")]
)
def test_ids_that_are_nothing(tmp_path, id, message):
    with pytest.raises(ModelError, match=message):
        locate(id, tmp_path)


def test_ids_are_folders_beside_the_recipe_or_hub_ids(toys, tmp_path):
    assert locate(toys["t5"].name, toys["t5"].parent) == str(toys["t5"].resolve())
    assert locate("google/flan-t5-small", tmp_path) == "google/flan-t5-small"


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(DeviceError, match="use --device cpu or auto"):
        pick_device("cuda")


@pytest.mark.parametrize("kind", list(TASKS))
def test_sizes_are_those_of_the_weights(toys, kind):
    loaded = load_model(Source(str(toys[kind]), TASKS[kind], "float32"), "cpu")
    unique = {p.data_ptr(): p for p in loaded.parameters()}.values()
    assert parameter_count(loaded) == sum(p.numel() for p in unique)
    buffers = {b.data_ptr(): b for b in loaded.buffers()}.values()
    assert held.weight_bytes(loaded) == 4 * parameter_count(loaded) + sum(b.numel() * b.element_size() for b in buffers)
    assert file_bytes(toys[kind]) >= 4 * parameter_count(loaded)


def test_gpt2_with_linear_layers_is_the_same_model():
    old = make_model("gpt2").eval()
    new = as_linear(old)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(old(ids).logits, new(ids).logits, atol=1e-5)
    assert sum(isinstance(m, torch.nn.Linear) for m in new.modules()) == 2 * 4 + 1
    assert new.lm_head.weight is new.transformer.wte.weight
    assert as_linear(new) is new


@pytest.mark.parametrize(
    ("kind", "heads"), [("t5", ["lm_head"]), ("bart", ["lm_head"]), ("llama", ["lm_head"]), ("gpt2", ["lm_head"]), ("bert", ["classifier"])]
)
def test_heads_are_left_alone_unless_named(kind, heads):
    kept, left_out = linear_layers(make_model(kind), None)
    assert list(left_out) == heads
    assert len(kept) > 6
    if kind == "bert":
        assert heads[0] in linear_layers(make_model(kind), [])[0]
    else:
        with pytest.raises(InputError, match="lm_head shares its weights with the embedding"):
            linear_layers(make_model(kind), [])


def test_patterns_of_ignore():
    llama = make_model("llama")
    assert set(linear_layers(llama, ["lm_head", "down_proj"])[1]) - {"lm_head"} == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert len(linear_layers(llama, ["lm_head", "model.layers.0.*"])[1]) == 1 + 7
    assert len(linear_layers(llama, ["lm_head", "re:.*(q|k)_proj"])[1]) == 1 + 4
    with pytest.raises(InputError, match=r"ignore: 'down_prj' matches no linear layer of this model; near it are .*down_proj"):
        linear_layers(llama, ["down_prj"])
    with pytest.raises(InputError, match="not a regular expression"):
        linear_layers(llama, ["re:("])


@pytest.mark.parametrize(
    "kind",
    ["camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"],
)
def test_positions_that_begin_behind_the_padding_are_counted(kind):
    config = AutoConfig.for_model(
        kind, vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=34,
        pad_token_id=1,
    )  # fmt: skip
    if kind == "longformer":
        config.attention_window = [4]
    if kind == "xmod":
        config.default_language = "en_XX"
    model, most = AutoModelForSequenceClassification.from_config(config).eval(), context_length(config)
    assert most == 32
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 7))
        if kind != "longformer":  # which pads to its window
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, most + 1), 7))


def test_contexts():
    assert context_length(make_model("llama").config) == 64
    assert context_length(make_model("gpt2").config) == 64
    assert context_length(make_model("t5").config) is None
