"""How much memory a model takes while it runs, from its shape: weights, keys and values, activations, and what the allocator adds.

The counts of what is alive at once are transformers' (5.x, inference, PyTorch's fused attention); the few constants beside them were
measured on a CPU and are told where they stand. `reports/memory` holds the forecast against measured peaks.
"""

from dataclasses import dataclass

from compress.hardware import cpu_flags
from compress.shape import Shape, Stack

MIB = 1 << 20
DTYPES = {"FP32": 32, "FP16": 16, "BF16": 16}  # bits of a weight
GROUP = 128  # weights of 4 bits share a scale of 16 bits with so many
FBGEMM_COLUMNS = 512  # a layer's columns are padded to a multiple of so many by FBGEMM's layout
FBGEMM_ROWS, FBGEMM_ROWS_VNNI = 8, 48  # and its rows, on a CPU with AVX2 and on one with AVX-512 VNNI
OBJECTS = 6 * MIB  # what Python's objects for a model and the kernels' plans take on a CPU; measured on six models
# What a CUDA context with torch's kernels takes of a GPU, which no tensor sees: some 500 MiB since CUDA 12's lazy loading.
CONTEXT = 500 * MIB
LARGE = 32 * MIB  # glibc takes larger blocks from the kernel and gives them back at once; smaller ones leave holes in its heap


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a generation, or of a classification.

    cache         keys and values that a generation leaves
    activations   the rest of what is alive at once; little where the peak comes before the cache has filled
    slack         what the allocator holds beyond what is alive; on a GPU the context
    """

    weights: int
    cache: int
    activations: int
    slack: int

    @property
    def alive(self) -> int:
        """Without what the allocator adds, which is what `peak_run_bytes` is."""
        return self.weights + self.cache + self.activations

    @property
    def peak(self) -> int:
        return self.alive + self.slack


def weight_bytes(shape: Shape, dtype: str, bits: int | None = None, padded: bool = False) -> int:
    """Bytes of the weights and buffers in a dtype.

    bits     what the linear layers' weights are packed in, with a scale a group of 128 in 4 bits; None leaves them in the dtype
    padded   8 bits lie in FBGEMM's layout
    """
    linear = shape.linear
    if padded:
        rows = FBGEMM_ROWS_VNNI if "avx512_vnni" in cpu_flags() else FBGEMM_ROWS
        linear = sum(stack.padded(rows, FBGEMM_COLUMNS) for stack in (shape.encoder, shape.decoder) if stack) or linear
    scales = 2 * shape.linear // GROUP if bits == 4 else 0
    return linear * (bits or DTYPES[dtype]) // 8 + scales + shape.other * DTYPES[dtype] // 8 + 4 * shape.buffers


def cache_bytes(shape: Shape, width: int, batch_size: int, prompt_tokens: int, new_tokens: int) -> int:
    """Keys and values of `width` bytes each that a generation leaves: of the decoder's tokens, and of the encoder's where it has one."""
    decoder = shape.decoder
    if decoder is None or shape.vocabulary is None:
        return 0
    # the last token's are never computed; an encoder-decoder's decoder begins with a token of its own
    tokens = new_tokens + prompt_tokens if decoder.crossed else prompt_tokens + new_tokens - 1
    return 2 * decoder.layers * decoder.key_heads * decoder.head_width * batch_size * tokens * width


def footprint(weights: int, shape: Shape, width: int, batch_size: int, prompt_tokens: int, new_tokens: int, device: str) -> Footprint:
    """The peak of one grid point, with activations of `width` bytes each.

    An encoder-decoder's is either the encoder's, before there is a cache, or the decoder's beside the cache.
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
    """Bytes alive at once inside one block while it reads so many tokens of each of a batch."""
    # In the feed-forward layers: what goes into the activation function and what it makes, with the gate and their product where there is
    # one; a function that Python composes of several (gelu_new) holds more. Around them hidden states: residual, normed, added.
    inner = 5 if stack.composed else 4 if stack.gated else 2
    around = 1 if stack.gated and not stack.composed else 4
    feed_forward = inner * stack.feed_forward + around * stack.width
    attention = 3 * stack.width + stack.head_width * (4 * stack.heads + 2 * stack.key_heads)
    scores = stack.heads * tokens * tokens * width if stack.biased_scores else 0  # a bias of one batch's size
    return batch_size * tokens * max(feed_forward, attention) * width + scores


def _logits(shape: Shape, batch_size: int, width: int) -> int:
    """The last token's scores over the vocabulary: as computed, and in float32 as generation copies and processes them."""
    return batch_size * (shape.vocabulary or 0) * (width + 3 * 4)


def _slack(shape: Shape, passing: int, row: int) -> int:
    """What glibc's heap holds beyond what is alive, of tensors that came and went. Which holes are left is chance, the middle is foretold.

    Measured: from a tenth to once and a half as much where all tensors lie in the heap, none to 0.7 where the largest don't.
    """
    widest = max(stack.feed_forward for stack in (shape.encoder, shape.decoder) if stack)
    return passing // 4 if widest * row >= LARGE else passing * 3 // 5
