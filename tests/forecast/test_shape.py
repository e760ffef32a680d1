"""Numbers of weights from config.json, held against transformers' own models and published figures."""

import json
from collections import Counter

import pytest
import torch
import transformers

from compress.architectures import read
from compress.errors import ModelError
from compress.model.loading import AUTO

# fmt: off
CONFIGS = [
    ("seq2seq", transformers.T5Config(vocab_size=500, d_model=64, d_kv=24, d_ff=200, num_layers=3, num_decoder_layers=2, num_heads=4)),
    ("seq2seq", transformers.T5Config(vocab_size=500, d_model=64, d_ff=200, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    ("seq2seq", transformers.MT5Config(vocab_size=500, d_model=64, d_ff=200, num_layers=2)),
    ("sequence-classification", transformers.T5Config(vocab_size=500, d_model=64, d_ff=200, num_layers=2, num_labels=5)),
    (
        "seq2seq",
        transformers.BartConfig(
            vocab_size=600, d_model=96, encoder_layers=3, decoder_layers=1, encoder_ffn_dim=300, decoder_ffn_dim=100,
            encoder_attention_heads=8, decoder_attention_heads=4, max_position_embeddings=77,
        ),
    ),
    ("sequence-classification", transformers.BartConfig(vocab_size=600, d_model=96, encoder_layers=2, decoder_layers=2, num_labels=3)),
    ("causal-lm", transformers.LlamaConfig(vocab_size=700, hidden_size=96, intermediate_size=200, num_hidden_layers=3)),
    (
        "causal-lm",
        transformers.LlamaConfig(
            vocab_size=700, hidden_size=96, intermediate_size=200, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            head_dim=20, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        ),
    ),
    ("sequence-classification", transformers.LlamaConfig(vocab_size=700, hidden_size=96, intermediate_size=200, num_labels=4)),
    (
        "causal-lm",
        transformers.MistralConfig(
            vocab_size=700, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        ),
    ),
    (
        "causal-lm",
        transformers.Qwen2Config(
            vocab_size=700, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
    ),
    (
        "causal-lm",
        transformers.Qwen3Config(
            vocab_size=700, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        ),
    ),
    ("causal-lm", transformers.GPT2Config(vocab_size=700, n_embd=96, n_layer=3, n_head=4, n_positions=50)),
    ("causal-lm", transformers.GPT2Config(vocab_size=700, n_embd=96, n_layer=3, n_head=4, n_inner=100, tie_word_embeddings=False)),
    ("sequence-classification", transformers.GPT2Config(vocab_size=700, n_embd=96, n_layer=3, n_head=4, num_labels=7)),
    ("sequence-classification", transformers.BertConfig(vocab_size=700, hidden_size=96, intermediate_size=100, type_vocab_size=3)),
]
# fmt: on
PUBLISHED = {
    "flan-t5-base": (
        "seq2seq",
        247.6e6,
        {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 12,
            "num_heads": 12,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "bart-base": (
        "seq2seq",
        139.4e6,
        {
            "model_type": "bart",
            "vocab_size": 50265,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "max_position_embeddings": 1024,
        },
    ),
    "bert-base": (
        "sequence-classification",
        109.5e6,
        {
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
        },
    ),
    "gpt2": (
        "causal-lm",
        124.4e6,
        {
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
        },
    ),
    "llama-2-7b": (
        "causal-lm",
        6.738e9,
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3-8b": (
        "causal-lm",
        8.030e9,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2.5-0.5b": (
        "causal-lm",
        494.0e6,
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("task", "config"), CONFIGS, ids=lambda value: getattr(value, "model_type", value))
def test_every_weight_is_counted(task, config, tmp_path):
    with torch.device("meta"):
        model = getattr(transformers, AUTO[task]).from_config(config)
    config.save_pretrained(tmp_path)
    shape = read(json.loads((tmp_path / "config.json").read_text()), task)
    assert shape.parameters == model.num_parameters()
    heads = ("lm_head", "score", "classifier", "classification_head", "pooler")
    blocks = [m for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and not any(h in name for h in heads)]
    assert shape.linear == sum(m.weight.numel() for m in blocks)
    columns = Counter[int]()
    for m in blocks:
        columns[m.weight.shape[0 if type(m).__name__ == "Conv1D" else 1]] += m.weight.numel()
    assert shape.columns == columns


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    task, published, config = PUBLISHED[name]
    assert read(config, task).parameters == pytest.approx(published, rel=0.001)


def test_another_architecture_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'mamba'.*supported: bart, bert, gpt2"):
        read({"model_type": "mamba"}, "causal-lm")
    with pytest.raises(ModelError, match="task causal-lm; known with it are seq2seq, sequence-classification"):
        read({"model_type": "t5"}, "causal-lm")
    with pytest.raises(ModelError, match="has to give 'n_embd'"):
        read({"model_type": "gpt2"}, "causal-lm")
    with pytest.raises(ModelError, match="no size"):
        read({**PUBLISHED["gpt2"][2], "n_layer": "twelve"}, "causal-lm")
