"""What pruning made zero is zero after quantisation, read back by plain transformers."""

import pytest
import torch

from compress import bnb
from compress.model.loading import load_model
from compress.model.source import Source
from tests.blocks import run
from tests.conftest import TASKS

SETTINGS = {
    "rtn": {},
    "awq": {},
    "gptq": {},
    "autoround": {"steps": 20},
    "qat": {"steps": 10, "batch_size": 2, "learning_rate": 1e-2},
    "smoothquant": {},
    "int8_dynamic": {},
    "bnb_nf4": {},
}


def dense(folder, kind):
    """Every linear layer's weight as it computes with it, by name."""
    loaded = load_model(Source(str(folder), TASKS[kind]), "cpu")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():  # some formats unpack at the first step
        loaded(ids, **({"decoder_input_ids": ids[:, :8]} if loaded.config.is_encoder_decoder else {}))
    weights = {}
    for name, module in loaded.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and weight is not None:
            if hasattr(weight, "quant_state"):
                weight = bnb.unpacked(module)
            weights[name] = weight.dequantize() if hasattr(weight, "dequantize") else weight
    return weights


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", SETTINGS)
def test_zeros_stay_zero(toys, tmp_path, method, kind):
    pruned = run("prune", "magnitude", toys[kind], kind, tmp_path / "pruned")
    grid = {} if method in ("smoothquant", "int8_dynamic", "bnb_nf4") else {"bits": 4, "group_size": 32}
    quantised = run("quantize", method, pruned, kind, tmp_path / "made", **grid, **SETTINGS[method])
    before, after = dense(pruned, kind), dense(quantised, kind)
    sparse = [name for name, weight in before.items() if 0.4 < (weight == 0).double().mean() < 0.6]
    assert len(sparse) >= 12
    for name in sparse:
        assert not after[name][before[name] == 0].any(), name
        assert after[name].any()


@pytest.mark.parametrize("method", ["gptq", "autoround", "qat"])
def test_zeros_are_filled_where_the_recipe_says_so(toys, tmp_path, method):
    pruned = run("prune", "magnitude", toys["llama"], "llama", tmp_path / "pruned")
    quantised = run("quantize", method, pruned, "llama", tmp_path / "made", bits=4, group_size=32, keep_zeros=False, **SETTINGS[method])
    name = "model.layers.0.self_attn.q_proj"
    before, after = dense(pruned, "llama")[name], dense(quantised, "llama")[name]
    assert after[before == 0].any()
