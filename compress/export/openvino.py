"""OpenVINO's format: decoders and encoder-decoders that transformers can trace, for its engine on CPUs; in floats, 8 or 4 bits.

Packed weights of 4 or 8 bits, with a scale a row or a group, with or without zero points, keep their exact integers. Beside them
`embeddings: int8` rounds the embeddings and the head, which are a third of a small model. With `weights: int8` all matrices are rounded to
nearest, symmetric, with a scale a row. With `int4` NNCF rounds them (Intel, Apache 2.0).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from compress import methods
from compress.errors import ModelError
from compress.export._beside import save_beside
from compress.export._dense import dense
from compress.export._integers import Integers, Packed, packed_layers
from compress.exports import Export
from compress.methods import About, Context, Task
from compress.model.loading import Bundle, local_folder, parameter_count, read_config
from compress.quiet import silence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

silence("openvino_telemetry")  # nothing is sent anywhere

ABOUT = About(
    at_run_time="the engine unpacks weights of 4 or 8 bits as it multiplies with them; inputs stay floats",
    packages=("openvino",),
    extra="openvino",
    packs=True,
    smaller=False,
    tasks=("seq2seq", "causal-lm"),
)
FOLDER = "openvino"
WIDTHS = (4, 8)  # bits of its integers
LARGEST = 127  # of the integers that rows are rounded to
TYPES = {"i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4", "f32": "float32"}
GROUP = 32  # columns that share a scale where NNCF rounds
# else the engine computes in bfloat16 where the CPU can, and rounds keys, values and the inputs of layers
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class Settings(methods.Settings):
    weights: Literal["auto", "float32", "int8", "int4"] = Field(
        "auto", description="auto: packed layers keep their integers, all else is in float32; int8 and int4: all matrices, int4 by NNCF"
    )
    embeddings: Literal["float32", "int8"] | None = Field(
        None, description="the type of embeddings, and of a head that is on no grid; null is float32, and int8 with weights: int8 or int4"
    )

    @model_validator(mode="after")
    def _nncf_rounds_all(self) -> Self:
        if self.weights == "int4" and self.embeddings == "float32":
            raise ValueError("weights: int4 has NNCF round embeddings to int8 too; leave embeddings out, or quantise in a stage before")
        return self

    def needs(self) -> dict[str, str]:
        return {"nncf": "nncf"} if self.weights == "int4" else {}

    def why_not_behind(self, stage: str, before: methods.Settings, columns: Collection[int] = ()) -> str | None:
        bits = getattr(before, "bits", None)
        if self.weights != "auto" or bits is None:
            return None
        if getattr(before, "format", None) == "gptq":
            return f"it takes integers over from format: compressed-tensors alone; leave format out of `{stage}`"
        if not set(bits.values() if isinstance(bits, dict) else [bits]) <= set(WIDTHS):
            return f"it holds integers of 4 or 8 bits; in `{stage}` give bits: 4 or bits: 8, or here weights: float32"
        return None


PLAIN = Settings(weights="float32")  # what a baseline is measured in


@dataclass(frozen=True)
class Exported(Bundle):
    """A model that is saved in the engine's format."""

    settings: Settings
    packed: Packed
    say: Callable[[str], None]

    def save(self, folder: Path) -> None:
        import openvino

        from compress.export._openvino_graph import traced

        save_beside(self.model, self.tokenizer, folder)
        tables = _tables(self.model)
        count, files, stored, kept = parameter_count(self.model), [], Counter[str](), set[str]()
        for name, graph in traced(self.model).items():
            if self.settings.weights == "int4":
                import nncf

                # layers whose columns 32 does not divide are left to NNCF, and no reason to refuse the model
                whole = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE)
                mode = nncf.CompressWeightsMode.INT4_ASYM
                nncf.compress_weights(graph, mode=mode, group_size=GROUP, advanced_parameters=whole)  # in place
            else:
                kept |= _store(graph, self.packed, tables, self.settings)
            stored += _sizes(graph)
            openvino.save_model(graph, folder / FOLDER / f"{name}.xml", compress_to_fp16=False)
            files += [f"{FOLDER}/{name}.bin", f"{FOLDER}/{name}.xml"]
        if lost := sorted(self.packed.keys() - kept):
            raise ModelError(
                f"export: openvino: {lost[0]} and {len(lost) - 1} more packed layers have no matrix of their own once the model is traced,"
                " so their integers can't be kept; give weights: float32 or int8"
            )
        whole = stored.total()
        self.say(f"of {whole:,} weights {', '.join(f'{size / whole:.1%} are {form}' for form, size in stored.most_common())}")
        Export("openvino", files, stored.most_common(1)[0][0], count).write(folder)


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model, to be saved for the engine.

    Raises ModelError for packed weights that it can't hold; a type that can't be traced shows only when it is saved.
    """
    packing = getattr(read_config(bundle.source), "quantization_config", None) or {}
    keeps = settings.weights == "auto" and packing.get("quant_method") == "compressed-tensors"
    packed = packed_layers(local_folder(bundle.source), packing, "openvino") if keeps else {}
    _check_widths(packed)
    exported = Exported(bundle.source, bundle.device, settings, packed, context.say)
    exported.__dict__.update(model=dense(bundle.source), tokenizer=bundle.tokenizer)
    return exported


def usage(task: Task, prompt: list[str], new_tokens: int) -> list[str]:
    """Python code that answers a prompt, to be run in an exported folder; the lines in `prompt` set `ids`, its tokens."""
    encodes = task == "seq2seq"
    encoded = [
        f'encoder = core.compile_model("{FOLDER}/encoder.xml", "CPU", exact).create_infer_request()',
        'encoder.infer({"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)})',
        "for output in encoder.model_outputs:",
        "    decoder.set_tensor(output.any_name, encoder.get_tensor(output))",
        'new = [AutoConfig.from_pretrained(".").decoder_start_token_id]',
    ]
    return [
        "import numpy as np",
        "import openvino",
        f"from transformers import {'AutoConfig, ' if encodes else ''}AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f"exact = {json.dumps(EXACT)}",
        "core = openvino.Core()",
        f'decoder = core.compile_model("{FOLDER}/decoder.xml", "CPU", exact).create_infer_request()',
        "takes = {port.any_name for port in decoder.model_inputs}",
        *prompt,
        *(encoded if encodes else ["new = ids"]),
        "written = []",
        f"while len(written) < {new_tokens} and tokenizer.eos_token_id not in written:",
        f"    seen = len(ids){'' if encodes else ' + len(written)'}",
        "    inputs = {",
        '        "input_ids": np.array([new]),',
        '        "attention_mask": np.ones((1, seen), dtype=np.int64),',
        '        "beam_idx": np.array([0]),',
        '        "position_ids": np.arange(seen - len(new), seen)[None],',
        '        "logits_to_keep": np.array([len(new) - 1]),',
        "    }",
        "    decoder.infer({name: value for name, value in inputs.items() if name in takes})",
        '    new = [int(decoder.get_tensor("logits").data[0, -1].argmax())]',
        "    written += new",
        "print(tokenizer.decode(written, skip_special_tokens=True).strip())",
    ]


def _check_widths(packed: Packed) -> None:
    """Raises ModelError for widths that the format doesn't hold."""
    for layer, (_, width) in packed.items():
        if width not in WIDTHS:
            raise ModelError(
                f"export: openvino: {layer} has {width} bits a weight, and 4 or 8 can be stored; quantise it with bits: 4 or bits: 8, or"
                " give weights: float32"
            )


def _tables(model: "PreTrainedModel") -> set[str]:
    """Names of the weights of embeddings and head, all that they go by where they are one."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if any(parameter is layer.weight for layer in layers)}


def _store(graph: Any, packed: Packed, tables: Collection[str], settings: Settings) -> set[str]:
    """Replace a graph's float matrices (rows, columns) by integers. Returns the names of the packed layers that it has.

    tables   names of the weights of embeddings and head
    """
    from compress.export._openvino_graph import MODEL

    rounds_all = settings.weights == "int8"
    rounds_tables = settings.embeddings == "int8" or (rounds_all and settings.embeddings is None)
    met = set[str]()
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32" or len(node.shape) != 2:
            continue
        name = node.get_friendly_name().removeprefix(MODEL)
        layer = name.removesuffix(".weight")
        users = list(node.output(0).get_target_inputs())
        multiplied = any(user.get_node().get_type_name() == "MatMul" for user in users)
        if layer in packed:
            numbers = _numbers(*packed[layer])
            met.add(layer)
        elif rounds_tables if name in tables else rounds_all and multiplied:
            numbers = _numbers(_nearest(node.data), 8)
        else:
            continue
        numbers.set_friendly_name(node.get_friendly_name())
        for user in users:
            user.replace_source_output(numbers.output(0))
    graph.validate_nodes_and_infer_types()
    return met


def _numbers(matrix: Integers, bits: int) -> Any:
    """The node of a graph that turns integers into the weights, float32 (rows, columns)."""
    import numpy as np
    import openvino
    from openvino import opset13 as op

    (rows, columns), groups = matrix.integers.shape, matrix.scale.shape[1]
    shape = [rows, columns] if groups == 1 else [rows, groups, columns // groups]
    scale = matrix.scale if groups == 1 else matrix.scale[..., None]

    def integers(values: "NDArray[np.int16]", shape: "list[int]") -> Any:
        flat: NDArray[np.uint8] = values.reshape(-1).astype(np.uint8)
        if bits == 4:  # the first of two is the lower half of a byte
            flat = np.append(flat, np.uint8(0)) if len(flat) % 2 else flat
            flat = (flat[::2] & 15 | flat[1::2] << 4).astype(np.uint8)
        kind = getattr(openvino.Type, f"{'i' if matrix.zero is None else 'u'}{bits}")
        return op.convert(op.constant(openvino.Tensor(flat, openvino.Shape(shape), kind), shared_memory=False), "f32")

    numbers = integers(matrix.integers, shape)
    if matrix.zero is not None:
        numbers = op.subtract(numbers, integers(matrix.zero, list(scale.shape)))
    numbers = op.multiply(numbers, op.constant(scale))
    return numbers if groups == 1 else op.reshape(numbers, op.constant([rows, columns]), special_zero=False)


def _nearest(matrix: "NDArray[np.float32]") -> Integers:
    """A matrix (rows, columns) rounded to nearest in 8 bits, the largest of a row becoming 127."""
    import numpy as np

    scale = np.maximum(np.abs(matrix).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * LARGEST) / LARGEST
    return Integers(np.rint(matrix / scale).astype(np.int16), scale.astype(np.float32), None)


def _sizes(graph: Any) -> Counter[str]:
    """How many weights of matrices a graph has in each type. Scales and zero points, which have one column, don't count."""
    sizes = Counter[str]()
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1 and node.shape[-1] > 1:
            sizes[TYPES.get(node.get_element_type().get_type_name(), "other")] += math.prod(node.shape)
    del sizes["other"]
    return sizes
