"""GGUF, llama.cpp's format: decoders of the kinds of Llama, Mistral, Qwen2 and Qwen3, in one file with their tokenizer.

Matrices that `quantize: rtn`, `gptq`, `awq` or `autoround` left on a grid keep their exact integers, if groups have 32 columns or a
multiple. A symmetric grid is stored as Q4_0, Q5_0 or Q8_0, any other as Q4_1 or Q5_1, with scales in float16. Other matrices are stored in
float16, or rounded to nearest by the package gguf in the type that `weights` names.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from compress import decoding, methods
from compress.errors import ModelError
from compress.export._gguf_blocks import BLOCK, blocks, kind_for
from compress.export._gguf_tokenizer import Vocabulary, vocabulary
from compress.export._integers import unpacked, widths
from compress.export._positions import check_positions
from compress.exports import Export
from compress.methods import About, Context, Task
from compress.model.folder import tensor_headers, weight_files
from compress.model.loading import Bundle, local_folder
from compress.model.source import settings

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedConfig

ABOUT = About(
    at_run_time="llama.cpp rounds the inputs of quantised layers to 8 bits in groups of 32, and multiplies with integers",
    packages=("gguf",),
    extra="llama_cpp",
    packs=True,
    smaller=False,
    tasks=("causal-lm",),
)
FILE = "model.gguf"
PACKED, BESIDE = "weight_packed", ("weight_scale", "weight_zero_point", "weight_shape")
TABLES = ("token_embd.weight", "output.weight")  # embeddings and head, by GGUF's names
INPUT = "model.embed_tokens.weight"
ROPE = "rope_freqs.weight"  # in no model's own files


class Family(NamedTuple):
    """GGUF's name for models of a type, and whether it interleaves the two halves of each head's rows of q and k."""

    architecture: str
    interleaved: bool


FAMILIES = {
    "llama": Family("llama", True),
    "mistral": Family("llama", True),
    "qwen2": Family("qwen2", False),
    "qwen3": Family("qwen3", False),
}


class Settings(methods.Settings):
    weights: Literal["auto", "f32", "f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = Field(
        "auto", description="auto: layers on a grid keep their integers, all other matrices are in float16; else the type of every layer"
    )
    embeddings: Literal["f32", "f16", "q8_0"] | None = Field(
        None, description="the type of embeddings, and of a head that is on no grid; null is f16, and f32 with weights: f32"
    )

    def why_not_behind(self, stage: str, before: methods.Settings, columns: Collection[int] = ()) -> str | None:
        bits, symmetric = getattr(before, "bits", None), getattr(before, "symmetric", None)
        if self.weights != "auto" or bits is None:
            return None
        if getattr(before, "format", None) == "gptq":
            return f"it takes integers over from format: compressed-tensors alone; leave format out of `{stage}`"
        if bits == 8 and not symmetric:
            return f"it holds zero points of their own in 5 bits at most; in `{stage}` give symmetric: true"
        if (size := getattr(before, "group_size", None)) not in (None, -1) and size % BLOCK:
            return f"it holds groups of {BLOCK} columns and multiples; in `{stage}` give such a group_size"
        if odd := sorted(width for width in columns if width % BLOCK):
            return f"layers of {odd[0]} columns don't fit its blocks of {BLOCK}; name them under ignore of `{stage}`"
        return None


PLAIN = Settings(weights="f32")  # what a baseline is measured in


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its name, shape and type there, and a function that reads it as bytes of that type."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: "Callable[[], NDArray[Any]]"


@dataclass(frozen=True)
class Exported(Bundle):
    """A model that is saved as GGUF, read tensor by tensor from its own files."""

    tensors: list[Stored]
    words: Vocabulary

    def save(self, folder: Path) -> None:
        import gguf
        import numpy as np

        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if own := settings(self.source, decoding.FILE):
            (folder / decoding.FILE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        sizes = Counter[str]()
        for tensor in self.tensors:
            sizes[tensor.kind] += math.prod(tensor.shape) if tensor.name not in TABLES else 0
        most = sizes.most_common(1)[0][0]
        writer = gguf.GGUFWriter(folder / FILE, FAMILIES[self.config.model_type].architecture)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, self.config)
        self.words.write(writer)
        for tensor in self.tensors:
            raw = gguf.GGMLQuantizationType[tensor.kind]
            per_block, size = gguf.GGML_QUANT_SIZES[raw]
            count = math.prod(tensor.shape)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count // per_block * size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.tensors:
            writer.write_tensor_data(tensor.read())
        writer.close()
        parameters = sum(math.prod(tensor.shape) for tensor in self.tensors if tensor.name != ROPE)
        Export("gguf", [FILE], most.lower(), parameters).write(folder)


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model, to be saved as GGUF; its weights are read only then.

    Raises ModelError for a type of model, a tokenizer, positions or weights that GGUF can't hold, before any weights are read.
    """
    config = bundle.config
    _check(config)
    words = vocabulary(bundle.tokenizer, config.vocab_size)
    packing = getattr(config, "quantization_config", None)
    tensors = _tensors(local_folder(bundle.source), config, settings, widths(packing, "gguf") if packing else {})
    kinds = Counter(tensor.kind for tensor in tensors if tensor.name not in TABLES and len(tensor.shape) > 1)
    context.say(f"layers are stored as {', '.join(f'{kind} ({count})' for kind, count in sorted(kinds.items()))}")
    if packing:
        del config.quantization_config
    exported = Exported(bundle.source, bundle.device, tensors, words)
    exported.__dict__.update(config=config, tokenizer=bundle.tokenizer)
    return exported


def usage(task: Task, prompt: list[str], new_tokens: int) -> list[str]:
    """Python code that answers a prompt, to be run in an exported folder; the lines in `prompt` set `ids`, its tokens."""
    return [
        "import xllamacpp",
        "from transformers import AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "params = xllamacpp.CommonParams()",
        f'params.model.path, params.n_ctx, params.n_parallel = "{FILE}", 4096, 1',
        "server = xllamacpp.Server(params)",
        *prompt,
        f'request = {{"prompt": ids, "max_tokens": {new_tokens}, "temperature": 0}}',
        'print(server.handle_completions(request)["choices"][0]["text"].strip())',
    ]


def _check(config: "PreTrainedConfig") -> None:
    """Raises ModelError for what llama.cpp would compute differently."""
    if config.model_type not in FAMILIES:
        raise ModelError(f"export: gguf: the model is a {config.model_type}; supported: {', '.join(sorted(FAMILIES))}")
    if config.hidden_act != "silu":
        raise ModelError(f"export: gguf: hidden_act: {config.hidden_act}; llama.cpp computes a {config.model_type} with silu")
    usual = config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and (head := _head_columns(config)) != usual:
        raise ModelError(f"export: gguf: head_dim: {head}; llama.cpp takes hidden_size / num_attention_heads for a qwen2, {usual}")
    check_positions(config, "gguf", ("default", "linear", "llama3"))


def _describe(writer: "GGUFWriter", config: "PreTrainedConfig") -> None:
    import gguf

    rope, heads = config.rope_parameters, config.num_attention_heads
    head = _head_columns(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _head_columns(config: "PreTrainedConfig") -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tensors(folder: Path, config: "PreTrainedConfig", settings: Settings, bits: Mapping[str, int]) -> list[Stored]:
    """The tensors of the file, from the safetensors in a folder. `bits` are those of packed layers, by name or class.

    Raises ModelError for a tensor that has no place in the file, or that its type can't hold.
    """
    import gguf

    family, stored = FAMILIES[config.model_type], []
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture.upper()], config.num_hidden_layers)
    files = {name: file for file in weight_files(folder) for name, _ in tensor_headers(file)}
    shapes = {name: tuple(header["shape"]) for file in weight_files(folder) for name, header in tensor_headers(file)}
    for name, file in files.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in BESIDE or leaf == "inv_freq":
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings and _tensor(name, file).equal(_tensor(INPUT, files[INPUT])):
            continue
        place = names.get_name(f"{layer}.weight" if leaf == PACKED else name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ModelError(f"export: gguf: {name} has no place in the format's {family.architecture}; export a model without it")
        order = _order(layer, config) if family.interleaved else None
        if leaf == PACKED:
            parts = {part: files[f"{layer}.{part}"] for part in (PACKED, *BESIDE) if f"{layer}.{part}" in files}
            stored.append(_packed(layer, place, parts, bits.get(layer) or bits["Linear"], settings, order))
        else:
            kind = _kind(name, place, shapes[name], settings)
            stored.append(Stored(place, shapes[name], kind, _reader(name, file, kind, order)))
    if (factors := _rope_factors(config)) is not None:
        stored.append(Stored(ROPE, factors.shape, "F32", lambda: factors))
    return stored


def _packed(
    layer: str, place: str, parts: Mapping[str, Path], bits: int, settings: Settings, order: "NDArray[np.int64] | None"
) -> Stored:  # fmt: skip
    """A layer on a grid. `parts` has the files of its tensors."""
    rows, columns = (int(number) for number in _tensor(f"{layer}.weight_shape", parts["weight_shape"]))
    groups = _tensor(f"{layer}.weight_scale", parts["weight_scale"]).shape[1]
    keeps = settings.weights == "auto"
    symmetric = "weight_zero_point" not in parts
    kind = kind_for(layer, bits, symmetric, columns, groups) if keeps else _kind(layer, place, (rows, columns), settings)

    def read() -> "NDArray[Any]":
        integers = unpacked({part: _tensor(f"{layer}.{part}", file) for part, file in parts.items()}, bits, "gguf")
        integers = integers if order is None else integers.rows(order)
        return blocks(layer, integers, kind) if keeps else _rounded(layer, integers.values(), kind)

    return Stored(place, (rows, columns), kind, read)


def _kind(name: str, place: str, shape: tuple[int, ...], settings: Settings) -> str:
    """The type of a tensor that is on no grid."""
    if len(shape) < 2:
        return "F32"
    weight_type = "f16" if settings.weights == "auto" else settings.weights
    if place in TABLES:
        weight_type = settings.embeddings or ("f32" if settings.weights == "f32" else "f16")
    if weight_type.startswith("q") and shape[-1] % BLOCK:
        key = "embeddings" if place in TABLES else "weights"
        raise ModelError(
            f"export: gguf: {name} has {shape[-1]} columns, no multiple of {BLOCK}, which {key}: {weight_type} needs; take {key}: f16"
        )
    return weight_type.upper()


def _reader(name: str, file: Path, kind: str, order: "NDArray[np.int64] | None") -> "Callable[[], NDArray[Any]]":
    def read() -> "NDArray[Any]":
        values = _tensor(name, file).float().numpy()
        return _rounded(name, values if order is None else values[order], kind)

    return read


def _rounded(name: str, values: "NDArray[np.float32]", kind: str) -> "NDArray[Any]":
    import gguf
    import numpy as np

    with np.errstate(over="ignore"):
        converted: NDArray[Any] = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(converted).all():
        raise ModelError(f"export: gguf: {name} has a weight of {np.abs(values).max():.3g}, beyond float16; take weights: f32")
    return converted


def _tensor(name: str, file: Path) -> "Tensor":
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def _order(layer: str, config: "PreTrainedConfig") -> "NDArray[np.int64] | None":
    """The order of a layer's rows for a rotation of neighbours in place of the two halves of a head's rows; None for other layers."""
    import numpy as np

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if heads is None:
        return None
    return np.arange(heads * _head_columns(config)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _rope_factors(config: "PreTrainedConfig") -> "NDArray[np.float32] | None":
    """What each frequency of the rotation is divided by, float32 (head columns / 2); None where nothing is."""
    import numpy as np

    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    head = _head_columns(config)
    usual = config.rope_parameters["rope_theta"] ** -(np.arange(0, head, 2) / head)
    factors: NDArray[np.float32] = (usual / scaled).astype(np.float32)
    return factors
