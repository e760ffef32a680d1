"""Integers as GGUF stores them: blocks of 32 columns, each with a float16 scale of its own (ggml's `ggml-common.h`, as of 2026).

    Q4_0, Q5_0, Q8_0   d (q - middle), the middle 8, 16 and 0 (Q8_0 has signed bytes)
    Q4_1, Q5_1         d q + m, where m = -zero d

So a symmetric grid of up to 4, 5 or 8 bits has one of the first three types, another grid of up to 4 or 5 bits one of the last two. A group
of columns that is a multiple of 32 becomes several blocks with the same scale.
"""

from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.export._integers import Integers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 32  # columns
SYMMETRIC, ASYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}, {4: "Q4_1", 5: "Q5_1"}  # by the most bits that they hold
MIDDLE = {"Q4_0": 8, "Q5_0": 16}


def kind_for(layer: str, bits: int, symmetric: bool, columns: int, groups: int) -> str:
    """The type of blocks that holds a layer's integers as they are. Raises ModelError where none does."""
    if columns % BLOCK:
        raise ModelError(
            f"export: gguf: {layer} has {columns} columns, no multiple of a block's {BLOCK}; name the layer under ignore of the stage"
            " that quantises"
        )
    if (columns // groups) % BLOCK:
        raise ModelError(
            f"export: gguf: {layer} has groups of {columns // groups} columns, and multiples of {BLOCK} can be stored; quantise it with"
            f" group_size: {BLOCK}"
        )
    kinds = SYMMETRIC if symmetric else ASYMMETRIC
    if bits > max(kinds):
        raise ModelError(
            f"export: gguf: {layer} has {bits} bits with zero points, which can be stored up to {max(kinds)} bits; quantise it"
            " with symmetric: true"
        )
    return kinds[min(most for most in kinds if bits <= most)]


def blocks(layer: str, matrix: Integers, kind: str) -> "NDArray[np.uint8]":
    """The matrix in blocks of a type from `kind_for`: uint8 (rows, columns / 32 x bytes of a block).

    Raises ModelError for a scale that float16 doesn't hold.
    """
    import numpy as np

    rows, columns = matrix.integers.shape
    repeat = columns // BLOCK // matrix.scale.shape[1]
    with np.errstate(over="ignore"):
        scale = np.repeat(matrix.scale, repeat, axis=1).astype(np.float16)[..., None]  # (rows, blocks, 1)
    if not np.isfinite(scale).all():
        raise ModelError(f"export: gguf: {layer}: a scale of {np.abs(matrix.scale).max():.3g} is beyond float16; name it under ignore")
    integers = matrix.integers.reshape(rows, -1, BLOCK)
    parts: list[NDArray[Any]] = [scale]
    if kind == "Q8_0":
        parts.append(integers.astype(np.int8))
    else:
        if matrix.zero is None:
            integers = integers + MIDDLE[kind]
        else:
            zero = np.repeat(matrix.zero, repeat, axis=1)[..., None]
            parts.append((-zero * scale.astype(np.float32)).astype(np.float16))
        if kind in ("Q5_0", "Q5_1"):  # the fifth bits of a block lie together, the first column's lowest
            parts.append(np.packbits((integers >> 4 & 1).astype(np.uint8), axis=-1, bitorder="little"))
        low = (integers & 15).astype(np.uint8)  # the first and the second half of a block share bytes
        parts.append(low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4)
    return np.concatenate([part.view(np.uint8) for part in parts], axis=-1).reshape(rows, -1)
