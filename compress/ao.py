"""What is peculiar to files of torchao's weights, in one place.

transformers 5.15 to 5.24 puts each layer's weights together with a function that looks through the names of all layers every time. That
takes 6 s for the 210 layers of a model with 135 million weights, and a hundred times as long for ten times as many layers.
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
    """While the block runs, transformers looks through the names of one layer only: the one that it puts together."""
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
    """Replace torchao's weights by plain float32 ones, in place. The factors that inputs are multiplied by first go into the weights."""
    from torch import nn

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not hasattr(parameter, "__tensor_flatten__"):
                continue
            weight: Any = parameter.data
            numbers, factor = weight.dequantize().float(), getattr(weight, "act_pre_scale", None)
            setattr(module, name, nn.Parameter(numbers if factor is None else numbers * factor.float(), requires_grad=False))
