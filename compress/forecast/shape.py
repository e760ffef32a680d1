"""The shape of a model, from its config.json: how many weights it has and where, architecture by architecture.

Each function adds up what transformers makes of such a config; the tests hold every sum against the real thing.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from compress.errors import ModelError

Config = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one after another.

    width                  of the hidden states that go from block to block
    heads, key_heads       of queries, and of keys and values; fewer of these where queries share them (grouped-query attention)
    head_width             of each; heads x head_width needn't be `width` (T5)
    feed_forward, gated    the inner width of the feed-forward layers; gated ones have two such layers side by side
    crossed                whether each block has a second attention, to an encoder's output
    composed               whether the activation function is one of several operations in transformers (gelu_new), which hold more at once
    biased_scores          whether a bias is added to attention's scores, head by head (T5), which rules the kernels without scores out
    """

    layers: int
    width: int
    heads: int
    key_heads: int
    head_width: int
    feed_forward: int
    gated: bool = False
    crossed: bool = False
    composed: bool = False
    biased_scores: bool = False

    @property
    def linear(self) -> int:
        """Weights of the linear layers of all blocks, biases left out."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_heads)
        return self.layers * (attention * (2 if self.crossed else 1) + self.width * self.feed_forward * (3 if self.gated else 2))

    def padded(self, multiple: int) -> int:
        """The same where each layer's columns are padded to a multiple."""
        width, inner, heads = (
            -(-columns // multiple) * multiple for columns in (self.width, self.feed_forward, self.heads * self.head_width)
        )
        attention = width * self.head_width * (self.heads + 2 * self.key_heads) + heads * self.width
        feed_forward = width * self.feed_forward * (2 if self.gated else 1) + inner * self.width
        return self.layers * (attention * (2 if self.crossed else 1) + feed_forward)

    @property
    def columns(self) -> Counter[int]:
        """The same weights by the columns of the layers that they are in."""
        inner, sides = self.heads * self.head_width, 2 if self.crossed else 1
        found = Counter[int]()
        found[self.width] += self.layers * self.width * self.head_width * (self.heads + 2 * self.key_heads) * sides
        found[inner] += self.layers * self.width * inner * sides
        found[self.width] += self.layers * self.width * self.feed_forward * (2 if self.gated else 1)
        found[self.feed_forward] += self.layers * self.width * self.feed_forward
        return found


@dataclass(frozen=True)
class Shape:
    """A whole model.

    linear      weights of the blocks' linear layers, which is what is quantised
    other       all other weights: embeddings, norms, biases, heads
    buffers     numbers that are no weights and are loaded or computed, 4 bytes each
    vocabulary  width of the output; None for a classifier
    """

    architecture: str
    encoder: Stack | None
    decoder: Stack | None
    linear: int
    other: int
    buffers: int
    vocabulary: int | None

    @property
    def columns(self) -> Counter[int]:
        """How many weights of the blocks' linear layers are in layers of so many columns."""
        return sum((stack.columns for stack in (self.encoder, self.decoder) if stack), Counter[int]())

    @property
    def parameters(self) -> int:
        return self.linear + self.other


def read(config: Config, task: str) -> Shape:
    """The shape that a config.json describes when it serves a task.

    Raises ModelError for an architecture or a task of it that isn't known here, and for a config that lacks a number.
    """
    kind = str(config.get("model_type"))
    known = {architecture: tasks for architecture, (_, tasks) in ARCHITECTURES.items()}
    if kind not in ARCHITECTURES:
        raise ModelError(f"model_type {kind!r}: its sizes can't be told from its config; known are {', '.join(known)}")
    count, tasks = ARCHITECTURES[kind]
    if task not in tasks:
        raise ModelError(f"model_type {kind!r} isn't known here with task {task}; known with it are {', '.join(tasks)}")
    try:
        return count(config, task)
    except KeyError as error:
        raise ModelError(f"the config.json of a {kind} has to give {error}, and this one doesn't") from None
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"the config.json of this {kind} holds something that is no size: {error}") from None


def _t5(config: Config, task: str) -> Shape:
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
        other += width * (width + 1) + _labels(config) * (width + 1)
    elif not config.get("tie_word_embeddings", True):
        other += vocabulary * width
    return _shape("T5", task, encoder, decoder, other, 0, vocabulary)


def _bart(config: Config, task: str) -> Shape:
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
        other += width * (width + 1) + _labels(config) * (width + 1)
    else:
        buffers = vocabulary  # a bias of the logits
        other += 0 if config.get("tie_word_embeddings", True) else vocabulary * width
    return _shape("BART", task, encoder, decoder, other, buffers, vocabulary)


def _llama(config: Config, task: str) -> Shape:
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
    other += _head(config, task, width, tied=False)
    return _shape("Llama", task, None, decoder, other, head_width, vocabulary)


def _gpt2(config: Config, task: str) -> Shape:
    width, heads, vocabulary, layers = (config[key] for key in ("n_embd", "n_head", "vocab_size", "n_layer"))
    inner = config.get("n_inner") or 4 * width
    decoder = Stack(
        layers, width, heads, heads, width // heads, inner, composed=config.get("activation_function", "gelu_new") == "gelu_new"
    )
    other = (vocabulary + config["n_positions"]) * width + layers * (4 * width + 5 * width + inner) + 2 * width
    other += _head(config, task, width, tied=True)
    return _shape("GPT-2", task, None, decoder, other, 0, vocabulary)


def _bert(config: Config, task: str) -> Shape:
    width, heads, vocabulary, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"))
    inner, positions = config["intermediate_size"], config["max_position_embeddings"]
    encoder = Stack(layers, width, heads, heads, width // heads, inner)
    other = (vocabulary + positions + config.get("type_vocab_size", 2) + 2) * width + layers * (4 * width + 5 * width + inner)
    other += width * (width + 1) + _labels(config) * (width + 1)  # the pooler and the labels
    return _shape("BERT", task, encoder, None, other, 4 * positions, vocabulary)


def _head(config: Config, task: str, width: int, tied: bool) -> int:
    """What stands on a decoder: a row for each label, or for each token where the embedding doesn't serve for it."""
    if task == "sequence-classification":
        return _labels(config) * width
    return 0 if config.get("tie_word_embeddings", tied) else int(config["vocab_size"]) * width


def _labels(config: Config) -> int:
    """The number of labels, of which transformers has two where none are named."""
    return len(config.get("id2label") or {}) or int(config.get("num_labels", 2))


def _shape(name: str, task: str, encoder: Stack | None, decoder: Stack | None, other: int, buffers: int, vocabulary: int) -> Shape:
    linear = sum(stack.linear for stack in (encoder, decoder) if stack)
    return Shape(name, encoder, decoder, linear, other, buffers, None if task == "sequence-classification" else vocabulary)


WRITING, LABELLING = ("seq2seq", "sequence-classification"), ("causal-lm", "sequence-classification")
ARCHITECTURES: dict[str, tuple[Callable[[Config, str], Shape], tuple[str, ...]]] = {
    "t5": (_t5, WRITING),
    "bart": (_bart, WRITING),
    "llama": (_llama, LABELLING),
    "mistral": (_llama, LABELLING),
    "qwen2": (_llama, LABELLING),
    "qwen3": (_llama, LABELLING),
    "gpt2": (_gpt2, LABELLING),
    "bert": (_bert, ("sequence-classification",)),
}
