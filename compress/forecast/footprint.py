"""How much memory a model takes while it runs, from its shape: weights, keys and values, activations, and what the allocator adds.

The tensors that are alive at once are counted as in transformers (5.x, inference, PyTorch's fused attention). The few constants besides
were measured on a CPU, as the comments say. `reports/memory` compares the forecast with measured peaks.
"""

from dataclasses import dataclass

from compress.hardware import cpu_flags
from compress.shape import Shape, Stack

MIB = 1 << 20
DTYPES = {"FP32": 32, "FP16": 16, "BF16": 16}  # bits of a weight
GROUP = 128  # weights of 4 bits that share a scale of 16 bits
FBGEMM_COLUMNS = 512  # FBGEMM's layout pads a layer's columns to a multiple of this
FBGEMM_ROWS, FBGEMM_ROWS_VNNI = 8, 48  # and its rows, on a CPU with AVX2 and on one with AVX-512 VNNI
OBJECTS = 6 * MIB  # of Python's objects for a model and the kernels' plans on a CPU; measured on six models
# A CUDA context with torch's kernels takes some 500 MiB of a GPU since CUDA 12's lazy loading.
CONTEXT = 500 * MIB
LARGE = 32 * MIB  # glibc takes larger blocks from the kernel and gives them back at once; smaller ones leave holes in its heap


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a generation, or of a classification.

    cache         keys and values that a generation leaves
    activations   the rest of what is alive at once; little where the peak comes before the cache has filled
    slack         what the allocator holds beyond that; on a GPU the context
    """

    weights: int
    cache: int
    activations: int
    slack: int

    @property
    def alive(self) -> int:
        """The peak without the allocator's slack, as `peak_run_bytes` measures it."""
        return self.weights + self.cache + self.activations

    @property
    def peak(self) -> int:
        return self.alive + self.slack


def weight_bytes(shape: Shape, dtype: str, bits: int | None = None, padded: bool = False) -> int:
    """Bytes of the weights and buffers in a dtype.

    bits     of the linear layers' packed weights, in 4 bits with a scale a group of 128; None leaves them in the dtype
    padded   8 bits lie in FBGEMM's layout
    """
    linear = shape.linear
    if padded:
        rows = FBGEMM_ROWS_VNNI if "avx512_vnni" in cpu_flags() else FBGEMM_ROWS
        linear = sum(stack.padded(rows, FBGEMM_COLUMNS) for stack in (shape.encoder, shape.decoder) if stack) or linear
    scales = 2 * shape.linear // GROUP if bits == 4 else 0
    return linear * (bits or DTYPES[dtype]) // 8 + scales + shape.other * DTYPES[dtype] // 8 + 4 * shape.buffers


def cache_bytes(shape: Shape, width: int, batch_size: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of the keys and values after a generation, `width` each: of the decoder's tokens, and of the encoder's if there is one."""
    decoder = shape.decoder
    if decoder is None or shape.vocabulary is None:
        return 0
    # those of the last token are never computed; the decoder of an encoder-decoder begins with a token of its own
    tokens = new_tokens + prompt_tokens if decoder.crossed else prompt_tokens + new_tokens - 1
    return 2 * decoder.layers * decoder.key_heads * decoder.head_width * batch_size * tokens * width


def footprint(weights: int, shape: Shape, width: int, batch_size: int, prompt_tokens: int, new_tokens: int, device: str) -> Footprint:
    """The peak of one grid point, with activations of `width` bytes each.

    For an encoder-decoder it is either the encoder's, before there is a cache, or the decoder's beside the cache.
    """
    cache = cache_bytes(shape, width, batch_size, prompt_tokens, new_tokens)
    tokens = batch_size * prompt_tokens
    alive = passing = 0  # the most beside the weights, and the most of it that comes and goes
    if shape.encoder is not None:
        alive = passing = _alive(shape.encoder, batch_size, prompt_tokens, width)
    if shape.decoder is not None:
        read, kept = prompt_tokens, 0
        if shape.encoder is not None:  # it reads token after token, beside the encoder's output
            read, kept = 1, tokens * shape.decoder.width * width
        inside = max(_alive(shape.decoder, batch_size, read, width), _logits(shape, batch_size, width))
        alive, passing = max(alive, cache + kept + inside), max(passing, inside)
    if device == "cpu":
        return Footprint(weights, cache, alive - cache + OBJECTS, _slack(shape, passing, tokens * width))
    return Footprint(weights, cache, alive - cache, CONTEXT)


def _alive(stack: Stack, batch_size: int, tokens: int, width: int) -> int:
    """Bytes alive at once inside one block while it reads `tokens` tokens of each row of a batch."""
    # In the feed-forward layers: input and output of the activation function, and with a gate the gate and the product. A function that
    # Python composes of several (gelu_new) holds more. Around them hidden states: residual, normed, added.
    inner = 5 if stack.composed else 4 if stack.gated else 2
    around = 1 if stack.gated and not stack.composed else 4
    feed_forward = inner * stack.feed_forward + around * stack.width
    attention = 3 * stack.width + stack.head_width * (4 * stack.heads + 2 * stack.key_heads)
    scores = stack.heads * tokens * tokens * width if stack.biased_scores else 0  # a bias of one batch's size
    return batch_size * tokens * max(feed_forward, attention) * width + scores


def _logits(shape: Shape, batch_size: int, width: int) -> int:
    """Bytes of the last token's scores over the vocabulary: as computed, and as generation copies and processes them in float32."""
    return batch_size * (shape.vocabulary or 0) * (width + 3 * 4)


def _slack(shape: Shape, passing: int, row: int) -> int:
    """What glibc's heap holds of tensors that were freed. Which holes are left is chance; the forecast is the middle.

    passing   bytes of tensors that come and go
    row       bytes of a number of each token

    Measured: 0.1 to 1.5 times `passing` where all tensors lie in the heap, 0 to 0.7 where the largest don't.
    """
    widest = max(stack.feed_forward for stack in (shape.encoder, shape.decoder) if stack)
    return passing // 4 if widest * row >= LARGE else passing * 3 // 5
