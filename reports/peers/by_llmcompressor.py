"""llm-compressor's GPTQ; the weights that it leaves in the model stand on the grid already."""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from peer import Job, work
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

logger.remove()


def quantise(job: Job) -> PreTrainedModel:
    grid = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "channel" if job.group_size == -1 else "group",
        "group_size": None if job.group_size == -1 else job.group_size,
        "observer": "memoryless_mse" if job.method == "searched" else "memoryless_minmax",
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static", dampening_frac=0.01)
    return oneshot(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        dataset=Dataset.from_dict({"input_ids": job.rows, "attention_mask": [[1] * len(row) for row in job.rows]}),
        recipe=recipe,
        batch_size=1,
        num_calibration_samples=len(job.rows),
        max_seq_length=job.max_tokens,
        shuffle_calibration_samples=False,
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and hasattr(layer, "weight_scale")}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


if __name__ == "__main__":
    work(quantise, weights, "llmcompressor")
