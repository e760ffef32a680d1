"""Llama, and what is built as it is: gated feed-forwards, queries that share keys and values, norms without a bias."""

from compress.architectures import LABELS, Architecture
from compress.shape import Config, Shape, Stack, head


def shape(config: Config, task: str) -> Shape:
    width, heads, vocabulary, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"))
    key_heads, head_width = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    decoder = Stack(layers, width, heads, key_heads, head_width, config["intermediate_size"], gated=True)
    kind = config["model_type"]
    other = vocabulary * width + width * (2 * layers + 1)
    if kind == "qwen2" or config.get("attention_bias"):
        other += layers * head_width * (heads + 2 * key_heads) + (0 if kind == "qwen2" else layers * width)
    if kind == "qwen3":
        other += layers * 2 * head_width  # norms of queries and keys
    if config.get("mlp_bias"):
        other += layers * (2 * decoder.feed_forward + width)
    other += head(config, task, width, tied=False)
    return Shape.of("Llama", task, None, decoder, other, head_width, vocabulary)


ARCHITECTURE = Architecture(tasks=LABELS, shape=shape, wide=True)
