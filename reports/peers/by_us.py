"""A method of this package, any that packs, with settings of its own behind a colon (gptq:tune=50). What it packed is read back by plain
transformers."""

import tempfile
from pathlib import Path

import torch
from peer import Job, work
from torch import Tensor, nn

from compress import methods
from compress.model.loading import Bundle
from compress.model.source import Source


def quantise(job: Job) -> Bundle:
    name, _, options = job.method.partition(":")
    method = methods.find("quantize", name)
    own = {"steps": job.steps} if "steps" in method.Settings.model_fields else {}
    own |= {key: int(value) for key, value in (pair.split("=") for pair in options.split(",") if pair)}
    settings = method.Settings(bits=job.bits, group_size=job.group_size, symmetric=job.symmetric, **own)
    bundle = Bundle(Source(job.model, job.task, "auto"), "cpu")
    retokenised = [bundle.tokenizer(text, truncation=True, max_length=job.max_tokens).input_ids for text in job.texts]
    assert retokenised == job.rows, "the texts don't tokenise to the rows that the others are given"
    examples = [methods.Example(str(n), text, []) for n, text in enumerate(job.texts)]
    return method.apply(bundle, settings, methods.Context("cpu", methods.quiet, examples, job.max_tokens))


def weights(bundle: Bundle) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(Path(folder))
        model = type(bundle.model).from_pretrained(folder, dtype=torch.float32)
    packed = {name for name, module in bundle.model.named_modules() if not isinstance(module, nn.Linear)}
    return {f"{name}.weight": layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name in packed}


if __name__ == "__main__":
    work(quantise, weights, "compress-workbench")
