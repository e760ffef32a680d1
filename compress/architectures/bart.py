"""BART: the hidden size is that of its heads together, on either side."""

from compress.architectures import CHANNEL, HEAD, HIDDEN, WRITES, Architecture
from compress.shape import Config, Shape, Stack, labels

LAYERS = {
    "shared|embed_tokens|embed_positions|lm_head|classification_head.out_proj": (None, HIDDEN),
    "classification_head.dense": (HIDDEN, HIDDEN),
    "[qkv]_proj": (HEAD, HIDDEN),
    "out_proj": (HIDDEN, HEAD),
    "fc1": (CHANNEL, HIDDEN),
    "fc2": (HIDDEN, CHANNEL),
    "layernorm_embedding|self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm": (HIDDEN,),
}


def shape(config: Config, task: str) -> Shape:
    width, vocabulary = config["d_model"], config["vocab_size"]

    def stack(side: str, crossed: bool) -> Stack:
        heads = config[f"{side}_attention_heads"]
        return Stack(config[f"{side}_layers"], width, heads, heads, width // heads, config[f"{side}_ffn_dim"], crossed=crossed)

    encoder, decoder = stack("encoder", crossed=False), stack("decoder", crossed=True)
    around = 2 * ((config["max_position_embeddings"] + 2) * width + 2 * width)  # positions and norm before each stack
    biases = [stack.layers * ((8 if stack.crossed else 4) + 1) * width + stack.layers * stack.feed_forward for stack in (encoder, decoder)]
    norms = 2 * width * (2 * encoder.layers + 3 * decoder.layers)
    other, buffers = vocabulary * width + around + sum(biases) + norms, 0
    if task == "sequence-classification":
        other += width * (width + 1) + labels(config) * (width + 1)
    else:
        buffers = vocabulary  # a bias of the logits
        other += 0 if config.get("tie_word_embeddings", True) else vocabulary * width
    return Shape.of("BART", task, encoder, decoder, other, buffers, vocabulary)


ARCHITECTURE = Architecture(tasks=WRITES, shape=shape, layers=LAYERS)
