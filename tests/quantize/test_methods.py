"""Every method on every architecture: its artifact loads with plain transformers, is near the original, and smaller."""

import json
import re
from pathlib import Path

import pytest
import torch

from compress import held, methods
from compress.errors import BrokenPromise, MissingPackage
from compress.model.folder import file_bytes
from compress.model.loading import AUTO, load_model, parameter_count
from compress.model.source import Source
from tests.blocks import ODD, made, run
from tests.conftest import TASKS, make_model, make_tokenizer
from tests.plain import plain

# settings, and the largest relative error of the logits of a random model: about sqrt(layers) times the grid's own error
CASES = {
    "cast": ({"dtype": "bfloat16"}, 0.02),
    "int8_dynamic": ({}, 0.04),
    "bnb_int8": ({}, 0.04),
    "bnb_nf4": ({}, 0.30),
    "rtn": ({"bits": 8, "group_size": 32, "symmetric": True}, 0.04),
    "gptq": ({"bits": 4, "group_size": 32, "symmetric": True}, 0.30),
    "awq": ({"bits": 4, "group_size": 32}, 0.30),
    "autoround": ({"bits": 8, "group_size": -1, "steps": 40}, 0.06),
    "smoothquant": ({}, 0.06),
    "int8_static": ({}, 0.06),
    "fp8": ({}, 0.15),
    "qat": ({"bits": 8, "group_size": -1, "steps": 5, "batch_size": 2, "learning_rate": 1e-6}, 0.08),
}
PAIRS = [
    pytest.param(method, kind, id=f"{method}-{kind}")
    for method in CASES
    for kind in TASKS
    if not (method == "int8_static" and kind in ("t5", "bart"))  # refused, see below
]


def make(folder, kind, method, target, device="cpu", **settings):
    return run("quantize", method, folder, kind, target, device=device, **settings)


def logits(folder, kind, dtype="auto"):
    loaded = load_model(Source(str(folder), TASKS[kind], dtype), "cpu")
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids[:, :8]} if loaded.config.is_encoder_decoder else {}
    with torch.no_grad():
        return loaded, loaded(input_ids=ids, **extra).logits.float()


def told(loaded):
    """What a model's generation config says, but for who wrote it."""
    settings = loaded.generation_config.to_dict()
    return {key: value for key, value in settings.items() if key not in ("transformers_version", "_from_model_config")}


def test_every_method_is_tested_here():
    assert set(CASES) == set(methods.names("quantize"))


@pytest.mark.parametrize(("family", "name", "method"), [pytest.param(*m, id=m[1]) for m in methods.everyone()])
def test_the_contract(family, name, method):
    assert method.__doc__ and len(method.__doc__.split("\n")[0]) > 20
    assert issubclass(method.Settings, methods.Settings)
    assert callable(method.apply)
    assert isinstance(method.ABOUT, methods.About)
    assert method.ABOUT.at_run_time
    source = Path(method.__file__).read_text()
    assert not [other for other in methods.names(family) if re.search(rf"compress\.{family}(\.| import ){other}\b", source)], (
        "methods are apart"
    )
    assert not method.ABOUT.packages or method.ABOUT.extra or set(method.ABOUT.packages) <= {"torch", "torchao", "transformers"}


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if "cpu" in methods.find("quantize", pair.values[0]).ABOUT.devices])
def test_the_artifact_is_near_the_original_and_smaller(toys, tmp_path, kind, method):
    settings, tolerance = CASES[method]
    target = make(toys[kind], kind, method, tmp_path / "made", **settings)
    before, expected = logits(toys[kind], kind, "float32")
    after, actual = logits(target, kind)
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance
    assert (actual - expected).norm() > 0, "nothing was changed"
    assert parameter_count(after) == parameter_count(before)
    if before.can_generate():
        assert told(after) == told(before), "the artifact generates as its model does"
    if "compressed-tensors" not in methods.find("quantize", method).ABOUT.packages:  # transformers unpacks these at loading
        assert held.weight_bytes(after) < held.weight_bytes(before)
    assert file_bytes(target) < file_bytes(toys[kind])


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_the_same_on_a_gpu(toys, tmp_path, kind, method):
    if methods.find("quantize", method).ABOUT.missing():
        pytest.skip("its backend is not installed")
    settings, tolerance = CASES[method]
    target = make(toys[kind], kind, method, tmp_path / "made", device="cuda", **settings)
    loaded = load_model(Source(str(target), TASKS[kind]), "cuda")
    ids = torch.arange(3, 23, device="cuda")[None]
    extra = {"decoder_input_ids": ids[:, :8]} if loaded.config.is_encoder_decoder else {}
    with torch.no_grad():
        actual = loaded(input_ids=ids, **extra).logits.float().cpu()
    _, expected = logits(toys[kind], kind, "float32")
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("t5", "int8_dynamic"),
        ("bart", "int8_dynamic"),
        ("gpt2", "int8_dynamic"),
        ("llama", "bnb_nf4"),
        ("t5", "bnb_int8"),
        ("t5", "gptq"),
        ("bart", "rtn"),
        ("gpt2", "gptq"),
        ("t5", "awq"),
        ("bart", "smoothquant"),
        ("gpt2", "int8_static"),
    ],
)
def test_it_loads_without_this_package_and_says_the_same(toys, tmp_path, kind, method):
    target = make(toys[kind], kind, method, tmp_path / "made", **CASES[method][0])
    loaded = load_model(Source(str(target), TASKS[kind]), "cpu")
    ids = torch.arange(3, 13)[None]
    here = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)[
        0
    ].tolist()
    program = """
        import sys, json, torch, transformers
        target, auto = sys.argv[1:]
        loaded = getattr(transformers, auto).from_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(target)
        ids = torch.arange(3, 13)[None]
        out = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        print(json.dumps(out[0].tolist()))
    """
    assert json.loads(plain(program, target, AUTO[TASKS[kind]]).strip().splitlines()[-1]) == here


def test_int8_rows_are_on_their_own_grid(toys, tmp_path):
    """Weights against round-to-nearest by absolute maximum per row, written out in float64."""
    target = make(toys["llama"], "llama", "int8_dynamic", tmp_path / "made")
    before = load_model(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu").model.layers[0].mlp.down_proj.weight.double()
    after = load_model(Source(str(target), "causal-lm"), "cpu").model.layers[0].mlp.down_proj.weight.dequantize().double()
    step = before.abs().amax(dim=1, keepdim=True) / 127.5
    assert ((after - before).abs() <= step * 0.5001 + 1e-6).all()


@pytest.mark.parametrize(
    ("method", "per_layer"),
    [
        ("bnb_int8", lambda rows, columns: rows * columns + 4 * rows),  # a byte a weight, a float32 scale a row
        ("int8_dynamic", lambda rows, columns: rows * columns + rows * 4 + rows),  # and an int8 zero point
        # half a byte a weight; a byte a block of 64; for those a float32 scale a 256 of them, a code book of 256 and one offset; NF4's own 16
        (
            "bnb_nf4",
            lambda rows, columns: rows * columns // 2 + rows * columns // 64 + 4 * -(-rows * columns // 64 // 256) + 4 * 256 + 4 + 4 * 16,
        ),
    ],
)
def test_packed_weights_are_counted_to_the_byte(toys, tmp_path, method, per_layer):
    whole = load_model(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    target = make(toys["llama"], "llama", method, tmp_path / "made")
    packed = load_model(Source(str(target), "causal-lm"), "cpu")
    left = ("lm_head", *ODD) if method == "bnb_nf4" else ("lm_head",)
    linear = {n: m for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith(left)}
    rest = held.weight_bytes(whole) - sum(4 * m.weight.numel() for m in linear.values())
    expected = rest + sum(per_layer(*m.weight.shape) for m in linear.values())
    assert held.weight_bytes(packed) == pytest.approx(expected, rel=0.001)


def test_ignored_layers_stay_as_they_are(toys, tmp_path):
    target = make(toys["llama"], "llama", "bnb_nf4", tmp_path / "made", ignore=["lm_head", "q_proj"])
    after = load_model(Source(str(target), "causal-lm"), "cpu").model.layers[0].self_attn
    assert type(after.q_proj) is torch.nn.Linear
    assert type(after.k_proj).__name__ == "Linear4bit"


def test_t5_keeps_wo_in_float32_when_cast_to_float16(toys, tmp_path):
    target = make(toys["t5"], "t5", "cast", tmp_path / "made", dtype="float16")
    loaded = load_model(Source(str(target), "seq2seq"), "cpu")
    block = loaded.encoder.block[0].layer[1].DenseReluDense
    assert (block.wo.weight.dtype, block.wi_0.weight.dtype) == (torch.float32, torch.float16)


def test_t5_with_large_activations_survives_float16(tmp_path):
    """FLAN-T5's trap: inner activations near float16's maximum, which `wo` sums up past it."""
    huge = make_model("t5")
    with torch.no_grad():
        for block in [*huge.encoder.block, *huge.decoder.block]:
            block.layer[-1].DenseReluDense.wi_1.weight.mul_(60)
            block.layer[-1].DenseReluDense.wi_0.weight.mul_(60)
            block.layer[-1].DenseReluDense.wo.weight.mul_(10)
    huge.save_pretrained(tmp_path / "huge")
    make_tokenizer().save_pretrained(tmp_path / "huge")
    target = make(tmp_path / "huge", "t5", "cast", tmp_path / "made", dtype="float16")
    _, expected = logits(tmp_path / "huge", "t5", "float32")
    _, actual = logits(target, "t5")
    assert torch.isfinite(actual).all()
    assert ((actual - expected).norm() / expected.norm()).item() < 0.05


def test_casting_to_the_same_dtype_is_refused(toys, tmp_path):
    half = make(toys["llama"], "llama", "cast", tmp_path / "half", dtype="bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(BrokenPromise, match="is in bfloat16 already"):
        made(Source(str(half), "causal-lm"), "quantize", "cast", {"dtype": "bfloat16"}, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nan_weights_fail_the_stage_and_leave_nothing(toys, tmp_path):
    sick = make_model("llama")
    with torch.no_grad():
        sick.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    sick.save_pretrained(tmp_path / "sick")
    make_tokenizer().save_pretrained(tmp_path / "sick")
    with pytest.raises(BrokenPromise, match="NaN or infinite logits"):
        make(tmp_path / "sick", "llama", "cast", tmp_path / "made")
    assert [f.name for f in tmp_path.iterdir()] == ["sick"]


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_transformers_that_would_not_read_them_is_named_before_the_work(toys, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("transformers.__version__", "5.22.0")
    message = (
        r"packed weights of a (t5|gpt_bigcode) need transformers 5\.23 or newer, and here is 5\.22\.0; pip install 'transformers>=5\.23'"
    )
    with pytest.raises(MissingPackage, match=message):
        make(toys[kind], kind, "rtn", tmp_path / "made")
    make(toys["llama"], "llama", "rtn", tmp_path / "other")
