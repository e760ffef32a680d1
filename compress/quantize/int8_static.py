"""Weights in 8 bits by row, inputs in 8 bits on one fixed range a layer, observed on the calibration data.

Jacob et al. 2017, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference". The range is found
by an observer: min-max, percentile, mean squared error or entropy. Cheapest at run time, for servers that read compressed-tensors in int8
(vLLM). Encoder-decoders are refused, since no format of plain transformers holds fixed ranges for them; smoothquant serves those.
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from compress.errors import ModelError
from compress.methods import About, Context, LayerSettings
from compress.model.loading import Bundle
from compress.quantize._grid import Grid, GridSettings, Kind, fit, grid_of
from compress.quantize._observer import Observer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from compress.calibration.block import Block
    from compress.quantize._solution import Quantised

ABOUT = About(
    at_run_time="transformers unpacks the weights at the first step and rounds the inputs in floating point, so it gains on disk only;"
    " servers with int8 kernels (vLLM) keep them packed",
    slows=True,
    packages=("compressed-tensors",),
    extra="quant",
    calibrated=True,
    packs=True,
)


class Settings(LayerSettings):
    observer: Observer = Field("percentile", description="how the range of the inputs is found")
    symmetric: bool = Field(False, description="whether the range of the inputs is as wide on both sides of zero")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with int8 weights and the scales of its inputs.

    Raises ModelError for an encoder-decoder.
    """
    from compress.calibration.inputs import in_order, inputs, reach
    from compress.quantize._calibrated import quantise
    from compress.quantize._observer import Histogram
    from compress.quantize._solution import Quantised

    config = bundle.config
    if config.is_encoder_decoder:
        raise ModelError(
            f"quantize: int8_static: no format of plain transformers holds fixed input ranges for an encoder-decoder ({config.model_type});"
            " use smoothquant, int8_dynamic or gptq"
        )
    by_row = GridSettings(bits=8, group_size=-1, symmetric=True)

    def solve(block: "Block") -> None:
        most = reach(block)
        for group in in_order(block):
            if not block.sound(group, most[group[0]]):
                continue
            seen = None
            for rows in inputs(block, group[0]):
                if seen is None:
                    seen = Histogram(rows.reshape(1, -1))
                else:
                    seen.add(rows.reshape(1, -1))
            assert seen is not None
            low, high = seen.range(settings.observer, 8, settings.symmetric)
            scale, zero = grid_of(low.float()[:, None], high.float()[:, None], 8, settings.symmetric)
            for name in group:
                weight = block.weights[name]
                grid = fit(weight, by_row, 8, signed=False)
                block.set(name, Quantised(grid, grid.integers(weight), Grid(8, settings.symmetric, scale, zero)))

    return quantise(bundle, settings, context, _Static, solve)


class _Static:
    """compressed-tensors' `int-quantized`: `weight` in int8, `weight_scale`, `input_scale`, `input_zero_point`."""

    def __init__(self, model: "PreTrainedModel", kinds: dict[str, Kind]):
        self.bits = {name: kind.bits for name, kind in kinds.items()}
        self._names: list[str] = []
        self._inputs: dict[str, Any] = {}

    def packed(self, name: str, layer: "nn.Linear", solution: "Quantised") -> "nn.Module":
        import torch

        from compress.quantize._pack import holder

        self._names.append(name)
        input_grid = solution.inputs
        assert isinstance(input_grid, Grid)
        dtype = layer.weight.dtype
        parts = {
            "weight": (solution.integers.to(torch.int16) - 128).to(torch.int8),
            "weight_scale": solution.grid.scale.to(dtype),
            "input_scale": input_grid.scale.reshape(1).to(dtype).clone(),  # layers with one input share the grid, files share no tensors
        }
        if not input_grid.symmetric:
            parts["input_zero_point"] = (input_grid.zero.reshape(1) - 128).to(torch.int8)
        self._inputs = {"num_bits": 8, "type": "int", "symmetric": input_grid.symmetric, "strategy": "tensor", "dynamic": False}
        return holder(parts, layer)

    def describe(self, model: "PreTrainedModel") -> None:
        from compress.quantize._pack import describe

        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        describe(
            model, "int-quantized", [{"targets": self._names, "weights": weights, "input_activations": self._inputs}], dequantize=False
        )
