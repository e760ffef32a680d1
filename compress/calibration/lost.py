"""What compressing a layer changes, measured alike for all methods while the compressed model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear


@contextmanager
def measuring(
    layers: dict[str, nn.Linear], weights: dict[str, Tensor], rows: Callable[[Tensor], Tensor | None]
) -> Iterator[dict[str, float]]:
    """The share of each layer's output (mean square, without bias) that differs from what the uncompressed weight makes of its input.

    weights   the uncompressed ones
    rows      takes the real tokens, (tokens, width), out of an input or output; None where these shall not count

    The dictionary is filled when the context ends; a layer that was never run, or whose output was all zero, is not in it.
    """
    errors: dict[str, float] = {}
    changed, whole = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Linear, args: tuple[Any, ...], out: Tensor) -> None:
            inputs, outputs = rows(args[0]), rows(out)
            if inputs is None or outputs is None:
                return
            expected = linear(inputs.float(), weights[name].float())
            bias = 0 if layer.bias is None else layer.bias.float()
            changed[name] += float((outputs.float() - bias - expected).square().sum())
            whole[name] += float(expected.square().sum())

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
    errors |= {name: changed[name] / whole[name] for name in layers if whole[name] > 0}
