"""4-bit layers as a CPU with AVX-512 BF16 lays them out anew, bitsandbytes' kernel for it written out in Python; shapes that it doesn't take.

What runs here is bitsandbytes' own code but for that kernel, whose instructions most machines lack.
"""

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, modules

from compress import bnb, stage
from compress.errors import BrokenPromise, ModelError
from compress.held import weight_bytes
from compress.model.loading import load_model, parameter_count
from compress.model.source import Source
from tests.blocks import bundle, context, saved
from tests.conftest import TASKS, make_model, make_tokenizer

IDS = torch.arange(3, 23)[None]


def fused(states, integers, out=None, state=None, **_):
    """states @ weight.T in bfloat16, from the packed layout: 32 rows side by side, two columns a byte, scales by column."""
    rows, columns = state.shape
    halves = torch.stack([integers.reshape(-1, 32) & 15, integers.reshape(-1, 32) >> 4], dim=1).reshape(-1, 64)
    numbers = halves.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(rows, columns)
    weight = state.code[numbers.long()] * state.absmax.float().T.repeat_interleave(state.blocksize, dim=1)
    return (states.bfloat16() @ weight.bfloat16().T).to(states.dtype)


@pytest.fixture
def repacking(monkeypatch):
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(functional, "gemv_4bit", fused)


def packed(folder, kind):
    return load_model(Source(str(folder), TASKS[kind], "float32", bits=4), "cpu")


def run(model):
    with torch.no_grad():
        return model(IDS, **({"decoder_input_ids": IDS[:, :8]} if model.config.is_encoder_decoder else {})).logits


def linear4bit(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def test_what_is_touched_of_bitsandbytes_is_there():
    """Gone in a later version, the layout needs another look."""
    assert callable(functional._convert_weight_packed_for_cpu_inverse)
    assert hasattr(Linear4bit(64, 32), "support_avx512bf16_for_cpu")


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_layers_laid_out_anew_compute_alike_and_are_counted_whole(toys, kind, repacking):
    model = packed(toys[kind], kind)
    layers = linear4bit(model)
    before, numbers = weight_bytes(model), parameter_count(model)
    plain = {name: bnb.unpacked(layer).clone() for name, layer in layers.items()}
    run(model)
    assert layers and all(layer.weight.quant_state.packing_format_for_cpu for layer in layers.values())
    # scales of two bytes a block of 64, in the place of one with scales of their own (a float32 a 256, a code of 256, an offset)
    sizes = [layer.weight.quant_state.shape.numel() for layer in layers.values()]
    blocks = [size // 64 for size in sizes]
    growth = sum(2 * count - (count + 4 * -(-count // 256) + 4 * 256) for count in blocks)
    assert weight_bytes(model) == pytest.approx(before + growth, abs=4 * len(blocks))
    assert parameter_count(model) == numbers
    for name, layer in layers.items():
        assert torch.allclose(bnb.unpacked(layer).float(), plain[name], rtol=2**-8, atol=0), "scales are rounded to bfloat16"
    assert torch.equal(run(model), run(model)), "looking changed nothing"


@pytest.mark.parametrize("change", [{}, {"intermediate_size": 160}])  # 172: neither rows nor columns; 160: rows but no columns
def test_odd_shapes_are_left_whole_by_name(tmp_path, repacking, change):
    model = make_model("llama")
    config = model.config
    config.update(change)
    folder = saved(type(model)(config), tmp_path / "odd")
    seen = context()
    quantised = stage.methods.find("quantize", "bnb_nf4").apply(
        bundle(folder, "llama"), stage.methods.find("quantize", "bnb_nf4").Settings(), seen
    )
    odd = {row["name"] for row in seen.layers if row["remark"] == f"left out: {bnb.ODD}"}
    assert {name.rsplit(".", 1)[-1] for name in odd} == ({"down_proj"} if change else {"gate_proj", "up_proj", "down_proj"})
    assert torch.isfinite(run(quantised.model)).all()
    assert odd.isdisjoint(linear4bit(quantised.model)) and odd.isdisjoint(linear4bit(packed(folder, "llama")))


def test_a_model_of_odd_shapes_alone_is_refused_before_the_work(tmp_path, monkeypatch):
    model = make_model("llama")
    config = model.config
    config.update({"hidden_size": 48, "head_dim": 12})
    folder = saved(type(model)(config), tmp_path / "odd")
    method = stage.methods.find("quantize", "bnb_nf4")
    monkeypatch.setattr(method, "load_model", None)
    with pytest.raises(
        BrokenPromise, match=r"bnb_nf4: would touch no layer: bitsandbytes computes .* rows are a multiple of 32 and columns of 64"
    ):
        method.apply(bundle(folder, "llama"), method.Settings(), context())


def test_a_model_that_others_packed_in_odd_shapes_is_refused_on_such_a_cpu(toys, tmp_path, repacking):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(toys["llama"], quantization_config=how).save_pretrained(tmp_path / "made")
    make_tokenizer().save_pretrained(tmp_path / "made")
    with pytest.raises(ModelError, match=r"made: 6 layers, such as model\.layers\.0\.mlp\.gate_proj, can't run on this CPU: bitsandbytes"):
        load_model(Source(str(tmp_path / "made"), "causal-lm"), "cpu")
