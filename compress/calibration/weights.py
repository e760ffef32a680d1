"""A model whose weights stay on disk until they are asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from compress.architecture import as_linear, has_transposed_layers
from compress.model import Source, load_model, local_folder, mapped, skeleton, tensor_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Weights:
    """The tensors of a model as transformers loads them, put in place module by module."""

    def __init__(self, source: Source):
        self._tensors = mapped(source).state_dict()

    def fill(self, model: "PreTrainedModel", prefix: str, device: str, skip: tuple[str, ...] = ()) -> None:
        """Put the weights of the module of a model that has this name on the device, in the model's dtypes.

        skip  beginnings of names that are left out
        """
        module, inside = model.get_submodule(prefix), f"{prefix}." if prefix else ""
        state = {}
        for name, empty in module.state_dict().items():
            full = inside + name
            if not full.startswith(skip or ("\0",)) and full not in model.all_tied_weights_keys:
                state[name] = self._tensors[full].to(device, empty.dtype, copy=True)  # methods change it in place
        module.load_state_dict(state, strict=False, assign=True)
        for name, buffer in module.named_buffers():
            if buffer.device.type != "meta" and not (inside + name).startswith(skip or ("\0",)):
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, buffer.to(device))


def put_together(model: "PreTrainedModel", source: Source) -> list[str]:
    """The weights of a model that its files hold in another form, such as the experts of a mixture one by one."""
    headers = (header for file in weight_files(local_folder(source)) for _, header in tensor_headers(file))
    shapes = {tuple(sorted(header["shape"])) for header in headers}  # GPT-2's are transposed
    return [name for name, weight in model.named_parameters() if tuple(sorted(weight.shape)) not in shapes]


def empty(source: Source, scratch: Path) -> "tuple[PreTrainedModel, Weights]":
    """The model without weights, its computed buffers being there, and where to read the weights.

    GPT-2, with its transposed layers, is written anew into `scratch` with ordinary ones.
    """
    model = skeleton(source)
    if has_transposed_layers(model):
        as_linear(load_model(source, "cpu")).save_pretrained(scratch)
        source = Source(str(scratch), source.task, source.dtype)
        model = skeleton(source)
    return model, Weights(source)
