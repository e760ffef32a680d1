"""gptqmodel's GPTQ, by its own packed format and back."""

import logging
import os
import tempfile

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read when first used; with its own choice it fails on two cores

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.models.base import BaseQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from peer import Job, work
from torch import Tensor

logging.disable(logging.WARNING)


def quantise(job: Job) -> BaseQModel:
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        desc_act=False,
        act_group_aware=job.group_size != -1,
        damp_percent=0.01,
        mse=2.0 if job.method == "searched" else 0.0,
        device="cpu",
    )
    model = GPTQModel.load(job.model, config, dtype=torch.float32)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.rows], batch_size=1, backend=BACKEND.GPTQ_TORCH)
    return model


def weights(model: BaseQModel) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        again = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.float()
    layers = {name: layer for name, layer in again.named_modules() if isinstance(layer, TorchLinear)}
    return {f"{name}.weight": layer.dequantize_weight().T for name, layer in layers.items()}


if __name__ == "__main__":
    work(quantise, weights, "gptqmodel")
