"""A method of this package, any that packs, with settings of its own behind a colon (gptq:tune=50). What it packed is read back by plain
transformers."""

import tempfile
from pathlib import Path

import torch
from peer import Job, work
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import methods
from compress.model import Bundle, Source


def quantise(job: Job) -> Bundle:
    name, _, options = job.method.partition(":")
    method = methods.find("quantize", name)
    own = {"steps": job.steps} if "steps" in method.Settings.model_fields else {}
    own |= {key: int(value) for key, value in (pair.split("=") for pair in options.split(",") if pair)}
    settings = method.Settings(bits=job.bits, group_size=job.group_size, symmetric=job.symmetric, **own)
    bundle = Bundle(Source(job.model, "causal-lm", "auto"), "cpu")
    retokenised = [bundle.tokenizer(text, truncation=True, max_length=job.max_tokens).input_ids for text in job.texts]
    assert retokenised == job.rows, "the texts don't tokenise to the rows that the others are given"
    examples = [methods.Example(str(n), text, []) for n, text in enumerate(job.texts)]
    return method.apply(bundle, settings, methods.Context("cpu", methods.quiet, examples, job.max_tokens))


def weights(bundle: Bundle) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {f"{name}.weight": layer.weight for name, layer in model.model.named_modules(prefix="model") if isinstance(layer, nn.Linear)}


if __name__ == "__main__":
    work(quantise, weights, "compress-workbench")
