"""A model whose weights stay on disk until they are asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from compress import experts
from compress.architectures.gpt2 import as_linear
from compress.model.folder import tensor_headers, weight_files
from compress.model.loading import load_model, local_folder, mapped, skeleton
from compress.model.source import Source
from compress.structure import has_transposed_layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Weights:
    """The tensors of a model as transformers loads them, put in place module by module."""

    def __init__(self, source: Source, model: "PreTrainedModel"):
        self._parts = {f"{path}.{name}": part for path, module in experts.parted(model) for name, part in module.origin.items()}
        self._files = _one_by_one(source, model) if self._parts else {}  # loaded, they would be put together in memory
        self._open: dict[Path, Any] = {}
        self._tensors = {} if self._files else mapped(source).state_dict()

    def fill(self, model: "PreTrainedModel", prefix: str, device: str, skip: tuple[str, ...] = ()) -> None:
        """Put the weights of the module of a model that has this name on the device, in the model's dtypes.

        skip  beginnings of names that are left out
        """
        module, inside = model.get_submodule(prefix), f"{prefix}." if prefix else ""
        state = {}
        for name, empty in module.state_dict().items():
            full = inside + name
            if not full.startswith(skip or ("\0",)) and full not in model.all_tied_weights_keys:
                state[name] = self._of(full).to(device, empty.dtype, copy=True)  # methods change it in place
        module.load_state_dict(state, strict=False, assign=True)
        for name, buffer in module.named_buffers():
            if buffer.device.type != "meta" and not (inside + name).startswith(skip or ("\0",)):
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, buffer.to(device))

    def _of(self, name: str) -> "Tensor":
        if self._files:
            file, stored = self._files[name]
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(stored)
            return tensor
        part = self._parts.get(name)
        return self._tensors[name] if part is None else part.of(self._tensors[part.name])


def _one_by_one(source: Source, model: "PreTrainedModel") -> dict[str, tuple[Path, str]]:
    """Where each tensor of a model with parted experts lies, by its name: the file, and its name there. Empty where some lie otherwise.

    Names may be others in the files; a tensor that transformers makes another of is none of those that are read so.
    """
    renamings = experts.renamings(model)
    if renamings is None:
        return {}
    places = {}
    for file in weight_files(local_folder(source)):
        for stored, _ in tensor_headers(file):
            name = stored
            for renaming in renamings:
                name = renaming(name)
            places[name] = (file, stored)
    tensor_names = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    return places if tensor_names <= places.keys() else {}


def put_together(model: "PreTrainedModel", source: Source) -> list[str]:
    """The weights of a model that its files hold in another form; experts of mixtures, one by one or together, aside."""
    headers = (header for file in weight_files(local_folder(source)) for _, header in tensor_headers(file))
    shapes = {tuple(sorted(header["shape"])) for header in headers}  # GPT-2's are transposed
    inside = tuple(f"{path}." for path, _ in experts.parted(model))
    others = ((name, weight) for name, weight in model.named_parameters() if not name.startswith(inside or ("\0",)))
    return [name for name, weight in others if tuple(sorted(weight.shape)) not in shapes]


def empty(source: Source, scratch: Path) -> "tuple[PreTrainedModel, Weights]":
    """The model without weights, its computed buffers being there and its experts parted, and where to read the weights.

    GPT-2, with its transposed layers, is written anew into `scratch` with ordinary ones.
    """
    model = skeleton(source)
    if has_transposed_layers(model):
        as_linear(load_model(source, "cpu")).save_pretrained(scratch)
        source = Source(str(scratch), source.task, source.dtype)
        model = skeleton(source)
    experts.part(model)
    return model, Weights(source, model)
