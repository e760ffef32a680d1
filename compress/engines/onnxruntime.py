"""ONNX Runtime (Microsoft): decoders on CPUs, in floats, or with weights in 4 or 8 bits that it unpacks as it multiplies."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress import decoding, exports
from compress.engines import About, Engine, Opening, Piece, Traits, Weights, Written, batched, nats
from compress.errors import ModelError, in_a_line
from compress.methods import Settings  # noqa: F401  # it has none of its own
from compress.model.folder import file_bytes
from compress.model.loading import load_tokenizer, read_config
from compress.model.source import Source, settings
from compress.phases import phase
from compress.process import Progress
from compress.recipe import Generation
from compress.scores import Likelihood
from compress.structure import context_length

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # nothing is sent anywhere; it looks when it is imported

ABOUT = About(
    reads="what `export: onnx` writes",
    opens="onnx",
    tasks=("causal-lm",),
    devices=("cpu",),
    packages=("onnxruntime", "onnxruntime-genai"),
    extra="onnxruntime",
)
TOKENS, SCORES = 4096, 2**26  # of a batch of examples by default: tokens, and logits, which all tokens of a prompt get


def make(opening: Opening, batch_tokens: int | None = None) -> Engine:
    return OnnxRuntime(opening, batch_tokens)


class OnnxRuntime(Engine):
    """A model as onnxruntime-genai runs it. Batches are of prompts of one length: padding changes what it computes."""

    def __init__(self, opening: Opening, batch_tokens: int | None):
        import onnxruntime_genai  # noqa: F401  # which making an engine imports

        self._opening, self._folder, self._config = opening, Path(opening.source.id), read_config(opening.source)
        self._generation = settings(opening.source, decoding.FILE)
        self.tokenizer = load_tokenizer(opening.source)
        self._vocabulary = int(self._config.vocab_size)
        self._most = batch_tokens or min(TOKENS, max(1, SCORES // self._vocabulary))

    def open(self) -> None:
        import onnxruntime_genai

        export = exports.require(self._folder, "onnx", "onnxruntime")
        session = {"intra_op_num_threads": self._opening.threads, "inter_op_num_threads": 1}
        try:
            config = onnxruntime_genai.Config(str(self._folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise ModelError(f"engine: onnxruntime: {self._folder}: {in_a_line(error)}") from None
        self.traits = Traits(
            dtype="float32" if export.weights == "float32" else f"{export.weights}_float32",
            context=context_length(self._config, self.tokenizer), vocabulary=self._vocabulary, encodes=False, generates=True,
            ends=decoding.ends(self._generation, self._config.eos_token_id, self.tokenizer.pad_token_id),
        )  # fmt: skip
        twice = 4 * self._vocabulary * self._config.hidden_size * self._config.tie_word_embeddings  # a tied head, transposed for look-ups
        self._weights = Weights(file_bytes(self._folder) + twice, twice, export.parameters)  # rearranged weights are as large
        self.run([[min(10, self._vocabulary - 1)] * 4], 2, lambda: None)

    def weights(self) -> Weights:
        return self._weights

    def run(self, prepared: list[list[int]], new_tokens: int, watch: Callable[[], None]) -> None:
        for _ in self._steps(prepared, new_tokens, least=new_tokens):
            watch()

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        own = decoding.followed("onnxruntime", self._generation, generation, ("repetition_penalty",))
        most, ends = generation.max_new_tokens, self.traits.ends
        tokens: list[list[int]] = [[] for _ in prompts]
        with phase("generating"):
            for batch in batched([len(prompt) + most for prompt in prompts], self._most, progress, "generating", spread=0):
                for step in self._steps([prompts[row] for row in batch], most, penalty=own.get("repetition_penalty") or 1.0):
                    for row, token in zip(batch, step, strict=True):
                        tokens[row].append(token)
        return Written([list(takewhile(lambda token: token not in ends, row)) for row in tokens])

    def read(self, pieces: list[Piece], progress: Progress, original: Source | None = None) -> list[Likelihood]:
        import numpy as np

        likelihoods = [Likelihood()] * len(pieces)
        for (row,) in batched([len(piece.ids) for piece in pieces], 1, progress, "reading"):
            ids, labels = pieces[row].ids, np.array([*pieces[row].labels[1:], -100])
            logits, counted = self._begin([ids], 0).get_output("logits")[0], labels >= 0
            likelihoods[row] = Likelihood(nats(logits[counted], labels[counted]), int(counted.sum()), 0.0, 0.0, 0.0)
        return likelihoods

    def _begin(self, prompts: list[list[int]], new_tokens: int, least: int = 0, penalty: float = 1.0) -> Any:
        """A generator that has read prompts of one length, and will write from `least` to `new_tokens` tokens to them."""
        import numpy as np
        import onnxruntime_genai

        how, length = onnxruntime_genai.GeneratorParams(self._model), len(prompts[0])
        how.set_search_options(
            batch_size=len(prompts), max_length=length + new_tokens, min_length=length + least, do_sample=False, num_beams=1,
            num_return_sequences=1, repetition_penalty=penalty, no_repeat_ngram_size=0,
        )  # fmt: skip
        generator = onnxruntime_genai.Generator(self._model, how)
        generator.append_tokens(np.array(prompts, np.int32))
        return generator

    def _steps(self, prompts: list[list[int]], new_tokens: int, least: int = 0, penalty: float = 1.0) -> Iterator[list[int]]:
        """The likeliest tokens, one a prompt, step by step until all have ended; a row that has goes on with its end or padding."""
        generator = self._begin(prompts, new_tokens, least, penalty)
        while not generator.is_done():
            generator.generate_next_token()
            yield generator.get_next_tokens().tolist()
