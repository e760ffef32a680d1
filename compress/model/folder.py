"""A model's folder: the files that transformers loads from it, and what their headers say. Nothing here needs torch."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress import exports
from compress.errors import ModelError

CARD = "README.md"  # says what a model is, and is no part of it
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers looks for, in this order
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and torch's
# what packed weights bring along, of compressed-tensors and of GPTQ
BROUGHT = frozenset(
    {"weight_scale", "weight_zero_point", "_weight_scale", "_weight_zero_point", "weight_shape", "input_scale", "input_zero_point"}
    | {"qzeros", "scales", "g_idx"}
)


def check_folder(folder: Path) -> None:
    """Check that a model folder has a config, a tokenizer and undamaged safetensors, without torch.

    Raises ModelError.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json, so no model folder") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'}: has no model_type, so no transformers model")
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*.json", "*.model", "vocab.*")):
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json, tokenizer_config.json, *.model or vocab.*)")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: adapter_config.json names an adapter, which transformers adds to the model where peft is installed."
            " Merge it into the weights first (peft's merge_and_unload), or remove the file"
        )
    if exports.read(folder) is not None:
        return
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder}: {_why_no_weights(folder)}")
    for file in files:
        list(tensor_headers(file))


def _why_no_weights(folder: Path) -> str:
    """Why transformers finds no weights in a folder that it reads without running code."""
    if others := weight_files_beside(folder):
        named = ", ".join(sorted(f.name for f in others))
        if all(f.suffix in PICKLED for f in others):
            return (
                f"only pickled weights ({named}), which can run code when read; store them as safetensors first"
                " (model.save_pretrained does, in an environment where you trust the file)"
            )
        return f"no {SINGLE} and no {INDEX}, which transformers looks for; give {named} that name, if that is the model"
    return "no weights (*.safetensors)"


def settings_in(file: Path) -> dict[str, Any]:
    """The settings in a JSON file; empty where there is none. Raises ModelError where it holds something else than an object."""
    try:
        held = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{file}: not JSON: {error}") from None
    if not isinstance(held, dict):
        raise ModelError(f"{file}: not a JSON object with a key for each setting")
    return held


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that plain transformers loads from a folder; empty where there are none.

    These are the file that its config names (`transformers_weights`), or else model.safetensors, or else those that the index names.

    Raises ModelError where one of them isn't there or the index is damaged.
    """
    index = folder / INDEX
    if named := _named_weights(folder):
        if Path(named).name != named or not (folder / named).is_file():
            raise ModelError(f"{folder / 'config.json'}: transformers_weights names {named}, which isn't there")
        if not named.endswith(".index.json"):
            return [folder / named]
        index = folder / named
    elif (folder / SINGLE).is_file():
        return [folder / SINGLE]
    elif not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, OSError):
        raise ModelError(f"{index}: damaged") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index}: names {name}, which isn't there")
    return [folder / name for name in names]


def weight_files_beside(folder: Path) -> list[Path]:
    """Files of a folder that look like weights and that transformers doesn't load."""
    loaded = set(weight_files(folder))
    return sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", *PICKLED) and f not in loaded)


def _named_weights(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8-sig")).get("transformers_weights")
    except (ValueError, RecursionError, OSError, AttributeError):
        return None
    return named if isinstance(named, str) else None


def stored_dtypes(folder: Path) -> list[str]:
    """The floating-point dtypes of the weights in a folder, by torch's names, each once, in the order of the files."""
    headers = (header for file in weight_files(folder) for _, header in sorted(tensor_headers(file)))
    return list(dict.fromkeys(DTYPES[header["dtype"]] for header in headers if header["dtype"] in DTYPES))


def tensor_headers(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and header (dtype, shape, data_offsets) of each tensor in a safetensors file.

    Raises ModelError when the file is damaged or shorter than its header says.
    """
    if not file.is_file():
        raise ModelError(f"{file}: not a file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= min(size - 8, 100_000_000):
            raise ModelError(f"{file}: damaged or truncated ({size:,} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{file}: damaged, its header can't be read") from None
    if size < 8 + length + end:
        raise ModelError(f"{file}: truncated, {size:,} bytes where its header says {8 + length + end:,}")
    yield from header.items()


def stored_parameters(folder: Path) -> int:
    """The number of weights in a folder's files. Packed ones count with their unpacked shapes; nothing is loaded.

    Raises ModelError where a file is damaged.
    """
    bits = (settings_in(folder / "config.json").get("quantization_config") or {}).get("bits", 4)
    total = 0
    for file in weight_files(folder):
        headers = dict(tensor_headers(file))
        for name, header in headers.items():
            owner, _, leaf = name.rpartition(".")
            if leaf in BROUGHT:
                continue
            if leaf == "weight_packed":
                total += math.prod(_integers(file, headers[f"{owner}.weight_shape"]))
            else:
                total += math.prod(header["shape"]) * (32 // bits if leaf == "qweight" else 1)
    return total


def _integers(file: Path, header: dict[str, Any]) -> tuple[int, ...]:
    """A tensor of 64-bit integers."""
    begin, end = header["data_offsets"]
    with file.open("rb") as stream:
        stream.seek(8 + struct.unpack("<Q", stream.read(8))[0] + begin)
        return struct.unpack(f"<{(end - begin) // 8}q", stream.read(end - begin))


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    export = exports.read(folder)
    files = weight_files(folder) if export is None else [folder / name for name in export.files]
    return sum(file.stat().st_size for file in files)
