"""The measuring process: holds one model and answers what the parent asks of it. One side, one device, nothing else."""

import importlib
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from compress import model as models
from compress import scores
from compress.architecture import context_length, label_number
from compress.benchmark import latency, memory, quality, tasks
from compress.benchmark.batching import Batches
from compress.benchmark.generation import Writer
from compress.errors import ModelError
from compress.metrics import CLASSIFIED, GENERATED, TASK
from compress.process import Progress, is_out_of_memory, serve
from compress.runtime import use_cpu_int8, use_sparse_24

Point = tuple[int, int]  # batch size, prompt tokens


class Worker:
    """One model under measurement."""

    def load(
        self, progress: Progress, source: dict[str, Any], device: str, threads: int | None, runtime: dict[str, bool]
    ) -> dict[str, Any]:
        """Load the model. Returns the peak while loading, the model's sizes and the environment."""
        progress("loading", 0, 1)
        self.device = models.pick_device(device)
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        bundle = models.Bundle(models.Source(**source), self.device)
        _import_all(bundle)
        if self.device == "cuda":
            torch.zeros(1, device="cuda")  # the context is no part of the model
        self.interpreter = memory.resident()
        memory.reset_peak(self.device)
        self.model, self.tokenizer = bundle.model, bundle.tokenizer
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # decoder-only classifiers look for the last real token by it
        if len(self.tokenizer) > (rows := self.model.get_input_embeddings().num_embeddings):
            raise ModelError(
                f"{source['id']}: its tokenizer has {len(self.tokenizer)} tokens, its embedding only {rows}; they don't belong together"
            )
        weight_bytes, parameters = models.weight_bytes(self.model), models.parameter_count(self.model)
        if runtime["cpu_int8"] and self.device == "cpu":
            use_cpu_int8(self.model)
        if runtime["sparse_24"]:
            use_sparse_24(self.model)
        progress("loading", 1, 1)
        return {
            "peak": memory.peak(self.device, self.interpreter),
            "weight_bytes": weight_bytes,
            "file_bytes": models.file_bytes(models.local_folder(bundle.source)),
            "parameters": parameters,
            "environment": _environment(self.device),
        }

    def warm_up(self, progress: Progress, points: list[Point], new_tokens: int, repeats: int) -> list[dict[str, Any]]:
        """Run each point once and `repeats` times more. Returns for each the peak while running, or the reason why it can't be run."""
        found = []
        for number, (batch_size, prompt_tokens) in enumerate(points):
            progress("warming up", number, len(points))
            memory.reset_peak(self.device)
            reason = self._try(batch_size, prompt_tokens, new_tokens, 1 + repeats)
            found.append({"reason": reason, "peak": memory.peak(self.device, self.interpreter)})
        progress("warming up", len(points), len(points))
        return found

    def turn(self, progress: Progress, points: list[Point], new_tokens: int, iterations: int) -> list[list[list[float]]]:
        """For each point and iteration the seconds from the start to every token."""
        return [[self._time(batch, prompt, new_tokens) for _ in range(iterations)] for batch, prompt in points]

    def quality(
        self, progress: Progress, examples: list[dict[str, Any]], groups: list[str], generation: dict[str, Any], data: dict[str, Any],
        batch_tokens: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Per-example statistics of every metric asked for, the outputs as texts (None where there are none), what there is to say of them.

        data           the recipe's data block
        batch_tokens   None takes what free memory holds
        """
        reader = quality.Reader(self.model, self.tokenizer, data["max_tokens"], data["chat"], keep_end=data["shots"] > 0)
        prompts = [e["prompt"] for e in examples]
        references = [e["references"] for e in examples]
        batches = Batches(self.model, batch_tokens, progress)
        samples: scores.Samples = {}
        texts: list[str] | None = None
        said = []
        if GENERATED & set(groups):
            writer = Writer(reader, prompts, generation)
            tokens = writer.write(batches)
            said.append(writer.recheck(tokens).sentence)
            texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            if data["shots"]:  # a model that goes on with the next example has answered before
                texts = [text.split(data["shot_separator"])[0].strip() for text in texts]
            samples.update(scores.score_texts(groups, texts, references))
            if "generated_tokens" in groups:
                samples["generated_tokens"] = [[float(len(row))] for row in tokens]
        if "perplexity" in groups:
            targets = [r[0] for r in references] if any(references) else None
            samples["perplexity"] = quality.likelihoods(reader, prompts, targets, batches, data["stride"])
        if CLASSIFIED & set(groups):
            right = [label_number(self.model.config, r[0]) for r in references]
            guesses = quality.classify(reader, prompts, batches)
            found = scores.labels(guesses, right, self.model.config.num_labels)
            samples.update({name: rows for name, rows in found.items() if name in groups})
            texts = [str(self.model.config.id2label.get(guess, guess)) for guess in guesses]
        for group in groups:
            if group.startswith(TASK):
                found, left_out = tasks.evaluate(self.model, self.tokenizer, group.removeprefix(TASK), data["samples"])
                samples.update(found)
                said += left_out
        if batches.halved:
            times = "once" if batches.halved == 1 else f"{batches.halved} times"
            said.append(f"memory ran out {times}; batches then held no more than {batches.tokens:,} tokens")
        return {"samples": samples, "texts": texts, "cut": reader.cut, "generation_config": self._own_generation(), "said": said}

    def _own_generation(self) -> dict[str, Any]:
        """What the model's own generation config says; it holds where the recipe says nothing."""
        config = getattr(self.model, "generation_config", None)
        return {} if config is None else {key: str(value) for key, value in config.to_diff_dict().items() if key != "transformers_version"}

    def _try(self, batch_size: int, prompt_tokens: int, new_tokens: int, times: int) -> str | None:
        """Run a point; why it can't be, or None."""
        context = context_length(self.model.config, self.tokenizer)
        needed = max(prompt_tokens, new_tokens) if self.model.config.is_encoder_decoder else prompt_tokens + new_tokens
        if context is not None and needed > context:
            return f"{needed} tokens don't fit the model's context of {context}"
        try:
            for _ in range(times):
                self._time(batch_size, prompt_tokens, new_tokens)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # not while the error is held, whose traceback holds the tensors
        return "out of memory"

    def _time(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> list[float]:
        inputs = latency.prompts(self.model, self.device, batch_size, prompt_tokens)
        if self.model.can_generate():
            return latency.generation_seconds(self.model, inputs, new_tokens, self.device)
        return latency.forward_seconds(self.model, inputs, self.device)


def _import_all(bundle: models.Bundle) -> None:
    """Import the code that the model will need, so that it counts as the interpreter's memory and not as the model's."""
    packing = getattr(models.skeleton(bundle.source).config, "quantization_config", None)
    method = packing.get("quant_method") if isinstance(packing, dict) else getattr(packing, "quant_method", None)
    name = str(getattr(method, "value", method))
    if method is not None and importlib.util.find_spec(name):
        importlib.import_module(name)


def _environment(device: str) -> dict[str, Any]:
    """What the figures depend on besides the model."""
    cuda = device == "cuda"
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "int8_instructions": _has_int8_instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _has_int8_instructions() -> bool:
    """Whether the CPU multiplies int8 natively (x86 VNNI or AMX, Arm dot products)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


if __name__ == "__main__":
    worker = Worker()
    serve({"load": worker.load, "warm_up": worker.warm_up, "turn": worker.turn, "quality": worker.quality})
