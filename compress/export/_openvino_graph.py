"""Models of transformers as OpenVINO graphs: a decoder that keeps its keys and values from call to call, and the encoder before it.

Inputs of a decoder; the result is logits (rows, n or new tokens, vocabulary):

- input_ids (rows, new tokens)
- attention_mask (rows, all tokens, or the encoder's)
- beam_idx (rows,): the rows of the last call that go on
- where the model takes them, position_ids (rows, new tokens) and logits_to_keep (n,), the new tokens that need logits
- after an encoder its keys and values, by layer

Inputs of an encoder are input_ids and attention_mask (rows, tokens). The result is the keys and values that each layer of the decoder
attends to. All integers are int64, all else is float32.
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import openvino
import torch
from openvino import opset13 as op
from openvino.passes import MakeStateful, Manager
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from compress.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIONAL = ("position_ids", "logits_to_keep")  # inputs of decoders that some models take
MODEL = "self.model."  # stands before a parameter's name in the graph
LEAST = -1e30  # a score that is as good as none
ROWS, PAST, NEW = 2, 2, 3  # of the inputs that the model is traced with


def traced(model: "PreTrainedModel") -> dict[str, Any]:
    """The graphs (openvino.Model) of a model in float32, by name. Raises ModelError for a type that can't be traced."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of each condition that it fixes
            cache = model(**_few(model), use_cache=True).past_key_values
            if model.config.is_encoder_decoder:
                cross = _tensors(cache.cross_attention_cache)
                decoder = _decoder(model, _tensors(cache.self_attention_cache), cross)
                return {"encoder": _encoder(model, cross), "decoder": decoder}
            return {"decoder": _decoder(model, _tensors(cache), [])}
    except Exception as error:  # the code of any model is run, and converted
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"export: openvino: a {model.config.model_type} can't be traced: {first[:300]}") from None


class _Decoder(nn.Module):
    """A model with its cache as inputs and outputs. Takes tensors in the order of `names`; returns logits and all keys and values."""

    def __init__(self, model: "PreTrainedModel", names: Sequence[str], past: int, cross: int):
        super().__init__()
        self.model, self.names, self.past, self.cross = model, names, past, cross

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(self.names, tensors, strict=False))
        order, others = arguments.pop("beam_idx"), tensors[len(self.names) :]
        cross, past = others[: self.cross], others[self.cross :]
        own = cache = _cache([tensor.index_select(0, order) for tensor in past])
        if cross:
            cache = EncoderDecoderCache(own, _cache(cross))
            ids, mask = arguments.pop("input_ids"), arguments["attention_mask"]
            arguments["decoder_input_ids"] = ids
            arguments["decoder_attention_mask"] = torch.ones(ids.shape[0], past[0].shape[2] + ids.shape[1], dtype=torch.int64)
            # its keys and values are inputs, so only its shape is needed
            arguments["encoder_outputs"] = BaseModelOutput(torch.zeros(*mask.shape, self.model.config.hidden_size))
        logits: Tensor = self.model(**arguments, **{_cache_name(self.model): cache}, use_cache=True).logits
        return (logits, *_tensors(own))


class _Encoder(nn.Module):
    """An encoder that also returns what each layer of the decoder makes of its output: keys and values, by layer.

    shapes   heads and columns of each layer
    """

    def __init__(self, model: "PreTrainedModel", shapes: Sequence[tuple[int, int]]):
        super().__init__()
        self.model, self.shapes = model, shapes

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        empty = [torch.zeros(input_ids.shape[0], heads, 0, columns) for heads, columns in self.shapes]  # which a graph can put together
        cache = EncoderDecoderCache(DynamicCache(), _cache(empty))
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": input_ids[:, :1]}
        self.model(**arguments, **{_cache_name(self.model): cache}, use_cache=True)
        return tuple(_tensors(cache.cross_attention_cache))


def _decoder(model: "PreTrainedModel", shaped: Sequence[Tensor], cross: Sequence[Tensor]) -> Any:
    """The graph of a decoder.

    shaped, cross   tensors whose heads and columns its own and the encoder's keys and values have: (any, heads, any, columns)
    """
    taken = inspect.signature(model.forward).parameters
    whole = 1 + PAST + NEW if cross else PAST + NEW
    inputs = {
        "input_ids": torch.ones(ROWS, NEW, dtype=torch.int64),
        "attention_mask": torch.ones(ROWS, whole, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + NEW).expand(ROWS, NEW),
        "logits_to_keep": torch.arange(1, NEW),
        "beam_idx": torch.arange(ROWS),
    }
    inputs = {name: tensor for name, tensor in inputs.items() if name not in OPTIONAL or (name in taken and not cross)}
    names = list(inputs)
    inputs |= {f"encoded.{n}": torch.zeros(ROWS, tensor.shape[1], whole, tensor.shape[3]) for n, tensor in enumerate(cross)}
    inputs |= {f"past.{n}": torch.zeros(ROWS, tensor.shape[1], PAST, tensor.shape[3]) for n, tensor in enumerate(shaped)}
    graph = openvino.convert_model(_Decoder(model, names, len(shaped), len(cross)), example_input=tuple(inputs.values()))
    held = [f"present.{n}" for n in range(len(shaped))]
    _name(graph, list(inputs), ["logits", *held], [*cross, *shaped])
    nodes = {port.get_any_name(): port.get_node() for port in (*graph.inputs, *graph.outputs)}
    manager = Manager()
    manager.register_pass(MakeStateful([(nodes[f"past.{n}"], nodes[name]) for n, name in enumerate(held)]))
    manager.run_passes(graph)
    _begin_empty(graph)
    _bound_masks(graph)
    return graph


def _encoder(model: "PreTrainedModel", cross: Sequence[Tensor]) -> Any:
    """The graph of an encoder, whose outputs have the names of the decoder's inputs."""
    ids = torch.ones(ROWS, NEW, dtype=torch.int64)
    shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in cross]
    graph = openvino.convert_model(_Encoder(model, shapes), example_input=(ids, ids))
    _name(graph, ["input_ids", "attention_mask"], [f"encoded.{n}" for n in range(len(cross))], [])
    return graph


def _name(graph: Any, inputs: Sequence[str], outputs: Sequence[str], caches: Sequence[Tensor]) -> None:
    """Give inputs and outputs their names, and the last inputs the shapes of the keys and values in `caches`."""
    for port, name in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        port.get_tensor().set_names({name})
    for port, tensor in zip(graph.inputs[len(inputs) - len(caches) :], caches, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape([-1, tensor.shape[1], -1, tensor.shape[3]]))
    graph.validate_nodes_and_infer_types()


def _begin_empty(graph: Any) -> None:
    """Have keys and values start with no tokens, in as many rows as the input has."""
    rows = op.gather(op.shape_of(graph.input("input_ids"), output_type="i64"), op.constant([0]), op.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, columns = node.get_output_partial_shape(0)
            rest = op.constant([heads.get_length(), 0, columns.get_length()], dtype="int64")
            node.set_arguments([op.broadcast(op.constant(0.0, dtype="float32"), op.concat([rows, rest], axis=0))])
    graph.validate_nodes_and_infer_types()


def _bound_masks(graph: Any) -> None:
    """Give masked tokens a very low score in place of none: the engine returns NaN for padding that attends to nothing."""
    bound: dict[str, Any] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and node.get_input_element_type(3) == openvino.Type.boolean:
            mask = node.input_value(3)
            if (name := mask.get_node().get_friendly_name()) not in bound:
                bound[name] = op.select(mask, op.constant(0.0, dtype="float32"), op.constant(LEAST, dtype="float32"))
            node.input(3).replace_source_output(bound[name].output(0))
    graph.validate_nodes_and_infer_types()


def _few(model: "PreTrainedModel") -> dict[str, Tensor]:
    ids = torch.ones(ROWS, NEW, dtype=torch.int64)
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def _cache_name(model: "PreTrainedModel") -> str:
    """The name of a model's cache argument, which depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _cache(tensors: Sequence[Tensor]) -> DynamicCache:
    """A cache of these keys and values, which alternate, layer by layer."""
    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device, layer.is_initialized = keys, values, keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def _tensors(cache: DynamicCache) -> list[Tensor]:
    """Keys and values, layer by layer. Raises ValueError for a cache that holds something else."""
    if odd := [type(layer).__name__ for layer in cache.layers if not isinstance(layer, DynamicLayer)]:
        raise ValueError(f"its cache has {odd[0]}, and only keys and values can be exported")
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
