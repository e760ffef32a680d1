"""One model of a folder, however many it could hold: what plain transformers loads is what the calibration pass reads, or it is refused."""

import inspect
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM, modeling_utils, utils

from compress import experts
from compress.calibration.weights import empty
from compress.errors import ModelError
from compress.model.folder import INDEX, SINGLE, check_folder, file_bytes, stored_dtypes, weight_files
from compress.model.loading import parameter_bytes, skeleton
from compress.model.source import Source, fingerprint
from compress.quantize import rtn
from tests.blocks import bundle, context, saved
from tests.conftest import make_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def noise(weights, seed=5):
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor.float()).to(tensor.dtype) for name, tensor in weights.items()}


def put(weights, file):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata={"format": "pt"})


def edit(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def index(folder, parts):
    """The weights as shards behind an index, `parts` by file name."""
    for name, weights in parts.items():
        put(weights, folder / name)
    where = {tensor: name for name, weights in parts.items() for tensor in weights}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def halves(weights):
    names = sorted(weights)
    first = names[: len(names) // 2]
    return {"a.safetensors": {n: weights[n] for n in first}, "b.safetensors": {n: weights[n] for n in names if n not in first}}


def stray_file(folder, weights):
    put(noise(weights), folder / "model_old.safetensors")
    put(noise(weights, 6), folder / "a_first_by_name.safetensors")


def index_beside_a_single_file(folder, weights):
    index(folder, halves(noise(weights)))


def shards_with_other_tensors_than_the_index_says(folder, weights):
    (folder / SINGLE).unlink()
    index(folder, halves(weights))
    edit(folder / INDEX, weight_map=dict.fromkeys(sorted(weights), "a.safetensors") | {"model.norm.weight": "b.safetensors"})


def shards_that_both_hold_a_tensor(folder, weights):
    (folder / SINGLE).unlink()
    parts = halves(weights)
    parts["a.safetensors"]["model.norm.weight"] = weights["model.norm.weight"] * 3
    index(folder, parts)


def consolidated(folder, weights):
    put(noise(weights), folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    put(noise(weights), folder / "original" / SINGLE)


def pickle_beside(folder, weights):
    torch.save(noise(weights), folder / "pytorch_model.bin")


def variant(folder, weights):
    put({name: tensor.half() * 2 for name, tensor in weights.items()}, folder / "model.fp16.safetensors")


def head_of_its_own_under_a_tied_config(folder, weights):
    put({**weights, HEAD: noise(weights)[EMBEDDING] * 0.02}, folder / SINGLE)


def head_stored_twice_alike(folder, weights):
    put({**weights, HEAD: weights[EMBEDDING].clone()}, folder / SINGLE)


def embedding_under_the_heads_name(folder, weights):
    put({HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}, folder / SINGLE)


def no_dtype(folder, weights):
    put({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / SINGLE)
    edit(folder / "config.json", dtype=None, torch_dtype=None)


def dtype_unlike_the_stored(folder, weights):
    edit(folder / "config.json", dtype="bfloat16")


def mixed_dtypes(folder, weights):
    put({name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in weights.items()}, folder / SINGLE)
    edit(folder / "config.json", dtype=None)


def without_the_prefix(folder, weights):
    put({name.removeprefix("model."): tensor for name, tensor in weights.items()}, folder / SINGLE)


def tensors_that_no_layer_has(folder, weights):
    put({**weights, "model.layers.7.mlp.up_proj.weight": torch.ones(3, 3), "value_head.weight": torch.ones(3)}, folder / SINGLE)


def named_by_the_config(folder, weights):
    put(noise(weights), folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")


def two_of_which_neither_is_whole(folder, weights):
    first, other = halves(weights).values()
    put(first, folder / SINGLE)
    index(folder, {"model-00001-of-00001.safetensors": other})


def untied_config_and_no_head(folder, weights):
    edit(folder / "config.json", tie_word_embeddings=False)


def adapter(folder, weights):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


def other_names_only(folder, weights):
    (folder / SINGLE).rename(folder / "consolidated.safetensors")


def weights_of_another_size(folder, weights):
    put({**weights, "model.layers.1.mlp.up_proj.weight": torch.ones(20, 64)}, folder / SINGLE)


WAYS = [
    stray_file, index_beside_a_single_file, shards_with_other_tensors_than_the_index_says, shards_that_both_hold_a_tensor, consolidated,
    pickle_beside, variant, head_of_its_own_under_a_tied_config, head_stored_twice_alike, embedding_under_the_heads_name, no_dtype,
    dtype_unlike_the_stored, mixed_dtypes, without_the_prefix, tensors_that_no_layer_has, named_by_the_config,
]  # fmt: skip
REFUSED = {
    two_of_which_neither_is_whole: r"1[0-9] weights are missing, such as .*transformers loads model\.safetensors, and not model-00001-of.*beside",
    untied_config_and_no_head: r"1 weights are missing, such as lm_head\.weight",
    adapter: "adapter_config.json names an adapter.*Merge it",
    other_names_only: r"no model\.safetensors and no model\.safetensors\.index\.json.*give consolidated\.safetensors that name",
    weights_of_another_size: "its weights don't fit its config or are damaged",
}  # fmt: skip


@pytest.fixture
def model_of(toys, tmp_path):
    def make(way):
        folder = tmp_path / "model"
        shutil.copytree(toys["llama"], folder)
        way(folder, load_file(folder / SINGLE))
        return folder

    return make


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_the_pass_reads_is_what_plain_transformers_loads(model_of, tmp_path, way, dtype):
    folder = model_of(way)
    check_folder(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    filled, weights = empty(Source(str(folder), "causal-lm", dtype), tmp_path)
    weights.fill(filled, "", "cpu")
    filled.tie_weights(recompute_mapping=False)
    expected, actual = plain.state_dict(), filled.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
    assert (filled.lm_head.weight is filled.model.embed_tokens.weight) == (plain.lm_head.weight is plain.model.embed_tokens.weight)
    bytes_loaded = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert parameter_bytes(skeleton(Source(str(folder), "causal-lm", dtype))) == bytes_loaded


@pytest.mark.parametrize("way", REFUSED, ids=lambda way: way.__name__)
def test_what_is_no_whole_model_is_refused_before_any_work(model_of, tmp_path, way):
    folder = model_of(way)
    with pytest.raises(ModelError, match=REFUSED[way]) as raised:
        check_folder(folder)
        empty(Source(str(folder), "causal-lm"), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("way", [stray_file, head_of_its_own_under_a_tied_config, no_dtype], ids=lambda way: way.__name__)
def test_a_smaller_model_is_made_of_that_model(model_of, tmp_path, way):
    """By perplexity in plain transformers on both sides; 8 bits change next to nothing."""
    folder = model_of(way)
    artifact = tmp_path / "artifact"
    rtn.apply(bundle(folder, "llama", "auto"), rtn.Settings(bits=8), context()).save(artifact)
    ids = torch.randint(3, 64, (4, 30), generator=torch.Generator().manual_seed(2))
    before, after = (AutoModelForCausalLM.from_pretrained(place, dtype="auto") for place in (folder, artifact))
    with torch.no_grad():
        losses = [float(side(ids, labels=ids).loss) for side in (before, after)]
    assert math.exp(losses[1] - losses[0]) == pytest.approx(1, abs=0.005)
    assert after.dtype == before.dtype
    assert stored_dtypes(artifact) == [str(before.dtype).removeprefix("torch.")]
    if way is head_of_its_own_under_a_tied_config:
        assert not after.config.tie_word_embeddings, "who ties by the config alone would lose the head"


@pytest.mark.parametrize("way", [*WAYS, two_of_which_neither_is_whole], ids=lambda way: way.__name__)
def test_the_files_are_those_that_transformers_resolves(model_of, way):
    """The rule is written out because processes without torch need it; here it is held against transformers' own."""
    folder = model_of(way)
    assert (SINGLE, INDEX) == (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME)
    resolve = getattr(modeling_utils, "_get_resolved_checkpoint_files", None)
    assert resolve, "transformers resolves checkpoint files elsewhere now; look whether weight_files still does as it does"
    arguments = dict.fromkeys(inspect.signature(resolve).parameters)
    named = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    arguments |= {"pretrained_model_name_or_path": str(folder), "use_safetensors": True, "transformers_explicit_filename": named}
    resolved, _ = resolve(**arguments)
    assert sorted(resolved) == [str(file) for file in weight_files(folder)]
    assert file_bytes(folder) == sum(file.stat().st_size for file in weight_files(folder))


def test_weights_beside_are_no_part_of_what_a_model_is(model_of):
    folder = model_of(lambda *_: None)
    before = fingerprint(Source(str(folder), "causal-lm"))
    stray_file(folder, load_file(folder / SINGLE))
    assert fingerprint(Source(str(folder), "causal-lm")) == before
    put(noise(load_file(folder / SINGLE)), folder / SINGLE)
    assert fingerprint(Source(str(folder), "causal-lm")) != before


def test_weights_are_read_one_module_at_a_time_and_changed_apart(model_of, tmp_path):
    folder = model_of(lambda *_: None)
    filled, weights = empty(Source(str(folder), "causal-lm"), tmp_path)
    weights.fill(filled, "model.layers.1", "cpu")
    assert not any(p.is_meta for p in filled.model.layers[1].parameters())
    assert all(p.is_meta for p in filled.model.layers[0].parameters())
    filled.model.layers[1].mlp.up_proj.weight.data.zero_()
    weights.fill(filled, "model.layers.1", "cpu")
    stored = load_file(folder / SINGLE)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(filled.model.layers[1].mlp.up_proj.weight, stored)


def test_names_that_differ_in_memory_are_transformers_business(tmp_path):
    """GPT-NeoX stores its weights under other names than it has in memory."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    folder = saved(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), tmp_path / "neox")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    filled, weights = empty(Source(str(folder), "causal-lm"), tmp_path)
    weights.fill(filled, "", "cpu")
    assert all(torch.equal(filled.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_experts_that_files_hold_one_by_one_are_read_so(tmp_path):
    """Put together first, they would all be in memory at once."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = saved(MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)), tmp_path / "mixtral")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    filled, weights = empty(Source(str(folder), "causal-lm"), tmp_path)
    assert not weights._tensors
    weights.fill(filled, "", "cpu")
    experts.fuse(filled)
    assert all(torch.equal(filled.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_gpt2_is_read_with_ordinary_layers(toys, tmp_path):
    filled, weights = empty(Source(str(toys["gpt2"]), "causal-lm"), tmp_path)
    weights.fill(filled, "", "cpu")
    filled.tie_weights(recompute_mapping=False)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(make_model("gpt2").eval()(ids).logits, filled(ids).logits, atol=1e-5)
