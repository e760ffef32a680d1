"""Folders in GPTQ's own format (see `compress.quantize._gptq_files`), which transformers reads by gptqmodel. Where that isn't installed,
they are unpacked here, by the format's definition, for a look at what was made."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.model.folder import SINGLE, weight_files
from compress.model.source import Source, settings
from compress.packages import lacking

if TYPE_CHECKING:
    from torch import Tensor

READERS = ("gptqmodel", "optimum")  # by which transformers reads them
EXTRA = "gptqmodel"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def is_unread(source: Source) -> bool:
    """Whether a folder is in this format, and what transformers needs to read it isn't installed here."""
    packing = settings(source, "config.json").get("quantization_config") or {}
    return packing.get("quant_method") == "gptq" and bool(lacking(READERS))


def unpacked(source: Source, folder: Path) -> Source:
    """The same numbers as full weights, in the new folder."""
    from safetensors.torch import save_file

    packed, config = Path(source.id), settings(source, "config.json")
    packing = config.pop("quantization_config")
    shutil.copytree(packed, folder, ignore=lambda _, names: [name for name in names if name.endswith((".safetensors", ".index.json"))])
    save_file(dict(_tensors(packed, packing)), folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return replace(source, id=str(folder))


def _tensors(folder: Path, packing: dict[str, Any]) -> "Iterator[tuple[str, Tensor]]":
    """Tensors by name, a packed layer's four as one `weight` (rows, columns)."""
    from safetensors.torch import load_file

    bits, less_one = packing["bits"], packing.get("checkpoint_format", "gptq") == "gptq"
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            integers = _numbers(tensor.t(), bits)
            zeros = _numbers(tensors[f"{layer}.qzeros"], bits).t() + less_one
            groups = tensors[f"{layer}.g_idx"].long()
            scale = tensors[f"{layer}.scales"].t().float()
            yield f"{layer}.weight", ((integers - zeros[:, groups]) * scale[:, groups]).contiguous()
        elif part not in PARTS:
            yield name, tensor


def _numbers(words: "Tensor", bits: int) -> "Tensor":
    """What rows of int32 words hold as streams of bits, the lowest of each number first: int32 (rows, words x 32 / bits)."""
    import torch

    stream = (words[..., None] >> torch.arange(32)) & 1
    return (stream.reshape(len(words), -1, bits) << torch.arange(bits)).sum(dim=-1, dtype=torch.int32)
