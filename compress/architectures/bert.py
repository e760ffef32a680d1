"""BERT: an encoder whose hidden size is that of its heads together."""

from compress.architectures import CHANNEL, HEAD, HIDDEN, Architecture
from compress.shape import Config, Shape, Stack, labels

LAYERS = {
    "word_embeddings|position_embeddings|token_type_embeddings|classifier|classifier.out_proj": (None, HIDDEN),
    "pooler.dense|classifier.dense": (HIDDEN, HIDDEN),
    "query|key|value": (HEAD, HIDDEN),
    "attention.output.dense": (HIDDEN, HEAD),
    "intermediate.dense": (CHANNEL, HIDDEN),
    "output.dense": (HIDDEN, CHANNEL),
    "LayerNorm": (HIDDEN,),
}


def shape(config: Config, task: str) -> Shape:
    width, heads, vocabulary, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"))
    inner, positions = config["intermediate_size"], config["max_position_embeddings"]
    encoder = Stack(layers, width, heads, heads, width // heads, inner)
    other = (vocabulary + positions + config.get("type_vocab_size", 2) + 2) * width + layers * (4 * width + 5 * width + inner)
    other += width * (width + 1) + labels(config) * (width + 1)  # the pooler and the labels
    return Shape.of("BERT", task, encoder, None, other, 4 * positions, vocabulary)


ARCHITECTURE = Architecture(tasks=("sequence-classification",), shape=shape, layers=LAYERS)
