"""What a step reads and computes, against counts by hand from the models' shapes."""

import pytest

from compress.engines.transformers import timing, work
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.runtime import use_cpu_int8
from tests.conftest import TASKS
from tests.quantize.test_methods import make

BATCH, PROMPT, D = 2, 8, 64


def counted(folder, kind, dtype="float32", prepare=lambda model: None):
    """A generation of 4 tokens (three steps), or one classification."""
    model = Bundle(Source(str(folder), TASKS[kind], dtype), "cpu").model
    prepare(model)
    counter = work.Counter()
    inputs = timing.prompts(model, BATCH, PROMPT)
    with counter.watching(model):
        if model.can_generate():
            timing.generate(model, inputs, 4, counter)
        else:
            timing.classify(model, inputs, 1, counter)
    assert not any(module._forward_hooks for module in model.modules())
    return counter


def test_a_llama_reads_all_but_the_embedding_each_step(toys):
    """Two blocks: q and o of 64 x 64, k and v of 32 x 64, three of 172 x 64; two norms a block and one after; a tied head of 64 x 64."""
    counter = counted(toys["llama"], "llama")
    block = 2 * D * D + 2 * 32 * D + 3 * 172 * D
    linear, norms = 2 * block, 5 * D
    rotary = 8 * 4  # the frequencies, which are a buffer
    looked_up = BATCH * D
    assert counter.step.weight_bytes == pytest.approx(4 * (linear + norms + D * D + looked_up) + rotary, abs=rotary)
    assert counter.step.flops == 2 * BATCH * (linear + D * D)
    assert counter.prefill.flops == 2 * BATCH * (PROMPT * linear + D * D), "the head is asked for the last token alone"
    assert counter.cache_bytes == 4 * 2 * 2 * BATCH * (PROMPT + 3) * 32, "layers x keys and values x tokens x 2 heads of 16"


def test_an_encoder_decoder_reads_its_decoder_without_what_is_cached(toys):
    """T5 of two blocks: attention of four 64 x 64, a gated feed-forward of three 128 x 64; a head of its own."""
    counter = counted(toys["t5"], "t5")
    attention, feed = 4 * D * D, 3 * 128 * D
    step = 2 * (attention + 2 * D * D + feed) + D * D
    assert counter.step.flops == 2 * BATCH * step
    norms, looked_up = 7 * D, BATCH * D
    positions = 4 * 2  # of the new token's place, a bias for each head
    assert counter.step.weight_bytes == pytest.approx(4 * (step + norms + looked_up + positions), abs=64)
    encoder = 2 * (attention + feed) * PROMPT
    crossed = 2 * 2 * D * D * PROMPT
    assert counter.prefill.flops == 2 * BATCH * (encoder + crossed + step)
    assert counter.cache_bytes == 4 * 2 * 2 * BATCH * D * (PROMPT + 1 + 3), "a start token before the three"


def test_half_the_bytes_in_half_the_width(toys):
    whole, half = (counted(toys["gpt2"], "gpt2", dtype) for dtype in ("float32", "bfloat16"))
    assert half.step.weight_bytes == pytest.approx(whole.step.weight_bytes / 2, rel=0.01)
    assert half.step.flops == whole.step.flops == 2 * BATCH * (2 * 12 * D * D + D * D)


def test_a_classification_is_all_prefill(toys):
    counter = counted(toys["bert"], "bert")
    blocks, pooler, head = 2 * (4 * D * D + 2 * 128 * D), D * D, 2 * D
    assert counter.prefill.flops == 2 * BATCH * (PROMPT * blocks + pooler + head)
    assert (counter.step.flops, counter.cache_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("method", "bits", "prepare"),
    [("bnb_nf4", 4, lambda model: None), ("int8_dynamic", 8, lambda model: None), ("int8_dynamic", 8, use_cpu_int8)],
)
def test_packed_weights_are_read_packed_and_multiplied_whole(toys, tmp_path, method, bits, prepare):
    whole = counted(toys["llama"], "llama")
    settings = {"double_quant": False} if method == "bnb_nf4" else {}  # a layer so small has more code books than scales
    packed = counted(make(toys["llama"], "llama", method, tmp_path / "made", **settings), "llama", "auto", prepare)
    assert packed.step.flops == whole.step.flops
    linear = 2 * (2 * D * D + 2 * 32 * D + (0 if method == "bnb_nf4" else 3 * 172 * D))  # 4 bits aren't taken by 172
    saved = whole.step.weight_bytes - packed.step.weight_bytes
    assert saved == pytest.approx(linear * (4 - bits / 8), rel=0.1), "scales are read too"
