"""What is particular to files of torchao's weights, in one place.

transformers 5.15 to 5.24 has each layer's weights put together by a function that looks through the names of all of them, for every one of
them again: 6 s for the 210 layers of a model of 135 million weights, and a hundred times as long for ten times as many.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

NAMES = "tensor_names"  # of torchao's metadata


@contextmanager
def reading() -> Iterator[None]:
    """Within it, transformers looks only through the names of the layer that it puts together."""
    from transformers.integrations import torchao

    together: Any = getattr(torchao, "unflatten_tensor_state_dict", None)  # not there without torchao
    if together is None:
        yield
        return

    def of_one_layer(tensors: dict[str, Any], metadata: dict[str, Any]) -> Any:
        layers = {name.rpartition(".")[0] for name in tensors}
        names = [name for name in json.loads(metadata[NAMES]) if name.rpartition(".")[0] in layers]
        return together(tensors, {NAMES: json.dumps(names), **{name: metadata[name] for name in names}})

    torchao.unflatten_tensor_state_dict = of_one_layer
    try:
        yield
    finally:
        torchao.unflatten_tensor_state_dict = together


def unpack(model: "nn.Module") -> None:
    """Put plain float32 weights in the place of torchao's, in place; what inputs are multiplied by before is taken into them."""
    from torch import nn

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not hasattr(parameter, "__tensor_flatten__"):
                continue
            weight: Any = parameter.data
            numbers, factor = weight.dequantize().float(), getattr(weight, "act_pre_scale", None)
            setattr(module, name, nn.Parameter(numbers if factor is None else numbers * factor.float(), requires_grad=False))
