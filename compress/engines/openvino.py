"""OpenVINO (Intel): decoders and encoder-decoders on CPUs, in floats, or with weights in 8 or 4 bits that it unpacks as it multiplies."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import decoding, exports
from compress.engines import About, Engine, Opening, Piece, Traits, Weights, Written, batched, nats
from compress.errors import ModelError
from compress.methods import Settings as _Settings
from compress.model.loading import load_tokenizer, read_config
from compress.model.source import settings
from compress.phases import phase
from compress.process import Progress
from compress.quiet import silence
from compress.recipe import Generation
from compress.scores import Likelihood
from compress.structure import context_length

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.model.source import Source

silence("openvino_telemetry")  # nothing is sent anywhere

ABOUT = About(
    reads="what `export: openvino` writes",
    opens="openvino",
    tasks=("seq2seq", "causal-lm"),
    devices=("cpu",),
    packages=("openvino",),
    extra="openvino",
)
FOLDER = "openvino"
TOKENS, SCORES = 4096, 2**26  # of a batch of examples by default: tokens, and logits that are read at once
SPREAD = 16  # tokens by which prompts of a batch may differ without an encoder: padding stands before them
TYPES = {"float32": "f32", "bfloat16": "bf16"}
FOLLOWED = ("repetition_penalty", "forced_eos_token_id")  # of what a generation config may say


class Settings(_Settings):
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="what it computes in, and keeps keys and values in; bfloat16 where the CPU has instructions for it"
    )


def make(opening: Opening, batch_tokens: int | None = None) -> Engine:
    return OpenVINO(opening, batch_tokens)


class OpenVINO(Engine):
    """A model as OpenVINO runs it, token by token; its graphs are described in `compress.export._openvino_graph`."""

    def __init__(self, opening: Opening, batch_tokens: int | None):
        import openvino  # noqa: F401  # which making an engine imports

        self._opening, self._folder, self._config = opening, Path(opening.source.id), read_config(opening.source)
        self._generation = settings(opening.source, decoding.FILE)
        self.tokenizer = load_tokenizer(opening.source)
        self._vocabulary = int(self._config.get_text_config(decoder=True).vocab_size)
        self._most = batch_tokens or TOKENS

    def open(self) -> None:
        export = exports.require(self._folder, "openvino", "openvino")
        config, own = self._config, self._opening.settings
        assert isinstance(own, Settings)
        encodes = bool(config.is_encoder_decoder)
        self._encoder = self._compiled("encoder", own.precision) if encodes else None
        self._decoder = self._compiled("decoder", own.precision)
        self._takes = {port.any_name for port in self._decoder.model_inputs}
        self.traits = Traits(
            dtype=own.precision if export.weights == "float32" else f"{export.weights}_{own.precision}",
            context=context_length(config, self.tokenizer), vocabulary=self._vocabulary, encodes=encodes, generates=True,
            start=getattr(config, "decoder_start_token_id", None),
            ends=decoding.ends(self._generation, config.eos_token_id, self.tokenizer.pad_token_id),
        )  # fmt: skip
        self._weights = Weights(sum((self._folder / name).stat().st_size for name in export.files), 0, export.parameters)
        self.run([[min(10, self._vocabulary - 1)] * 4], 2, lambda: None)

    def weights(self) -> Weights:
        """As the files have them; what it lays out anew takes as many bytes."""
        return self._weights

    def run(self, prepared: list[list[int]], new_tokens: int, watch: Callable[[], None]) -> None:
        ids = self._begin(prepared)
        for _ in range(new_tokens):
            ids = self._logits(ids, 1)[:, -1].argmax(axis=1)[:, None]
            watch()

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        own = decoding.followed("openvino", self._generation, generation, FOLLOWED)
        most = generation.max_new_tokens - (own.get("forced_eos_token_id") is not None)  # in the last one's place an end is
        tokens: list[list[int]] = [[] for _ in prompts]
        with phase("generating"):
            lengths = [len(prompt) + generation.max_new_tokens for prompt in prompts]
            for batch in batched(lengths, self._most, progress, "generating", None if self.traits.encodes else SPREAD):
                rows = self._search([prompts[row] for row in batch], most, own.get("repetition_penalty") or 1.0)
                for row, answer in zip(batch, rows, strict=True):
                    tokens[row] = answer
        return Written(tokens)

    def read(self, pieces: list[Piece], progress: Progress, original: "Source | None" = None) -> list[Likelihood]:
        import numpy as np

        encodes, likelihoods = self.traits.encodes, [Likelihood()] * len(pieces)
        lengths = [len(piece.ids) + len(piece.labels) * encodes for piece in pieces]
        for batch in batched(lengths, min(self._most, max(1, SCORES // self._vocabulary)), progress, "reading"):
            few = [pieces[index] for index in batch]
            ids = self._begin([piece.ids for piece in few], right=True)
            labels = _padded([piece.labels if encodes else [*piece.labels[1:], -100] for piece in few], -100)
            if encodes:
                ids = np.hstack([ids, np.where(labels < 0, self.tokenizer.pad_token_id, labels)[:, :-1]])
            logits = self._logits(ids, ids.shape[1])
            for index, row, targets in zip(batch, logits, labels, strict=True):
                counted = targets >= 0
                likelihoods[index] = Likelihood(nats(row[counted], targets[counted]), int(counted.sum()), 0.0, 0.0, 0.0)
        return likelihoods

    def _compiled(self, name: str, precision: str) -> Any:
        """A request to the graph of that name. Raises ModelError where it can't be compiled, or computes in another precision."""
        import openvino

        element_type, file = TYPES[precision], self._folder / FOLDER / f"{name}.xml"
        exact = {  # else it rounds
            "INFERENCE_PRECISION_HINT": element_type,
            "KV_CACHE_PRECISION": element_type,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        try:
            model = openvino.Core().compile_model(file, "CPU", {**exact, "INFERENCE_NUM_THREADS": self._opening.threads, "NUM_STREAMS": 1})
        except RuntimeError as error:
            raise ModelError(f"engine: openvino: {file}: {str(error).strip().splitlines()[-1][:300]}") from None
        if (actual := model.get_property("INFERENCE_PRECISION_HINT")).get_type_name() != element_type:
            raise ModelError(f"engine: openvino: precision: {precision} isn't done on this CPU, {actual.get_type_name()} is; leave it out")
        return model.create_infer_request()

    def _begin(self, prompts: list[list[int]], right: bool = False) -> "NDArray[np.int64]":
        """Forget what was written before. Returns the decoder's first input, int64 (rows, tokens); `right` pads rows at their end."""
        import numpy as np

        self._decoder.reset_state()
        left = self._encoder is None and not right
        ids = _padded(prompts, self.tokenizer.pad_token_id, left)
        self._mask, self._seen = _padded([[1] * len(prompt) for prompt in prompts], 0, left), 0
        if self._encoder is None:
            return ids
        self._encoder.infer({"input_ids": ids, "attention_mask": self._mask})
        for output in self._encoder.model_outputs:
            self._decoder.set_tensor(output.any_name, self._encoder.get_tensor(output))
        return np.full((len(prompts), 1), self.traits.start)

    def _logits(self, ids: "NDArray[np.int64]", last: int) -> "NDArray[np.float32]":
        """Logits of the `last` tokens of these, which follow those of former calls: (rows, last or more, vocabulary).

        They hold until the next call.
        """
        import numpy as np

        if self._seen and self._encoder is None:
            self._mask = np.hstack([self._mask, np.ones_like(ids)])
        self._seen += ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": self._mask,
            "beam_idx": np.arange(len(ids)),
            "position_ids": np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :],
            "logits_to_keep": np.arange(ids.shape[1] - last, ids.shape[1]),
        }
        self._decoder.infer({name: values for name, values in inputs.items() if name in self._takes})
        logits: NDArray[np.float32] = self._decoder.get_tensor("logits").data
        return logits

    def _search(self, prompts: list[list[int]], new_tokens: int, penalty: float) -> list[list[int]]:
        """The likeliest tokens one after the other, up to one that ends a text."""
        import numpy as np

        ids, ends = self._begin(prompts), sorted(self.traits.ends)
        seen = np.zeros((len(prompts), self._vocabulary), dtype=bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt if self._encoder is None else self.traits.start] = True
        written, going = np.empty((len(prompts), 0), dtype=np.int64), np.ones(len(prompts), dtype=bool)
        while written.shape[1] < new_tokens and going.any():
            logits = self._logits(ids, 1)[:, -1]
            if penalty != 1:
                logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
            ids = logits.argmax(axis=1)[:, None]
            np.put_along_axis(seen, ids, True, axis=1)
            written, going = np.hstack([written, ids]), going & ~np.isin(ids[:, 0], ends)
        return [list(takewhile(lambda token: token not in ends, row)) for row in written.tolist()]


def _padded(rows: list[list[int]], value: int, left: bool = False) -> "NDArray[np.int64]":
    """Rows of equal length, int64 (rows, tokens)."""
    import numpy as np

    longest = max(map(len, rows))
    return np.array([[value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row)) for row in rows])
