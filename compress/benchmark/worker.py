"""The measuring process: holds one model and answers what the parent asks of it. One side, one device, nothing else."""

import gc
import importlib
import importlib.util
import os
import platform
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import PreTrainedModel

from compress import decoding, held, scores
from compress import model as models
from compress.benchmark import ceilings as ceiling
from compress.benchmark import kernels, latency, memory, nvml, quality, tasks, work
from compress.benchmark.batching import Batches
from compress.benchmark.generation import Writer
from compress.benchmark.quality import Reader
from compress.errors import ModelError
from compress.methods import Example
from compress.metrics import CLASSIFIED, GENERATED, READ, TASK
from compress.phases import phase
from compress.process import Progress, is_out_of_memory, serve
from compress.products import in_float32
from compress.recipe import Runtime
from compress.runtime import use_cpu_int8, use_sparse_24
from compress.scripts import Tokenizers
from compress.structure import context_length, label_number

Point = tuple[int, int]  # batch size, prompt tokens


class Worker:
    """One model under measurement."""

    @memory.apart()  # what loading left in a heap, a run would fill, in each process otherwise
    def load(self, progress: Progress, source: dict[str, Any], device: str, threads: int | None, runtime: dict[str, Any]) -> dict[str, Any]:
        """Load the model and run its first step, at which some packed weights are unpacked or laid out anew, and code comes in.

        Returns the peak meanwhile, the model's sizes after it, `rest` by which more is held than its tensors take, the environment, and how
        many layers the runtime `changed`.
        """
        progress("loading", 0, 1)
        self.device = models.pick_device(device)
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        self.source = models.Source(**source)
        bundle = models.Bundle(self.source, self.device)
        _import_all(bundle)
        if self.device == "cuda":
            torch.zeros(1, device="cuda")  # the context is no part of the model
        self.tokenizer = bundle.tokenizer  # alike on both sides, and no part of what a model holds
        self.interpreter = memory.resident()
        memory.reset_peak(self.device)
        self.model = bundle.model
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # decoder-only classifiers look for the last real token by it
        if len(self.tokenizer) > (rows := self.model.get_input_embeddings().num_embeddings):
            raise ModelError(
                f"{source['id']}: its tokenizer has {len(self.tokenizer)} tokens, its embedding only {rows}; they don't belong together"
            )
        memory.bring_in(self.model)
        parameters = models.parameter_count(self.model)
        self.runtime = Runtime.model_validate(runtime)
        self.called = self._compiled() if self.runtime.compile else self.model
        int8_layers = use_cpu_int8(self.model) if self.runtime.cpu_int8 and self.device == "cpu" else 0
        sparse_layers = use_sparse_24(self.model) if self.runtime.sparse_24 else 0
        latency.step(self.model, self.device)
        memory.bring_in(self.model)
        peak, weight_bytes = memory.peak(self.device, self.interpreter), held.weight_bytes(self.model)
        progress("loading", 1, 1)
        return {
            "peak": peak,
            "interpreter": self.interpreter,
            "weight_bytes": weight_bytes,
            "sampled_only": self.device == "cpu" and not memory.can_reset(),
            "rest": memory.at_rest(self.device, self.interpreter) - weight_bytes,
            "buffer_bytes": memory.buffer_bytes(self.model),
            "file_bytes": models.file_bytes(models.local_folder(bundle.source)),
            "parameters": parameters,
            "changed": {"cpu_int8": int8_layers, "sparse_24": sparse_layers},
            "environment": _environment(self.device),
        }

    def warm_up(self, progress: Progress, point: Point, new_tokens: int, repeats: int) -> dict[str, Any]:
        """Run a point once and `repeats` times more.

        Returns its peaks with the bytes of the `cache` and the allocator's `slack`, the last run's seconds to each token as `marks`, and
        where steps are compiled the seconds by which the first run was longer than the second; or the reason why the point can't be run. On
        the CPU the peak is the first run's, whose tensors lie apart; what the others' heap takes beyond it is the slack, unknown without.
        """
        memory.reset_peak(self.device)
        with memory.cache_seen(self.model) as cache, memory.apart():
            reason, first = self._try(*point, new_tokens, 1)
        if reason is not None:
            return {"reason": reason}
        peaks, runs = memory.peak(self.device, self.interpreter), first
        if repeats:
            memory.reset_peak(self.device)
            reason, runs = self._try(*point, new_tokens, repeats)
            if reason is not None:
                return {"reason": reason}
            again = memory.peak(self.device, self.interpreter)
            peaks = again if self.device == "cuda" else {**peaks, "slack": max(0, again["peak"] - peaks["peak"])}
        if self.device == "cuda":
            peaks["slack"] = peaks["reserved"] - peaks["peak"]
        compiling = max(0.0, first[0][-1] - runs[0][-1]) if self.runtime.compile else None
        return {"reason": None, "memory": {**peaks, "cache": cache[-1]}, "compile_seconds": compiling, "marks": runs[-1]}

    def turn(self, progress: Progress, points: list[Point], new_tokens: int, iterations: int) -> dict[str, Any]:
        """For each point: `seconds` from the start to every token, a list an iteration; `joules` the GPU drew in all, or None.

        Rests in `progress` after each slice, see `compress.benchmark.latency`.
        """
        seconds, joules = [], []
        each = iterations * new_tokens
        pace = latency.Pace(lambda done: progress("timing", done, len(points) * each))
        for number, (batch, prompt) in enumerate(points):
            before, times = nvml.joules() if self.device == "cuda" else None, []
            for done in range(number * each, (number + 1) * each, new_tokens):
                times.append(self._time(batch, prompt, new_tokens, partial(pace, done)))
            seconds.append(times)
            after = nvml.joules() if before is not None else None
            joules.append(None if before is None or after is None else after - before)
        return {"seconds": seconds, "joules": joules}

    def explain(self, progress: Progress, points: list[Point], new_tokens: int) -> dict[str, Any]:
        """What the machine can do at best, and at each point what a step reads and computes and where its time goes."""
        dtype = self.model.dtype
        ceilings = {
            "copy_bytes_per_second": round(ceiling.copy_bytes_per_second(self.device)),
            f"{_name(dtype)}_flops_per_second": round(ceiling.flops_per_second(self.device, dtype)),
        }
        steps = []
        for number, (batch_size, prompt_tokens) in enumerate(points):
            progress("looking at a step", number, len(points))
            steps.append({"batch_size": batch_size, "prompt_tokens": prompt_tokens, **self._step(batch_size, prompt_tokens, new_tokens)})
        progress("looking at a step", len(points), len(points))
        return {"dtype": _name(dtype), "ceilings": ceilings, "steps": steps}

    def _step(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        inputs = latency.prompts(self.model, self.device, batch_size, prompt_tokens)
        generates = self.model.can_generate()
        static = self.runtime.cache == "static"
        counter, began = work.Counter(), time.perf_counter()
        with counter.watching(self.model), in_float32(self.device):  # not compiled, which would pass over the hooks
            if generates:
                tokens = new_tokens if static else new_tokens // 2 + 1
                latency.generate(self.model, inputs, tokens, counter, Runtime(cache=self.runtime.cache))
            else:
                latency.classify(self.model, inputs, 1, counter)
        counted_seconds = (time.perf_counter() - began) / (tokens if generates else 1)
        step = counter.step if generates else counter.prefill
        seconds: float | None = None
        shares: dict[str, float] = {}

        def run(watch: kernels.Watch) -> None:
            if generates:
                with ExitStack() as prefill:  # which isn't looked at
                    if not self.runtime.compile:
                        prefill.enter_context(in_float32(self.device))
                    watch.begin = prefill.close
                    latency.generate(self.model, inputs, new_tokens if static else 2 * steps + 1, watch, self.runtime)
            else:
                latency.classify(self.called, inputs, 2 * steps + 1, watch)

        if steps := min(kernels.enough(counted_seconds), (new_tokens - 1) // 2):
            seconds, shares = kernels.profiled(run, self.device, steps)
        return {
            "weight_bytes": step.weight_bytes, "cache_bytes": counter.cache_bytes, "flops": step.flops,
            "prefill_flops": counter.prefill.flops if generates else None, "seconds": seconds, "shares": shares,
        }  # fmt: skip

    def quality(
        self, progress: Progress, examples: list[dict[str, Any]], groups: list[str], tokenizers: dict[str, str],
        generation: dict[str, Any], data: dict[str, Any], batch_tokens: int | None, original: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Per-example statistics of every metric asked for or why there are none, the outputs as texts (None where there are none), what
        there is to say of them.

        With data.join, `windows` has the text that each window counts.

        Nothing here is timed, so all cores work, and by the products that they are fast at.

        tokenizers     what metrics on texts cut these with, as `scripts.Tokenizers` has them
        data           the recipe's data block
        batch_tokens   None takes what free memory holds
        original       the source of the model from which this one diverges, which may be itself; None where there is none
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            with in_float32(self.device):
                return self._quality(progress, examples, groups, tokenizers, generation, data, batch_tokens, original)
        finally:
            torch.set_num_threads(threads)

    def _quality(
        self, progress: Progress, examples: list[dict[str, Any]], groups: list[str], tokenizers: dict[str, str],
        generation: dict[str, Any], data: dict[str, Any], batch_tokens: int | None, original: dict[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        reader = Reader(self.model, self.tokenizer, data["max_tokens"], data["chat"], keep_end=data["shots"] > 0)
        prompts = [Example(**example) for example in examples]
        references = [e["references"] for e in examples]
        batches = Batches(self.model, batch_tokens, progress)
        samples: scores.Samples = {}
        texts: list[str] | None = None
        windows: list[str] | None = None
        said = []
        if GENERATED & set(groups):
            own, size = self.model.generation_config, self.model.get_input_embeddings().num_embeddings
            decoding.refuse(own.to_dict(), size, decoding.FILE, generation["do_sample"] and generation["temperature"] is None)
            writer = Writer(reader, prompts, generation)
            if left_out := decoding.overruled(self.model.generation_config):
                said.append(f"of {decoding.FILE} {', '.join(left_out)} was left out: how fast and how often is the benchmark's to say")
            with phase("generating"), batches.stepwise(generation["max_new_tokens"]):
                tokens = writer.write(batches)
            with phase("checking examples alone"):
                said.append(writer.recheck(tokens).sentence)
            texts = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            if data["shots"]:  # a model that goes on with the next example has answered before
                texts = [text.split(data["shot_separator"])[0].strip() for text in texts]
            with phase("scoring"):
                samples.update(scores.score_texts(groups, texts, references, Tokenizers(**tokenizers)))
            if "generated_tokens" in groups:
                samples["generated_tokens"] = [[float(len(row))] for row in tokens]
        if READ & set(groups):
            targets = [r[0] for r in references] if any(references) else None
            read, windows, left_out = self._read(reader, prompts, targets, batches, groups, data, original)
            samples.update(read)
            said += left_out
        if CLASSIFIED & set(groups):
            right = [label_number(self.model.config, r[0]) for r in references]
            with phase("reading"):
                guesses = quality.classify(reader, prompts, batches)
            found = scores.labels(guesses, right, self.model.config.num_labels)
            samples.update({name: rows for name, rows in found.items() if name in groups})
            texts = ["" if guess is None else str(self.model.config.id2label.get(guess, guess)) for guess in guesses]
        for group in groups:
            if group.startswith(TASK):
                with phase("tasks"):
                    found, left_out = tasks.evaluate(self.model, self.tokenizer, group.removeprefix(TASK), data["samples"])
                samples.update(found)
                said += left_out
        if batches.halved:
            times = "once" if batches.halved == 1 else f"{batches.halved} times"
            said.append(f"memory ran out {times}; batches then held no more than {batches.tokens:,} tokens")
        room = generation["max_new_tokens"] if GENERATED & set(groups) and not self.model.config.is_encoder_decoder else 0
        return {
            "samples": samples, "texts": texts, "windows": windows, "cut": len(reader.cut), "limit": reader.limit(),
            "longest_input": reader.limit(room), "generation_config": self._own_generation(), "said": said,
        }  # fmt: skip

    def _read(
        self, reader: Reader, prompts: list[Example], targets: list[str] | None, batches: Batches, groups: list[str],
        data: dict[str, Any], original: dict[str, Any] | None,
    ) -> tuple[scores.Samples, list[str] | None, list[str]]:  # fmt: skip
        """Statistics of metrics on likelihoods, the text of each window with data.join, and what there is to say of them."""
        samples: scores.Samples = {}
        with phase("reading"):
            other, reason = self._original(original) if "divergence" in groups else (None, None)
            if data["join"] is not None:
                rows, windows = quality.stream_likelihoods(
                    reader, prompts[0].prompt, batches, data["stride"], data["samples"], data["seed"], other
                )
            else:
                rows, windows = quality.likelihoods(reader, prompts, targets, batches, data["stride"], other), None
        del other
        gc.collect()
        if "perplexity" in groups:
            samples["perplexity"] = scores.perplexity(rows)
        if "divergence" in groups and reason is None:
            samples.update(scores.divergence(rows))
        return samples, windows, [f"divergence was not measured: {reason}"] if reason else []

    def _original(self, source: dict[str, Any] | None) -> tuple[PreTrainedModel | None, str | None]:
        """The model of that source, None where it is this one; or why there is none to compare distributions with."""
        if source is None:
            return None, "it is from an original, and none is beside this model"
        if models.Source(**source) == self.source:
            return None, None
        try:
            bundle = models.Bundle(models.Source(**source), self.device)
            if bundle.tokenizer.get_vocab() != self.tokenizer.get_vocab():
                return None, f"the tokens of {source['id']} are others than this model's"
            return bundle.model, None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None, f"memory doesn't hold {source['id']} beside this model"

    def _own_generation(self) -> dict[str, Any]:
        """What the model's own generation config says; it holds where the recipe says nothing."""
        config = getattr(self.model, "generation_config", None)
        return {} if config is None else {key: str(value) for key, value in config.to_diff_dict().items() if key != "transformers_version"}

    def _try(self, batch_size: int, prompt_tokens: int, new_tokens: int, times: int) -> tuple[str | None, list[list[float]]]:
        """Run a point so many times; why it can't be, or None, and each run's seconds to every token."""
        context = context_length(self.model.config, self.tokenizer)
        needed = max(prompt_tokens, new_tokens) if self.model.config.is_encoder_decoder else prompt_tokens + new_tokens
        if context is not None and needed > context:
            return f"{needed} tokens don't fit the model's context of {context}", []
        try:
            return None, [self._time(batch_size, prompt_tokens, new_tokens) for _ in range(times)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # not while the error is held, whose traceback holds the tensors
        return "out of memory", []

    def _time(self, batch_size: int, prompt_tokens: int, new_tokens: int, rest: latency.Rest | None = None) -> list[float]:
        inputs = latency.prompts(self.model, self.device, batch_size, prompt_tokens)
        if self.model.can_generate():
            return latency.generation_seconds(self.model, inputs, new_tokens, self.device, self.runtime, rest)
        return latency.forward_seconds(self.called, inputs, self.device, rest)

    def _compiled(self) -> Any:
        """The model as classification calls it; generation compiles its steps itself. Raises ModelError for one that can't be."""
        packed = getattr(self.model, "hf_quantizer", None)
        if packed is not None and not packed.is_compileable:
            method = packed.quantization_config.quant_method.value
            raise ModelError(f"benchmark.runtime.compile: transformers doesn't compile models packed by {method}; leave compile out")
        # a recompilation that is given up would be timed without a word
        torch._dynamo.config.recompile_limit = 1000
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(self.model, dynamic=False)


def _import_all(bundle: models.Bundle) -> None:
    """Bring in the code that the model will need, so that it counts as the interpreter's memory and not as the model's.

    Much of it comes with a first run: a small model has one here.
    """
    packing = getattr(bundle.config, "quantization_config", None)
    method = packing.get("quant_method") if isinstance(packing, dict) else getattr(packing, "quant_method", None)
    name = str(getattr(method, "value", method))
    if method is not None and importlib.util.find_spec(name):
        importlib.import_module(name)
    if bundle.device == "cpu":  # on a GPU what is allocated is told, and code isn't
        shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0, eos_token_id=1))
        stored = bundle.config.dtype if bundle.source.dtype == "auto" else getattr(torch, bundle.source.dtype)
        latency.step(small.to(stored or torch.float32).eval(), "cpu")


def _environment(device: str) -> dict[str, Any]:
    """What the figures depend on besides the model."""
    cuda = device == "cuda"
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_uuid": nvml.gpu_uuid() if cuda else None,
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


def _name(dtype: torch.dtype) -> str:
    """float32"""
    return str(dtype).removeprefix("torch.")


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
    serve({"load": worker.load, "warm_up": worker.warm_up, "turn": worker.turn, "explain": worker.explain, "quality": worker.quality})
