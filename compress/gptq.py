"""Folders in GPTQ's own format (see `compress.quantize._gptq_files`), which transformers reads with gptqmodel. Where that isn't installed,
they are unpacked here, by the format's definition, so that the artifact can be checked."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.model.folder import SINGLE, weight_files
from compress.model.source import Source, settings
from compress.packages import lacking

if TYPE_CHECKING:
    from torch import Tensor

READERS = ("gptqmodel", "optimum")  # by which transformers reads them
EXTRA = "gptqmodel"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Layer(NamedTuple):
    """A packed layer: scale (integers - zero), each column's by its group's.

    integers  int32 (rows, columns), of 0 to 2^bits - 1
    zero      int32 (rows, groups)
    scale     float32 (rows, groups)
    groups    int64 (columns,), each column's group
    """

    integers: "Tensor"
    zero: "Tensor"
    scale: "Tensor"
    groups: "Tensor"


def is_unread(source: Source) -> bool:
    """Whether a folder is in this format, and what transformers needs to read it isn't installed here."""
    packing = settings(source, "config.json").get("quantization_config") or {}
    return packing.get("quant_method") == "gptq" and bool(lacking(READERS))


@contextmanager
def readable(source: Source, beside: Path) -> Iterator[Source]:
    """The model as transformers can load it: itself or, where it can't be read here, unpacked in a folder until the block ends."""
    if not is_unread(source):
        yield source
        return
    with TemporaryDirectory(dir=beside) as folder:
        yield unpacked(source, Path(folder) / "unpacked")


def unpacked(source: Source, folder: Path) -> Source:
    """The same numbers as full weights, in the new folder."""
    from safetensors.torch import save_file

    packed, config = Path(source.id), settings(source, "config.json")
    packing = config.pop("quantization_config")
    shutil.copytree(packed, folder, ignore=lambda _, names: [name for name in names if name.endswith((".safetensors", ".index.json"))])
    save_file(dict(_tensors(packed, packing)), folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return replace(source, id=str(folder))


def layers(folder: Path, packing: Mapping[str, Any]) -> dict[str, Layer]:
    """The packed layers of a folder by name; `packing` is the quantization_config in its config.json."""
    tensors = _stored(folder)
    return {name.removesuffix(".qweight"): _layer(tensors, name, packing) for name in tensors if name.endswith(".qweight")}


def _tensors(folder: Path, packing: Mapping[str, Any]) -> "Iterator[tuple[str, Tensor]]":
    """Tensors by name, a packed layer's four as one `weight` (rows, columns)."""
    tensors = _stored(folder)
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            integers, zero, scale, groups = _layer(tensors, name, packing)
            yield f"{layer}.weight", ((integers - zero[:, groups]) * scale[:, groups]).contiguous()
        elif part not in PARTS:
            yield name, tensor


def _stored(folder: Path) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def _layer(tensors: "Mapping[str, Tensor]", qweight: str, packing: Mapping[str, Any]) -> Layer:
    layer, bits = qweight.removesuffix(".qweight"), packing["bits"]
    less_one = packing.get("checkpoint_format", "gptq") == "gptq"
    return Layer(
        _numbers(tensors[qweight].t(), bits), _numbers(tensors[f"{layer}.qzeros"], bits).t() + less_one,
        tensors[f"{layer}.scales"].t().float(), tensors[f"{layer}.g_idx"].long(),
    )  # fmt: skip


def _numbers(words: "Tensor", bits: int) -> "Tensor":
    """What rows of int32 words hold as streams of bits, the lowest of each number first: int32 (rows, words x 32 / bits)."""
    import torch

    stream = (words[..., None] >> torch.arange(32)) & 1
    return (stream.reshape(len(words), -1, bits) << torch.arange(bits)).sum(dim=-1, dtype=torch.int32)
