"""T5: heads of a size of their own, a bias of positions for each head of a stack, and no bound on positions."""

from dataclasses import replace

from compress.architectures import WRITES, Architecture
from compress.shape import Config, Shape, Stack, labels


def shape(config: Config, task: str) -> Shape:
    width, heads, vocabulary = config["d_model"], config["num_heads"], config["vocab_size"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    layers = config["num_layers"]
    composed = "gelu" in str(config.get("feed_forward_proj"))  # T5's gelu is gelu_new
    encoder = Stack(layers, width, heads, heads, config["d_kv"], config["d_ff"], gated, composed=composed, biased_scores=True)
    decoder = replace(encoder, layers=config.get("num_decoder_layers") or layers, crossed=True)
    norms = width * (2 * encoder.layers + 3 * decoder.layers + 2)
    positions = 2 * heads * config.get("relative_attention_num_buckets", 32)
    other = vocabulary * width + norms + positions
    if task == "sequence-classification":
        other += width * (width + 1) + labels(config) * (width + 1)
    elif not config.get("tie_word_embeddings", True):
        other += vocabulary * width
    return Shape.of("T5", task, encoder, decoder, other, 0, vocabulary)


ARCHITECTURE = Architecture(tasks=WRITES, shape=shape, endless=True, wide=True)
