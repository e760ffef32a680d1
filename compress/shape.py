"""The shape of a model: how many weights it has and where. Its type's file in `compress/architectures` derives it from config.json."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one after another.

    width                  of the hidden states that go from block to block
    heads, key_heads       of queries, and of keys and values; fewer of these where queries share them (grouped-query attention)
    head_width             of each; heads x head_width needn't be `width` (T5)
    feed_forward, gated    the inner width of the feed-forward layers; gated ones have two such layers side by side
    crossed                whether each block has a second attention, to an encoder's output
    composed               whether transformers computes the activation function in several operations (gelu_new), which need more memory
    biased_scores          whether a bias is added to attention's scores, head by head (T5), which rules out kernels without scores
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

    def padded(self, rows: int, columns: int) -> int:
        """The same with each layer's rows and columns padded to multiples of these numbers."""

        def size(tall: int, wide: int) -> int:
            return -(-tall // rows) * rows * (-(-wide // columns) * columns)

        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        attention = size(queries, self.width) + 2 * size(keys, self.width) + size(self.width, queries)
        feed_forward = size(self.feed_forward, self.width) * (2 if self.gated else 1) + size(self.width, self.feed_forward)
        return self.layers * (attention * (2 if self.crossed else 1) + feed_forward)

    @property
    def columns(self) -> Counter[int]:
        """The same weights, by the number of columns of their layers."""
        inner, sides = self.heads * self.head_width, 2 if self.crossed else 1
        weights = Counter[int]()
        weights[self.width] += self.layers * self.width * self.head_width * (self.heads + 2 * self.key_heads) * sides
        weights[inner] += self.layers * self.width * inner * sides
        weights[self.width] += self.layers * self.width * self.feed_forward * (2 if self.gated else 1)
        weights[self.feed_forward] += self.layers * self.width * self.feed_forward
        return weights


@dataclass(frozen=True)
class Shape:
    """A whole model.

    linear      weights of the blocks' linear layers, which are what is quantised
    other       all other weights: embeddings, norms, biases, heads
    buffers     numbers besides the weights that are loaded or computed, 4 bytes each
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
        """The weights of the blocks' linear layers, by the number of columns of their layers."""
        return sum((stack.columns for stack in (self.encoder, self.decoder) if stack), Counter[int]())

    @property
    def parameters(self) -> int:
        return self.linear + self.other

    @classmethod
    def of(
        cls, name: str, task: str, encoder: Stack | None, decoder: Stack | None, other: int, buffers: int, vocabulary: int
    ) -> "Shape":  # fmt: skip
        """A model of these stacks that serves a task."""
        linear = sum(stack.linear for stack in (encoder, decoder) if stack)
        return cls(name, encoder, decoder, linear, other, buffers, None if task == "sequence-classification" else vocabulary)


def head(config: Config, task: str, width: int, tied: bool) -> int:
    """Weights of the head on a decoder: a row for each label, or for each token unless the embedding serves as head."""
    if task == "sequence-classification":
        return labels(config) * width
    return 0 if config.get("tie_word_embeddings", tied) else int(config["vocab_size"]) * width


def labels(config: Config) -> int:
    """The number of labels, of which transformers has two where none are named."""
    return len(config.get("id2label") or {}) or int(config.get("num_labels", 2))
