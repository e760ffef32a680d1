"""The least work of a generation, whatever the kernels: bytes that a decode step reads, operations of prefill and of a step.

They are counted from the layers that are called and their numbers of tokens, so the same rule serves every architecture. A step reads the
cache, and the weights of the layers it calls as they lie in memory, packed ones packed. In an encoder-decoder those are the decoder's,
without the layers that make keys and values of the encoder's output: these are in the cache by then. Of an embedding a step reads the
rows it looks up. Operations are two for each weight and token that meet; attention's own are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import EncoderDecoderCache, StoppingCriteria
from transformers.pytorch_utils import Conv1D

from compress.held import storages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Phase:
    """Prefill or the first decode step: operations, and bytes read of each piece of memory, by its address."""

    flops: int = 0
    read: dict[Any, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return sum(self.read.values())


class Counter(StoppingCriteria):  # type: ignore[misc]
    """Counts as a stopping criterion of a generation: prefill, the first decode step, and the cache after the last step."""

    def __init__(self) -> None:
        self.prefill, self.step, self.cache_bytes = Phase(), Phase(), 0
        self._phase = self.prefill

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._phase = self.step if self._phase is self.prefill else Phase()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def watching(self, model: "PreTrainedModel") -> Iterator[None]:
        """Within it the calls of the model and of every layer with weights are counted."""
        layers = [module for module in model.modules() if _own_tensors(module) or hasattr(module, "packed_bytes")]
        hooks = [layer.register_forward_hook(self._note) for layer in layers]
        hooks.append(model.register_forward_hook(self._look_at_cache))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look_at_cache(self, model: nn.Module, _: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        self.cache_bytes = 0 if cache is None else cache_bytes(cache)

    def _note(self, layer: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        inputs = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        if isinstance(layer, nn.Embedding):
            rows = 0 if inputs is None else inputs.numel()
            self._phase.read[id(layer)] = rows * layer.embedding_dim * layer.weight.element_size()
            return
        self._phase.read.update(storages(_own_tensors(layer)))
        self._phase.read[id(layer)] = getattr(layer, "packed_bytes", 0)
        if inputs is not None:
            self._phase.flops += 2 * _weights(layer) * inputs.shape[:-1].numel()


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds: keys and values, those of the encoder's output included, or a linear layer's states."""
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    held = tree_leaves([vars(layer) for part in parts for layer in part.layers])
    return sum(tensor.numel() * tensor.element_size() for tensor in held if isinstance(tensor, torch.Tensor))


def _own_tensors(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def _weights(layer: nn.Module) -> int:
    """How many weights a token meets in a layer that multiplies by a matrix; none in others."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.numel())
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features * layer.out_features)  # type: ignore[operator]
    return 0
