"""CTranslate2 (OpenNMT): encoder-decoders and decoders on CPUs and GPUs, in floats or with 8-bit weights and inputs rounded as it runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import decoding, exports
from compress.engines import About, Engine, Opening, Piece, Traits, Weights, Written, batched
from compress.errors import ModelError
from compress.methods import Settings as _Settings
from compress.model.loading import load_tokenizer, read_config
from compress.model.source import settings
from compress.phases import phase
from compress.process import Progress
from compress.recipe import Generation
from compress.scores import Likelihood
from compress.structure import context_length

if TYPE_CHECKING:
    from compress.model.source import Source

ABOUT = About(
    reads="what `export: ctranslate2` writes",
    opens="ctranslate2",
    tasks=("seq2seq", "causal-lm"),
    packages=("ctranslate2",),
    extra="ctranslate2",
)
WEIGHTS = "ctranslate2/model.bin"
TOKENS, SCORES = 4096, 2**27  # of a batch of examples by default: tokens, and scores over the vocabulary
SPREAD = 16  # tokens by which prompts of a batch may differ without an encoder
FOLLOWED = ("no_repeat_ngram_size", "repetition_penalty", "length_penalty")  # as transformers does, and under the same names


class Settings(_Settings):
    compute: Literal["auto", "float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16"] = Field(
        "auto", description="what it computes in; auto is what the weights are stored in"
    )


def make(opening: Opening, batch_tokens: int | None = None) -> Engine:
    return CTranslate2(opening, batch_tokens)


class CTranslate2(Engine):
    """A model as CTranslate2 runs it."""

    def __init__(self, opening: Opening, batch_tokens: int | None):
        import ctranslate2

        ctranslate2.set_random_seed(0)
        self._opening = opening
        self._folder, self._config = Path(opening.source.id), read_config(opening.source)
        self._generation = settings(opening.source, decoding.FILE)
        self.tokenizer = load_tokenizer(opening.source)
        self._most = batch_tokens or min(TOKENS, SCORES // len(self.tokenizer))

    def open(self) -> None:
        import ctranslate2

        config, settings = self._config, self._opening.settings
        assert isinstance(settings, Settings)
        encodes = bool(config.is_encoder_decoder)
        kind = ctranslate2.Translator if encodes else ctranslate2.Generator
        compute_type = "default" if settings.compute == "auto" else settings.compute
        try:
            self._model = kind(
                str(self._folder / WEIGHTS.partition("/")[0]), device=self._opening.device, compute_type=compute_type, inter_threads=1,
                intra_threads=self._opening.threads,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"engine: ctranslate2: {str(error).splitlines()[0]}") from None
        if compute_type not in (
            "default",
            self._model.compute_type,
            f"{self._model.compute_type}_float32",
        ):  # replaced in silence
            raise ModelError(f"engine: ctranslate2: compute: {compute_type} isn't done on this {self._opening.device}; leave it out")
        self.traits = Traits(
            dtype=self._model.compute_type, context=context_length(config, self.tokenizer), vocabulary=len(self.tokenizer),
            encodes=encodes, generates=True, start=getattr(config, "decoder_start_token_id", None),
            ends=decoding.ends(self._generation, config.eos_token_id, self.tokenizer.pad_token_id),
        )  # fmt: skip
        self.run(self.prepare([[min(10, len(self.tokenizer) - 1)] * 4]), 2, lambda: None)

    def weights(self) -> Weights:
        """As in its file, which has the layout of memory."""
        export = exports.require(self._folder, "ctranslate2", "ctranslate2")
        return Weights((self._folder / WEIGHTS).stat().st_size, 0, export.parameters)

    def prepare(self, prompts: list[list[int]]) -> list[list[str]]:
        return [self._tokens(prompt) for prompt in prompts]

    def run(self, prepared: list[list[str]], new_tokens: int, watch: Callable[[], None]) -> None:
        last = len(prepared) - 1

        def told(result: Any) -> bool:
            if result.batch_id == last:
                watch()
            return False

        self._search(prepared, new_tokens, min_length=new_tokens, callback=told, end_token=[])

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        own = decoding.followed("ctranslate2", self._generation, generation, [*FOLLOWED, "forced_eos_token_id"], beams=True)
        most = generation.max_new_tokens - (own.get("forced_eos_token_id") is not None)  # in the last one's place an end is
        options = {name: own[name] for name in FOLLOWED if own.get(name) is not None} | {"beam_size": generation.num_beams}
        tokens: list[list[int]] = [[] for _ in prompts]
        with phase("generating"):
            lengths = [len(prompt) + generation.max_new_tokens for prompt in prompts]
            spread = None if self.traits.encodes else SPREAD if options == {"beam_size": 1} else 0
            for batch in batched(lengths, self._most, progress, "generating", spread):
                few = [prompts[row] for row in batch]
                # a decoder writes what the others' prompts have more of as if it chose to, a token a step
                more = 0 if self.traits.encodes else max(map(len, few)) - min(map(len, few))
                rows = self._search([self._tokens(prompt) for prompt in few], most + more, **options)
                for row, prompt, answer in zip(batch, few, rows, strict=True):
                    begun = 0 if self.traits.encodes else len(prompt)
                    tokens[row] = answer[begun : begun + most]
        return Written(tokens)

    def read(self, pieces: list[Piece], progress: Progress, original: "Source | None" = None) -> list[Likelihood]:
        likelihoods = [Likelihood()] * len(pieces)
        lengths = [len(piece.ids) + len(piece.labels) for piece in pieces]
        for batch in batched(lengths, self._most, progress, "reading"):
            few = [pieces[index] for index in batch]
            for index, piece, result in zip(batch, few, self._score(few), strict=True):
                logs = result.log_probs
                if self.traits.encodes:  # it predicts an end, whether or not the answer has one
                    counted = logs[: len(piece.labels)]
                else:
                    counted = [log for log, label in zip(logs, piece.labels[1:], strict=True) if label >= 0]
                likelihoods[index] = Likelihood(-float(sum(counted)), len(counted), 0.0, 0.0, 0.0)
        return likelihoods

    def _score(self, pieces: Sequence[Piece]) -> list[Any]:
        if not self.traits.encodes:
            return list(self._model.score_batch([self._tokens(piece.ids) for piece in pieces]))
        answers = [piece.labels[:-1] if piece.labels[-1:] and piece.labels[-1] in self.traits.ends else piece.labels for piece in pieces]
        return list(self._model.score_batch([self._tokens(piece.ids) for piece in pieces], [self._tokens(answer) for answer in answers]))

    def _search(self, prompts: list[list[str]], new_tokens: int, min_length: int = 0, **options: Any) -> list[list[int]]:
        """Token ids written to each prompt, up to its end; without an encoder the prompt's own stand before them."""
        if not self.traits.encodes:
            results = self._model.generate_batch(
                prompts, max_length=new_tokens, min_length=min_length, sampling_topk=1,
                **{"beam_size": 1, "end_token": sorted(self.traits.ends), **options},
            )  # fmt: skip
            return [list(result.sequences_ids[0]) for result in results]
        results = self._model.translate_batch(
            prompts, max_decoding_length=new_tokens, min_decoding_length=min_length, max_input_length=0,
            **{"beam_size": 1, "end_token": sorted(self.traits.ends), **options},
        )  # fmt: skip
        return [list(self.tokenizer.convert_tokens_to_ids(result.hypotheses[0])) for result in results]

    def _tokens(self, ids: list[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(ids))
