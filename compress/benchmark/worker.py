"""The measuring process: holds one model in one engine and answers what the parent asks of it. One side, one device, nothing else."""

import os
import platform
from functools import partial
from importlib.util import find_spec
from typing import Any

import psutil

from compress import engines, scores
from compress.benchmark import latency, memory, nvml, quality
from compress.benchmark.messages import Answer, Explain, GridPoint, Load, Loaded, Outputs, Time, Timings, WarmedUp, WarmUp
from compress.benchmark.quality import Reader
from compress.border import Handler, answering
from compress.engines import Engine, Explained, Opening
from compress.errors import OutOfMemory, is_out_of_memory
from compress.hardware import cpu_flags, cpu_name, pick_device
from compress.methods import Example
from compress.metrics import CLASSIFIED, GENERATED, READ, TASK
from compress.model.folder import file_bytes
from compress.model.loading import local_folder
from compress.model.source import Source
from compress.packages import versions
from compress.phases import phase
from compress.process import Progress, serve
from compress.recipe import Data, Generation, Runtime
from compress.structure import label_number


class Worker:
    """One model under measurement."""

    engine: Engine

    @memory.apart()  # else a run would fill the holes that loading left in the heap, which differ from process to process
    def load(self, progress: Progress, request: Load) -> Loaded:
        """Load the model and run its first step. That unpacks or rearranges some packed weights, and brings in code."""
        progress("loading", 0, 1)
        self.device = pick_device(request.device)
        module, threads = engines.require(request.engine), request.threads or len(os.sched_getaffinity(0))
        self.runtime = Runtime.model_validate(request.runtime)
        settings = module.Settings.model_validate(request.settings)
        opening = Opening(request.source, self.device, threads, self.runtime, settings)
        self.engine = module.make(opening, request.batch_tokens)
        self.interpreter = memory.resident()
        memory.reset_peak(self.device)
        self.engine.open()
        peaks, weights = memory.peak(self.device, self.interpreter), self.engine.weights()
        progress("loading", 1, 1)
        return Loaded(
            traits=self.engine.traits, weights=weights, file_bytes=file_bytes(local_folder(request.source)), peaks=peaks,
            interpreter=self.interpreter, rest=memory.at_rest(self.device, self.interpreter) - weights.weight_bytes - weights.reserved,
            sampled_only=self.device == "cpu" and not memory.can_reset(),
            environment=_environment(self.device, threads, module.ABOUT.packages),
        )  # fmt: skip

    def warm_up(self, progress: Progress, request: WarmUp) -> WarmedUp:
        """Run a point once and `repeats` times more.

        On the CPU the peak is the first run's, in which every tensor has memory of its own. What the heap of the other runs takes beyond it
        is the slack; without other runs it is unknown.
        """
        reason = self._why_not(*request.point, request.new_tokens)
        if reason is not None:
            return WarmedUp(reason)
        memory.reset_peak(self.device)
        with self.engine.cache_seen() as cache, memory.apart():
            first = runs = self._try(request.point, request.new_tokens, 1)
        if first:
            peaks = memory.peak(self.device, self.interpreter)
            if request.repeats:
                memory.reset_peak(self.device)
                runs = self._try(request.point, request.new_tokens, request.repeats)
        if not (first and runs):
            return WarmedUp("out of memory", out_of_memory=True)
        if request.repeats:
            again = memory.peak(self.device, self.interpreter)
            peaks = again if self.device == "cuda" else {**peaks, "slack": max(0, again["peak"] - peaks["peak"])}
        if self.device == "cuda" and "reserved" in peaks:
            peaks["slack"] = peaks["reserved"] - peaks["peak"]
        if cache:
            peaks["cache"] = cache[-1]
        compiling = max(0.0, first[0][-1] - runs[0][-1]) if self.runtime.compile else None
        return WarmedUp(memory=peaks, compile_seconds=compiling, marks=runs[-1])

    def time(self, progress: Progress, request: Time) -> Timings:
        """Time every point. After each slice it waits in `progress`, see `compress.benchmark.latency`."""
        seconds, joules = [], []
        each = request.iterations * request.new_tokens
        pace = latency.Pace(lambda done: progress("timing", done, len(request.points) * each))
        for number, point in enumerate(request.points):
            before, times = nvml.joules() if self.device == "cuda" else None, []
            for done in range(number * each, (number + 1) * each, request.new_tokens):
                times.append(self._time(point, request.new_tokens, partial(pace, done)))
            seconds.append(times)
            after = nvml.joules() if before is not None else None
            joules.append(None if before is None or after is None else after - before)
        return Timings(seconds, joules)

    def explain(self, progress: Progress, request: Explain) -> Explained | None:
        """What the machine can do at best, and at each point what a step reads and computes and where its time goes."""
        batches = [latency.prompts(self.engine.traits, *point) for point in request.points]
        return self.engine.explain(batches, request.new_tokens, progress)

    def answer(self, progress: Progress, request: Answer) -> Outputs:
        """Statistics of every metric, an example a row or the reason why there are none, with the outputs as texts and remarks on them."""
        data, generation = Data.model_validate(request.data), Generation.model_validate(request.generation)
        engine, groups, tokenizer = self.engine, request.groups, self.engine.tokenizer
        traits = engine.traits
        reader = Reader(tokenizer, traits.context, traits.encodes, data.max_tokens, data.chat, keep_end=data.shots > 0)
        references = [example.references for example in request.examples]
        samples: scores.Samples = {}
        texts: list[str] | None = None
        windows: list[str] | None = None
        remarks: list[str] = []
        if GENERATED & set(groups):
            written = engine.write(reader.to_write(request.examples, generation.max_new_tokens), generation, progress)
            remarks += written.remarks
            texts = [text.strip() for text in tokenizer.batch_decode(written.tokens, skip_special_tokens=True)]
            if data.shots:  # a model that goes on with the next example has answered before
                texts = [text.split(data.shot_separator)[0].strip() for text in texts]
            if "generated_tokens" in groups:
                samples["generated_tokens"] = [[float(len(row))] for row in written.tokens]
        if READ & set(groups):
            read, windows, left_out = self._read(reader, request, data, progress)
            samples.update(read)
            remarks += left_out
        if CLASSIFIED & set(groups):
            right = [label_number(traits.labels, r[0]) for r in references]
            with phase("reading"):
                guesses = engine.classify(reader.read(request.examples), progress)
            label_samples = scores.labels(guesses, right, len(traits.labels))
            samples.update({name: rows for name, rows in label_samples.items() if name in groups})
            texts = ["" if guess is None else traits.labels[guess] for guess in guesses]
        for group in groups:
            if group.startswith(TASK):
                with phase("tasks"):
                    task_samples, left_out = engine.evaluate(group.removeprefix(TASK), data.samples)
                samples.update(task_samples)
                remarks += left_out
        room = generation.max_new_tokens if GENERATED & set(groups) and not traits.encodes else 0
        return Outputs(
            samples=samples, texts=texts, windows=windows, cut=len(reader.cut), limit=reader.limit(), longest_input=reader.limit(room),
            generation_config=engine.own_generation(), remarks=remarks,
        )  # fmt: skip

    def _read(
        self, reader: Reader, request: Answer, data: Data, progress: Progress
    ) -> tuple[scores.Samples, list[str] | None, list[str]]:  # fmt: skip
        """Statistics of the metrics on likelihoods, the text of each window with data.join, and remarks."""
        samples: scores.Samples = {}
        original, reason = None, None
        if "divergence" in request.groups:
            original, reason = request.original, "it is from an original, and none is beside this model"
            if original is not None:
                reason = self.engine.why_no_divergence(original)
        with phase("reading"):
            try:
                rows, windows = self._likelihoods(reader, request, data, progress, None if reason else original)
            except OutOfMemory as error:
                if original is None:
                    raise
                reason = str(error)
                rows, windows = self._likelihoods(reader, request, data, progress, None)
        if "perplexity" in request.groups:
            samples["perplexity"] = scores.perplexity(rows)
        if "divergence" in request.groups and reason is None:
            samples.update(scores.divergence(rows))
        return samples, windows, [f"divergence was not measured: {reason}"] if reason else []

    def _likelihoods(
        self, reader: Reader, request: Answer, data: Data, progress: Progress, original: Source | None
    ) -> tuple[list[scores.Likelihood], list[str] | None]:  # fmt: skip
        read = partial(self.engine.read, progress=progress, original=original)
        prompts: list[Example] = request.examples
        if data.join is not None:
            return quality.stream_likelihoods(reader, prompts[0].prompt, read, data.stride, data.samples, data.seed)
        references = [example.references for example in prompts]
        targets = [r[0] for r in references] if any(references) else None
        return quality.likelihoods(reader, prompts, targets, read, data.stride), None

    def _why_not(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> str | None:
        """Why a point doesn't fit the model; None where it does."""
        traits = self.engine.traits
        needed = max(prompt_tokens, new_tokens) if traits.encodes else prompt_tokens + new_tokens
        if traits.context is not None and needed > traits.context:
            return f"{needed} tokens don't fit the model's context of {traits.context}"
        return None

    def _try(self, point: GridPoint, new_tokens: int, times: int) -> list[list[float]]:
        """Run a point `times` times: each run's seconds to every token; an empty list where memory runs out."""
        try:
            return [self._time(point, new_tokens) for _ in range(times)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        memory.release(self.device)  # not while the error is held, whose traceback holds the tensors
        return []

    def _time(self, point: GridPoint, new_tokens: int, rest: latency.Rest | None = None) -> list[float]:
        return latency.seconds(self.engine, latency.prompts(self.engine.traits, *point), new_tokens, rest)


def _environment(device: str, threads: int, packages: tuple[str, ...]) -> dict[str, Any]:
    """What the figures depend on besides the model."""
    cuda = device == "cuda"
    return {
        "device": device,
        "gpu_uuid": nvml.gpu_uuid() if cuda else None,
        **_of_torch(cuda),
        "threads": threads,
        "cpu": cpu_name(),
        "int8_instructions": _has_int8_instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions(("torch", "transformers", *packages)),
    }


def _of_torch(cuda: bool) -> dict[str, Any]:
    """The machine as torch describes it; an engine's own environment may lack torch."""
    if find_spec("torch") is None:
        return {"gpu": None, "gpu_memory_bytes": None, "cuda": None, "cpu_instructions": None}
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _has_int8_instructions() -> bool:
    """Whether the CPU multiplies int8 natively (x86 VNNI or AMX, Arm dot products)."""
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


def serve_by(worker: Worker, more: dict[str, Any] | None = None) -> None:
    """Have this worker answer requests until the parent ends."""
    handlers: dict[type, Handler] = {
        Load: worker.load,
        WarmUp: worker.warm_up,
        Time: worker.time,
        Explain: worker.explain,
        Answer: worker.answer,
    }
    serve({**answering(handlers), **(more or {})})


if __name__ == "__main__":
    serve_by(Worker())
