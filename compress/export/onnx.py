"""ONNX as onnxruntime-genai has it: decoders of the kinds of Llama, Mistral, Qwen2 and Qwen3, in floats or with weights in 4 or 8 bits.

Weights that `quantize: rtn`, `gptq`, `awq` or `autoround` packed, in either format, keep their exact integers, scales and zero points.
They are stored as MatMulNBits: up to 4 bits in 4, up to 8 in 8, in blocks of 16 to 256 columns. All else is float32, and inputs are never
rounded.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import gptq, methods
from compress.errors import ModelError, in_a_line
from compress.export._beside import save_beside
from compress.export._dense import dense
from compress.export._integers import Integers, Packed, gptq_layers, packed_layers
from compress.export._positions import check_positions
from compress.exports import Export
from compress.methods import About, Context, Task
from compress.model.loading import Bundle, local_folder, parameter_count, read_config
from compress.model.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # nothing is sent anywhere; it looks when it is imported

ABOUT = About(
    at_run_time="the engine unpacks weights of 4 or 8 bits as it multiplies with them; inputs stay floats",
    packages=("onnxruntime", "onnxruntime-genai", "onnx", "onnx-ir"),
    extra="onnxruntime",
    packs=True,
    smaller=False,
    tasks=("causal-lm",),
)
FILE, DATA, SETTINGS = "model.onnx", "model.onnx.data", "genai_config.json"
ROPES = {"llama": ("default", "llama3"), "mistral": ("default",), "qwen2": ("default",), "qwen3": ("default",)}  # by type of model
SMALLEST, LARGEST = 16, 256  # columns of a block, a power of two


class Settings(methods.Settings):
    weights: Literal["auto", "float32"] = Field("auto", description="auto: packed layers keep their integers, all else is in float32")

    def why_not_behind(self, stage: str, before: methods.Settings, columns: Collection[int] = ()) -> str | None:
        if self.weights != "auto" or getattr(before, "bits", None) is None:
            return None
        if odd := sorted(width for width in columns if _block(width) < SMALLEST):
            return (
                f"layers of {odd[0]} columns don't fit blocks of {SMALLEST}; name them under ignore of `{stage}`, or give weights: float32"
            )
        return None


PLAIN = Settings(weights="float32")  # what a baseline is measured in


@dataclass(frozen=True)
class Exported(Bundle):
    """A model that is saved for the engine."""

    packed: Packed
    say: Callable[[str], None]

    def save(self, folder: Path) -> None:
        import onnx_ir

        with TemporaryDirectory(dir=folder.parent) as scratch:
            model = dense(_readable(self.source, Path(scratch)))
            save_beside(model, self.tokenizer, folder)
            model.save_pretrained(Path(scratch) / "floats")
            self.tokenizer.save_pretrained(Path(scratch) / "floats")
            parameters, kind = parameter_count(model), model.config.model_type
            del model
            built = _built(Path(scratch) / "floats", Path(scratch) / "built", kind)
            graph = onnx_ir.load(built / FILE)
            if lost := sorted(self.packed.keys() - _store(graph.graph, self.packed)):
                raise ModelError(
                    f"export: onnx: {lost[0]} and {len(lost) - 1} more packed layers have no matrix of their own in the builder's"
                    f" {kind}, so their integers can't be kept; give weights: float32"
                )
            onnx_ir.save(graph, folder / FILE, external_data=DATA)
            (built / SETTINGS).rename(folder / SETTINGS)
        sizes = Counter[str]()
        for matrix, bits in self.packed.values():
            sizes[f"int{_width(bits)}"] += matrix.integers.size
        sizes["float32"] = parameters - sizes.total()
        self.say(f"of {parameters:,} parameters {', '.join(f'{size / parameters:.1%} are {form}' for form, size in sizes.most_common())}")
        Export("onnx", [FILE, DATA], sizes.most_common(1)[0][0], parameters).write(folder)


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model, to be saved for the engine.

    Raises ModelError for a type of model, positions or packed weights that it can't hold.
    """
    config = read_config(bundle.source)
    if config.model_type not in ROPES:
        raise ModelError(f"export: onnx: the model is a {config.model_type}; supported: {', '.join(sorted(ROPES))}")
    check_positions(config, "onnx", ROPES[config.model_type])  # the builder drops those that it doesn't know in silence
    packing = getattr(config, "quantization_config", None) or {}
    read = gptq_layers if packing.get("quant_method") == "gptq" else packed_layers
    packed = read(local_folder(bundle.source), packing, "onnx") if packing and settings.weights == "auto" else {}
    for layer, (matrix, bits) in packed.items():
        columns = matrix.integers.shape[1] // matrix.scale.shape[1]
        if _block(columns) < SMALLEST or (matrix.zero is not None and not 0 <= matrix.zero.min() <= matrix.zero.max() < 2 ** _width(bits)):
            raise ModelError(
                f"export: onnx: {layer} has groups of {columns} columns, or zero points beyond {_width(bits)} bits; multiples of {SMALLEST}"
                " columns can be stored. Name it under ignore where it is quantised, or give weights: float32"
            )
    exported = Exported(bundle.source, bundle.device, packed, context.say)
    exported.__dict__.update(tokenizer=bundle.tokenizer)
    return exported


def usage(task: Task, prompt: list[str], new_tokens: int) -> list[str]:
    """Python code that answers a prompt, to be run in an exported folder; the lines in `prompt` set `ids`, its tokens."""
    return [
        "import os",
        "",
        'os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else it tells its makers',
        "import onnxruntime_genai",
        "from transformers import AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = onnxruntime_genai.Model(".")',
        *prompt,
        "how = onnxruntime_genai.GeneratorParams(model)",
        f"how.set_search_options(do_sample=False, max_length=len(ids) + {new_tokens})",
        "generator = onnxruntime_genai.Generator(model, how)",
        "generator.append_tokens(ids)",
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)[len(ids) :], skip_special_tokens=True).strip())",
    ]


def _readable(source: Source, scratch: Path) -> Source:
    """The model; one in GPTQ's files is unpacked, since transformers may lack the packages to read it."""
    packing = getattr(read_config(source), "quantization_config", None) or {}
    if packing.get("quant_method") != "gptq":
        return source
    return gptq.unpacked(replace(source, id=str(local_folder(source))), scratch / "unpacked")


def _built(model: Path, target: Path, kind: str) -> Path:
    """The folder in which onnxruntime-genai's builder made a graph of a model in floats.

    It gets floats, one matrix a layer, though it reads GPTQ's files, too. But there it takes every zero point as stored less one, rounds
    all to float16, and refuses a model with a layer that isn't packed.

    Raises ModelError for what it can't build.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = ("", str(model), str(target), "fp32", "cpu", str(target.with_name("cache")))
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            create_model(*place, **parse_extra_options(*place, ["fuse_qkv=false", "hf_token=false"]))
    except (NotImplementedError, AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = in_a_line(error).replace(str(model), kind)
        raise ModelError(f"export: onnx: onnxruntime-genai's builder can't build a {kind}: {reason}") from None
    return target


def _store(graph: Any, packed: Packed) -> set[str]:
    """Replace a graph's float matrices by integers. Returns the names of the layers that it has."""
    import onnx_ir

    names = {f"{layer.replace('.self_attn.', '.attn.')}.MatMul.weight": layer for layer in packed}  # as the builder has them
    met = set[str]()
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or (layer := names.get(weight.name)) is None:
            continue
        (rows, columns), (parts, how) = packed[layer][0].integers.shape, _blocks(*packed[layer])
        inputs = [node.inputs[0]]
        for name, values in parts.items():
            inputs.append(onnx_ir.Value(name=f"{layer}.{name}", const_value=onnx_ir.tensor(values)))
            graph.register_initializer(inputs[-1])
        attributes = {"K": columns, "N": rows, **how, "accuracy_level": 0}  # other levels round the inputs
        replacement = onnx_ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=f"{node.name}NBits")
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [replacement], node.outputs, replacement.outputs)
        del graph.initializers[weight.name]
        met.add(layer)
    return met


def _blocks(matrix: Integers, bits: int) -> "tuple[dict[str, NDArray[Any]], dict[str, int]]":
    """MatMulNBits's inputs by name, and its attributes. A row's integers are stored in bytes, the first of two in the lower half.

    qweight  uint8 (rows, blocks, bytes of one)
    scales   float32 (rows, blocks)
    qzeros   uint8 (rows, bytes for all blocks); none where the grid is symmetric
    """
    import numpy as np

    (rows, columns), groups, width = matrix.integers.shape, matrix.scale.shape[1], _width(bits)
    size = _block(columns // groups)
    each = columns // groups // size  # blocks of a group, which have one scale
    middle = 0 if matrix.zero is not None else 2 ** (width - 1)
    parts: dict[str, NDArray[Any]] = {
        "qweight": _bytes(matrix.integers + middle, width).reshape(rows, columns // size, -1),
        "scales": np.repeat(matrix.scale, each, axis=1),
    }
    if matrix.zero is not None:
        parts["qzeros"] = _bytes(np.repeat(matrix.zero, each, axis=1), width)
    return parts, {"bits": width, "block_size": size}


def _bytes(integers: "NDArray[np.int16]", width: int) -> "NDArray[np.uint8]":
    """Integers (rows, n) of 4 or 8 bits as bytes (rows, n / 2 or n)."""
    import numpy as np

    values = integers.astype(np.uint8)
    if width == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return (values[:, ::2] | values[:, 1::2] << 4).astype(np.uint8)


def _width(bits: int) -> int:
    """The bits in which integers of `bits` bits are stored."""
    return 4 if bits <= 4 else 8


def _block(columns: int) -> int:
    """The largest block that divides a group of so many columns."""
    return min(columns & -columns, LARGEST)
