"""A model whose weights stay on disk until they are asked for."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from compress.architecture import as_linear, has_transposed_layers
from compress.model import Bundle, Source, local_folder, skeleton, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Weights:
    """The tensors of a model folder, read one by one."""

    def __init__(self, folder: Path, model: "PreTrainedModel"):
        self._dtype, self._files = model.dtype, dict[str, Path]()
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                self._files.update(dict.fromkeys(tensors.keys(), file))

    def hold(self, names: set[str]) -> bool:
        return names <= self._files.keys()

    def fill(self, module: nn.Module, prefix: str, device: str, skip: tuple[str, ...] = ()) -> None:
        """Put a module's weights on the device, all but those whose names begin with one of `skip`."""
        state = {}
        for name in module.state_dict():
            full = prefix + name
            if not name.startswith(skip or ("\0",)) and (file := self._files.get(full)) is not None:
                with safe_open(file, framework="pt") as tensors:
                    tensor = tensors.get_tensor(full)
                state[name] = tensor.to(device, self._dtype if tensor.is_floating_point() else None)
        module.load_state_dict(state, strict=False, assign=True)
        for name, buffer in module.named_buffers():
            if buffer.device.type != "meta" and not name.startswith(skip or ("\0",)):
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, buffer.to(device))


def empty(source: Source, scratch: Path) -> "tuple[PreTrainedModel, Weights]":
    """The model without weights, its computed buffers being there, and where to read the weights.

    A checkpoint with other names than the model's own (old uploads), and GPT-2 with its transposed layers, is written anew into `scratch`.
    """
    model = skeleton(source)
    if model.can_generate():
        with suppress(OSError):  # an old upload may have none; then the model's config stands for it
            model.generation_config = GenerationConfig.from_pretrained(source.id, revision=source.revision)
    weights = Weights(local_folder(source), model)
    tied = set(model.all_tied_weights_keys)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if weights.hold(names - tied) and not has_transposed_layers(model):
        return model.eval(), weights
    as_linear(Bundle(source, "cpu").model).save_pretrained(scratch)
    return empty(Source(str(scratch), source.task, source.dtype), scratch)
