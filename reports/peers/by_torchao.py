"""torchao's rounding to nearest, over the full range of each group."""

import torch
from peer import Job, work
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel


def quantise(job: Job) -> PreTrainedModel:
    auto = AutoModelForCausalLM if job.task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(job.model, dtype=torch.float32)
    grid = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size),
        mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
    )
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    quantize_(model, grid, lambda layer, name: isinstance(layer, nn.Linear) and name.startswith(blocks))
    return model


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {f"{name}.weight": weight.dequantize() for name, weight in layers.items() if isinstance(weight, TorchAOBaseTensor)}


if __name__ == "__main__":
    work(quantise, weights, "torchao")
