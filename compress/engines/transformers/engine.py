"""A model in transformers: opening, running, reading and explaining it."""

import gc
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from compress import decoding, held
from compress.engines import Engine, Explained, Opening, Piece, Step, Traits, Weights, Written
from compress.engines.transformers import ceilings as ceiling
from compress.engines.transformers import kernels, reading, tasks, timing, work
from compress.engines.transformers.batching import Batches
from compress.engines.transformers.generation import Writer
from compress.errors import ModelError, OutOfMemory, is_out_of_memory
from compress.model.loading import Bundle, load_tokenizer, parameter_count
from compress.model.source import Source
from compress.phases import phase
from compress.process import Progress
from compress.products import in_float32
from compress.recipe import Generation, Runtime
from compress.runtime import use_cpu_int8, use_sparse_24
from compress.scores import Likelihood, Samples
from compress.structure import context_length, labels_of


class Transformers(Engine):
    """A model as transformers loads it."""

    def __init__(self, opening: Opening, batch_tokens: int | None = None):
        self.source, self.device, self.runtime, self._batch_tokens = opening.source, opening.device, opening.runtime, batch_tokens
        torch.set_num_threads(opening.threads)
        self._bundle = Bundle(self.source, self.device)
        _import_all(self._bundle)
        if self.device == "cuda":
            torch.zeros(1, device="cuda")  # the CUDA context is no part of the model
        self.tokenizer = self._bundle.tokenizer  # alike on both sides, and no part of what a model holds

    def open(self) -> None:
        self.model = model = self._bundle.model
        config = model.config
        context = context_length(config, self.tokenizer)  # some models count positions from their own padding token
        config.pad_token_id = self.tokenizer.pad_token_id  # decoder-only classifiers look for the last real token by it
        if len(self.tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
            raise ModelError(
                f"{self.source.id}: its tokenizer has {len(self.tokenizer)} tokens, its embedding only {rows}; they don't belong together"
            )
        _bring_in(model)
        self._parameters = parameter_count(model)
        self._called = self._compiled() if self.runtime.compile else model
        changed = {
            "cpu_int8": use_cpu_int8(model) if self.runtime.cpu_int8 and self.device == "cpu" else 0,
            "sparse_24": use_sparse_24(model) if self.runtime.sparse_24 else 0,
        }
        timing.step(model)
        _bring_in(model)
        generates = model.can_generate()
        self.traits = Traits(
            dtype=_name(model.dtype), context=context, vocabulary=config.get_text_config().vocab_size,
            encodes=bool(config.is_encoder_decoder), generates=generates,
            start=getattr(config, "decoder_start_token_id", None),
            end=timing.end_of_input(model),
            labels=() if generates else labels_of(config),
            queues=self.device == "cuda", changed=changed,
        )  # fmt: skip

    def weights(self) -> Weights:
        return Weights(held.weight_bytes(self.model), held.extent(self.model.buffers()), self._parameters)

    def prepare(self, prompts: list[list[int]]) -> dict[str, Any]:
        return timing.batch(self.model, prompts)

    def run(self, prepared: dict[str, Any], new_tokens: int, watch: Callable[[], None]) -> None:
        told = timing.Told(watch)
        if not self.traits.generates:
            timing.classify(self._called, prepared, 1, told)
            return
        output = timing.generate(self.model, prepared, new_tokens, told, self.runtime)
        produced = output.shape[1] - (1 if self.traits.encodes else prepared["input_ids"].shape[1])
        if produced != new_tokens:
            raise RuntimeError(f"{new_tokens} tokens were forced and {produced} came")

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        own, size = self.model.generation_config, self.model.get_input_embeddings().num_embeddings
        decoding.refuse(own.to_dict(), size, decoding.FILE, generation.do_sample and generation.temperature is None)
        with self._untimed(progress) as batches:
            writer = Writer(self.model, self.tokenizer, prompts, generation)
            remarks = []
            if left_out := decoding.overruled(own):
                remarks.append(f"of {decoding.FILE} {', '.join(left_out)} was left out: how fast and how often is the benchmark's to say")
            with phase("generating"), batches.stepwise(generation.max_new_tokens):
                tokens = writer.write(batches)
            with phase("checking examples alone"):
                remarks.append(writer.recheck(tokens).sentence)
        return Written(tokens, remarks + _halved(batches))

    def read(self, pieces: list[Piece], progress: Progress, original: Source | None = None) -> list[Likelihood]:
        other = None if original is None or original == self.source else self._beside(original)
        with self._untimed(progress) as batches:
            return reading.likelihoods(self.model, self.tokenizer, pieces, batches, other)

    def classify(self, prompts: list[list[int]], progress: Progress) -> list[int | None]:
        with self._untimed(progress) as batches:
            return reading.classify(self.model, self.tokenizer, prompts, batches)

    def why_no_divergence(self, original: Source) -> str | None:
        if original != self.source and load_tokenizer(original).get_vocab() != self.tokenizer.get_vocab():
            return f"the tokens of {original.id} are others than this model's"
        return None

    def own_generation(self) -> dict[str, str]:
        config = getattr(self.model, "generation_config", None)
        return {} if config is None else {key: str(value) for key, value in config.to_diff_dict().items() if key != "transformers_version"}

    def evaluate(self, task: str, samples: int | None) -> tuple[Samples, list[str]]:
        return tasks.evaluate(self.model, self.tokenizer, task, samples)

    def explain(self, batches: Sequence[list[list[int]]], new_tokens: int, progress: Progress) -> Explained:
        ceilings: dict[str, float] = {
            "copy_bytes_per_second": round(ceiling.copy_bytes_per_second(self.device)),
            f"{self.traits.dtype}_flops_per_second": round(ceiling.flops_per_second(self.device, self.model.dtype)),
        }
        steps = []
        for number, prompts in enumerate(batches):
            progress("looking at a step", number, len(batches))
            steps.append(self._step(timing.batch(self.model, prompts), new_tokens))
        progress("looking at a step", len(batches), len(batches))
        return Explained(ceilings, steps)

    @contextmanager
    def cache_seen(self) -> Iterator[list[int]]:
        with cache_seen(self.model) as sizes:
            yield sizes

    @contextmanager
    def _untimed(self, progress: Progress) -> Iterator[Batches]:
        """Within it nothing is timed: all cores work, with the matrix products that are fastest on them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            with in_float32(self.device):
                yield Batches(self.model, self._batch_tokens, progress)
        finally:
            torch.set_num_threads(threads)

    def _beside(self, original: Source) -> PreTrainedModel:
        try:
            return Bundle(original, self.device).model
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        raise OutOfMemory(f"memory doesn't hold {original.id} beside this model")

    def _step(self, inputs: dict[str, Any], new_tokens: int) -> Step:
        generates, static = self.traits.generates, self.runtime.cache == "static"
        counter, began = work.Counter(), time.perf_counter()
        with counter.watching(self.model), in_float32(self.device):  # uncompiled: compiled steps would skip the hooks
            if generates:
                tokens = new_tokens if static else new_tokens // 2 + 1
                timing.generate(self.model, inputs, tokens, counter, Runtime(cache=self.runtime.cache))
            else:
                timing.classify(self.model, inputs, 1, counter)
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
                    timing.generate(self.model, inputs, new_tokens if static else 2 * steps + 1, watch, self.runtime)
            else:
                timing.classify(self._called, inputs, 2 * steps + 1, watch)

        if steps := min(kernels.enough(counted_seconds), (new_tokens - 1) // 2):
            seconds, shares = kernels.profiled(run, self.device, steps)
        return Step(
            step.weight_bytes, counter.cache_bytes, step.flops, counter.prefill.flops if generates else None, seconds, shares
        )  # fmt: skip

    def _compiled(self) -> Any:
        """The compiled model for classification; generation compiles its steps itself. Raises ModelError where it can't be compiled."""
        packed = getattr(self.model, "hf_quantizer", None)
        if packed is not None and not packed.is_compileable:
            method = packed.quantization_config.quant_method.value
            raise ModelError(f"benchmark.runtime.compile: transformers doesn't compile models packed by {method}; leave compile out")
        # else a recompilation that is given up would be timed in silence
        torch._dynamo.config.recompile_limit = 1000
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(self.model, dynamic=False)


@contextmanager
def cache_seen(model: PreTrainedModel) -> Iterator[list[int]]:
    """Bytes of keys and values that each call of the model left for the next, while the block runs."""
    sizes: list[int] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        sizes.append(0 if cache is None else work.cache_bytes(cache))

    handle = model.register_forward_hook(look)
    try:
        yield sizes
    finally:
        handle.remove()


def _halved(batches: Batches) -> list[str]:
    if not batches.halved:
        return []
    times = "once" if batches.halved == 1 else f"{batches.halved} times"
    return [f"memory ran out {times}; batches then held no more than {batches.tokens:,} tokens"]


def _bring_in(model: PreTrainedModel) -> None:
    """Read a byte of every page of the weights on the CPU.

    Weights in their stored dtype are mapped from the file, and pages that no step has read yet would not count as memory.
    """
    for tensor in held.plain_tensors([*model.parameters(), *model.buffers()]):
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized:
            start = tensor.storage_offset() * tensor.element_size()
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (tensor.nbytes,), (1,))[::4096].sum()


def _import_all(bundle: Bundle) -> None:
    """Import the code that the model will need, so that it counts as the interpreter's memory and not as the model's.

    Much of it comes with a first run, so a small model is run here.
    """
    packing = getattr(bundle.config, "quantization_config", None)
    method = packing.get("quant_method") if isinstance(packing, dict) else getattr(packing, "quant_method", None)
    name = str(getattr(method, "value", method))
    if method is not None and importlib.util.find_spec(name):
        importlib.import_module(name)
    if bundle.device == "cpu":  # on a GPU only allocations count, and code is none
        shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0, eos_token_id=1))
        stored = bundle.config.dtype if bundle.source.dtype == "auto" else getattr(torch, bundle.source.dtype)
        timing.step(small.to(stored or torch.float32).eval())


def _name(dtype: torch.dtype) -> str:
    """float32"""
    return str(dtype).removeprefix("torch.")
