"""The calibration pass on one small random model of each kind: it shows layers what a plain forward pass does, or says that it can't."""

import pytest
import torch
import transformers

from compress.errors import ModelError
from compress.methods import LayerSettings
from compress.model import Bundle, Source
from compress.quantize import rtn
from compress.quantize._calibrated import quantise
from compress.quantize._pack import Packed
from tests.blocks import context, examples, saved
from tests.calibration.test_walk import assert_same_moments, one_by_one

ENDS = {"pad_token_id": 0, "eos_token_id": 1}
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "decoder_start_token_id": 0, **ENDS}
BERT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**BERT, "bos_token_id": 1, "eos_token_id": 1}
GROUPED = {**DECODER, "num_key_value_heads": 2}
BART = {
    "vocab_size": 64, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "bos_token_id": 0, "forced_eos_token_id": None, **ENDS,
}  # fmt: skip
PROPHET = {
    "vocab_size": 64, "hidden_size": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 1, **ENDS,
}  # fmt: skip
OPT = {
    "vocab_size": 64, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "word_embed_proj_dim": 64, **ENDS,
}  # fmt: skip
SMALL = {"vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4, **ENDS}

FOLLOWED = {
    "M2M100ForConditionalGeneration": BART,
    "PegasusForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "UMT5ForConditionalGeneration": T5,
    "LongT5ForConditionalGeneration": T5,
    "GPTNeoXForCausalLM": DECODER,
    "OPTForCausalLM": OPT,
    "FalconForCausalLM": {key: value for key, value in DECODER.items() if key != "max_position_embeddings"},
    "Phi3ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 16},
    "Cohere2ForCausalLM": GROUPED,
    "Glm4ForCausalLM": {**GROUPED, "head_dim": 16},
    "BloomForCausalLM": SMALL,
    "Lfm2ForCausalLM": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "DistilBertForSequenceClassification": {"vocab_size": 64, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "ModernBertForSequenceClassification": DECODER,
}
REFUSED = {
    "LEDForConditionalGeneration": (
        {**{key: value for key, value in BART.items() if key != "max_position_embeddings"}, "attention_window": 8},
        r"has hidden states of \(6, 24, 64\) for tokens of \(6, 17\)",
    ),
    "ProphetNetForConditionalGeneration": (PROPHET, r"has hidden states of \(6, 18, 64\) for tokens of \(6, 6\)"),
    "LongformerForSequenceClassification": ({**DECODER, "attention_window": 8}, r"has hidden states of \(6, 24, 64\)"),
    "DebertaV2ForSequenceClassification": (
        {**BERT, "relative_attention": True, "conv_kernel_size": 3, "conv_act": "gelu"}, "changes the hidden states between its blocks 0 and 1",
    ),
    "AlbertForSequenceClassification": ({**BERT, "embedding_size": 64}, "runs its 1 blocks more than once"),
}  # fmt: skip


def made(name, config, folder):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**config))
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if parameter.endswith("bias") and values.ndim == 1:
                values.normal_(std=0.2)
    task = "sequence-classification" if "Classification" in name else "causal-lm" if "CausalLM" in name else "seq2seq"
    return Bundle(Source(str(saved(model, folder)), task, "float32"), "cpu"), context(examples=examples(label="Classification" in name))


@pytest.mark.parametrize("name", FOLLOWED)
def test_layers_are_shown_what_a_forward_pass_gives_them(name, tmp_path):
    bundle, told = made(name, FOLLOWED[name], tmp_path)
    expected, seen = one_by_one(bundle, told), set()

    def look(block):
        for layer in block.layers:
            assert_same_moments(block, layer, expected[layer])
            seen.add(layer)
        block.layers.clear()

    with pytest.raises(Exception, match="every layer was left out"):
        quantise(bundle, LayerSettings(), told, Packed, look)
    assert len(seen) >= 8


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_and_rounded_without(name, tmp_path):
    config, why = REFUSED[name]
    bundle, told = made(name, config, tmp_path)
    with pytest.raises(ModelError, match=f"{name} {why}.*, which calibration block by block can't follow"):
        quantise(bundle, LayerSettings(), told, Packed, lambda block: None)
    rtn.apply(bundle, rtn.Settings(bits=8), told)
    assert any(sentence.startswith(f"what its layers lost wasn't measured: {name}") for sentence in told.said)
    assert any(layer["bits"] == 8 for layer in told.layers)
