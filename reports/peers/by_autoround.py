"""auto-round as it comes, in float32; the weights that it leaves in the model stand on the grid already."""

import logging

import torch
from auto_round import AutoRound
from peer import Job, work
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

logging.disable(logging.WARNING)


def quantise(job: Job) -> PreTrainedModel:
    auto = AutoModelForCausalLM if job.task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(job.model, dtype=torch.float32)
    tuned = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        iters=job.steps,
        batch_size=job.batch,
        nsamples=len(job.rows),
        seqlen=job.max_tokens,
        dataset=[torch.tensor([row]) for row in job.rows],
        device_map="cpu",
        amp=False,
    )
    return tuned.quantize()[0]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and hasattr(layer, "scale")}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


if __name__ == "__main__":
    work(quantise, weights, "auto-round")
