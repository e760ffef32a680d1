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
from compress.benchmark import latency, memory, quality
from compress.errors import ModelError
from compress.metrics import CLASSIFIED, GENERATED
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
        memory.bring_in(self.model)
        weight_bytes, parameters = models.weight_bytes(self.model), models.parameter_count(self.model)
        if runtime["cpu_int8"] and self.device == "cpu":
            use_cpu_int8(self.model)
        if runtime["sparse_24"]:
            use_sparse_24(self.model)
        progress("loading", 1, 1)
        return {
            "peak": memory.peak(self.device, self.interpreter),
            "interpreter": self.interpreter,
            "weight_bytes": weight_bytes,
            "buffer_bytes": memory.buffer_bytes(self.model),
            "file_bytes": models.file_bytes(models.local_folder(bundle.source)),
            "parameters": parameters,
            "environment": _environment(self.device),
        }

    def warm_up(self, progress: Progress, point: Point, new_tokens: int, repeats: int) -> dict[str, Any]:
        """Run a point twice, and on until it ran 1 + `repeats` times.

        Returns the peaks of the later runs with the bytes of the `cache` and, on the CPU, the allocator's `slack` in them; or the reason
        why the point can't be run.
        """
        memory.reset_peak(self.device)
        with memory.cache_seen(self.model) as cache, memory.apart():
            reason = self._try(*point, new_tokens, 1)
        if reason is not None:
            return {"reason": reason}
        alone = memory.peak(self.device, self.interpreter)["peak"]
        memory.reset_peak(self.device)
        reason = self._try(*point, new_tokens, max(1, repeats))
        found = memory.peak(self.device, self.interpreter)
        slack = found["reserved"] - found["peak"] if self.device == "cuda" else max(0, found["peak"] - alone)
        return {"reason": reason, "memory": {**found, "cache": cache[-1], "slack": slack}}

    def turn(self, progress: Progress, points: list[Point], new_tokens: int, iterations: int) -> list[list[list[float]]]:
        """For each point and iteration the seconds from the start to every token."""
        return [[self._time(batch, prompt, new_tokens) for _ in range(iterations)] for batch, prompt in points]

    def quality(
        self, progress: Progress, examples: list[dict[str, Any]], groups: list[str], generation: dict[str, Any], chat: bool,
        batch_size: int, max_tokens: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Per-example statistics of every metric asked for; the outputs as texts, None where there are none; how many inputs were cut."""
        reader = quality.Reader(self.model, self.tokenizer, max_tokens, chat)
        prompts = [e["prompt"] for e in examples]
        references = [e["references"] for e in examples]
        samples: scores.Samples = {}
        texts: list[str] | None = None
        if GENERATED & set(groups):
            torch.manual_seed(generation["seed"])
            tokens = quality.generate(reader, prompts, generation, batch_size, progress)
            texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            samples.update(scores.score_texts(groups, texts, references))
            if "generated_tokens" in groups:
                samples["generated_tokens"] = [[float(len(row))] for row in tokens]
        if "perplexity" in groups:
            targets = [r[0] for r in references] if any(references) else None
            samples["perplexity"] = quality.likelihoods(reader, prompts, targets, batch_size, progress)
        if CLASSIFIED & set(groups):
            right = [label_number(self.model.config, r[0]) for r in references]
            guesses = quality.classify(reader, prompts, batch_size, progress)
            found = scores.labels(guesses, right, self.model.config.num_labels)
            samples.update({name: rows for name, rows in found.items() if name in groups})
            texts = [str(self.model.config.id2label.get(guess, guess)) for guess in guesses]
        return {"samples": samples, "texts": texts, "cut": reader.cut, "generation_config": self._own_generation()}

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
        "gpu_uuid": memory.gpu_uuid() if cuda else None,
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
