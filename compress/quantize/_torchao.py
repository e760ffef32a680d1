"""Weights as torchao's tensors, which keep int8 (or fp8) in memory and in the products; saved by transformers' own torchao support."""

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, PerRow, quantize_
from torchao.quantization.quantize_.workflows import Int8Tensor
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
from transformers.pytorch_utils import Conv1D

from compress import experts
from compress.errors import InputError, ModelError
from compress.methods import Context, LayerSettings
from compress.quantize._grid import Kind
from compress.quantize._solution import Quantised
from compress.quantize._touched import called, note_layers, require_touched
from compress.structure import bare, linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int8:
    """Linear layers with int8 weights by row, whose inputs are rounded token by token at run time."""

    def __init__(self, model: "PreTrainedModel", kinds: dict[str, Kind]):
        self.bits = {name: kind.bits for name, kind in kinds.items()}
        self._names: set[str] = set()

    def packed(self, name: str, layer: nn.Linear, solution: Quantised) -> nn.Module:
        self._names.add(name)
        divide = None if solution.divide is None else (1 / solution.divide).to(layer.weight.dtype).cpu()
        weight = Int8Tensor(
            (solution.integers.to(torch.int16) - 128).to(torch.int8).cpu(),
            solution.grid.scale.float().cpu(),
            [1, layer.in_features],
            layer.weight.dtype,
            zero_point=torch.zeros_like(solution.grid.scale, dtype=torch.int8).cpu(),
            act_pre_scale=divide,
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerRow()),
        )
        module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        module.bias, module.weight = layer.bias, nn.Parameter(weight, requires_grad=False)
        return module

    def describe(self, model: "PreTrainedModel") -> None:
        """Write into the model's config that its layers are torchao's. How each is quantised stands with its tensors."""
        left_out = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in self._names]
        make_serializable(model, Int8DynamicActivationInt8WeightConfig(), left_out)


def convert(
    model: "PreTrainedModel", settings: LayerSettings, context: Context, scheme: Any, kind: type, method: str, touched: bool = False
) -> None:  # fmt: skip
    """Give every linear layer that isn't ignored weights of a scheme of torchao's, which are tensors of `kind`, in place.

    touched   others have been converted already, so that there may be none
    """
    modules = dict(model.named_modules())
    layers, left_out = ({n: modules[n] for n in part if n in modules} for part in linear_layers(_parted(model), settings.ignore))
    for name in [name for name, layer in layers.items() if type(layer) not in (nn.Linear, Conv1D)]:
        context.leave_out(name, f"it is a {type(layers.pop(name)).__name__}, which multiplies by its weight in its own way")
    for name in set(layers) - called(model, layers):
        layers.pop(name)
        context.leave_out(name, "it isn't called: what is around it multiplies by its weight itself")
    for done, layer in enumerate(layers.values(), 1):
        quantize_(layer, scheme)
        context.progress("quantising", done, len(layers))
    if not touched:
        require_touched(model, lambda layer: isinstance(getattr(layer, "weight", None), kind), method)
    note_layers(context, list(layers), list(left_out), 8, settings.why_ignored)
    make_serializable(model, scheme, list(left_out))


def convert_experts(model: "PreTrainedModel", settings: LayerSettings, context: Context, scheme: Any, method: str) -> bool:
    """Give the experts of a mixture, held together, weights of a scheme of torchao's, in place: all of a layer's or none.

    Returns whether any were converted.

    torchao has no grouped product of such weights, so the config asks transformers to run experts one by one.

    Raises ModelError where a type holds its experts the other way round, InputError where some of a layer's are to stay.
    """
    named, touched = _parted(model), False
    _, left_out = linear_layers(named, settings.ignore)
    for path, mixture in experts.parted(named):
        names, fused = [f"{path}.{name}" for name in mixture.layers()], model.get_submodule(path)
        stay = [name for name in names if name in left_out]
        for name in stay:
            context.leave_out(name, settings.why_ignored)
        if len(stay) == len(names):
            continue
        if stay:
            raise InputError(f"ignore: {stay[0]}: {method} rounds all experts of a layer or none; name {path}")
        if getattr(fused, "is_transposed", False):
            raise ModelError(
                f"{method}: {model.config.model_type} holds its experts the other way round, which torchao can't multiply by; name experts"
                " under ignore to work on the rest"
            )
        matrices = [name for name, parameter in fused.named_parameters(recurse=False) if parameter.ndim == 3 and "bias" not in name]
        quantize_(fused, FqnToConfig(dict.fromkeys(matrices, scheme)), filter_fn=None)
        note_layers(context, names, [], 8, settings.why_ignored)
        touched = True
    if not touched:
        return False
    model.set_experts_implementation("eager")
    model.config.experts_implementation = "eager"  # which is kept in its file, other than transformers' own note of it
    context.say("its experts are run one by one, since torchao multiplies by no group of them in int8")
    return True


def _parted(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model that names its experts one by one: a bare one where this holds them together, else this one."""
    if not experts.held_together(model):
        return model
    named = bare(model, model.config)
    experts.part(named)
    return named


def make_serializable(model: "PreTrainedModel", scheme: Any, left_out: list[str]) -> None:
    """Tell transformers that the model is torchao's, so that it is saved and loaded as such.

    torchao's reader splits every name in the file's list of tensors at its last dot, and fails on BART's `final_logits_bias`, which has
    none. Such a tensor is stored all the same and read as any plain one, so it is left off the list.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    config = TorchAoConfig(scheme, modules_to_not_convert=left_out)
    quantizer = AutoHfQuantizer.from_config(config)
    flatten = quantizer.get_state_dict_and_metadata

    def without_dotless(saved: "PreTrainedModel") -> tuple[dict[str, Any], dict[str, str]]:
        state, metadata = flatten(saved)
        names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
        return state, {**metadata, "tensor_names": json.dumps(names)}

    quantizer.get_state_dict_and_metadata = without_dotless
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
