"""A stand-in engine: answers by rule in a set time, and fails on demand; to try a harness, a recipe or a report without a model."""

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.engines import About, Engine, Opening, Piece, Traits, Weights, Written
from compress.errors import ModelError
from compress.methods import Settings as _Settings
from compress.model.folder import file_bytes
from compress.model.loading import load_tokenizer, local_folder
from compress.process import Progress
from compress.recipe import Generation
from compress.scores import Likelihood

if TYPE_CHECKING:
    from compress.model.source import Source

ABOUT = About(reads="any model's folder, of which it uses only the tokenizer")


class Settings(_Settings):
    token_seconds: float = Field(0.0005, ge=0, description="what a token takes, whatever the batch")
    nats: float = Field(2.0, ge=0, description="what every token is said to have")
    fails: Literal["opening", "hanging", "killed", "fewer tokens", "no text"] | None = Field(None, description="what goes wrong")


def make(opening: Opening, batch_tokens: int | None = None) -> Engine:
    return Fake(opening)


class Fake(Engine):
    """Goes on with each prompt from its beginning, and finds every text equally likely."""

    def __init__(self, opening: Opening):
        assert isinstance(opening.settings, Settings)
        self._settings, self._source = opening.settings, opening.source
        self.tokenizer = load_tokenizer(opening.source)

    def open(self) -> None:
        if self._settings.fails == "opening":
            raise ModelError("engine: fake: it was told to fail at opening")
        generates = self._source.task != "sequence-classification"
        self.traits = Traits(
            dtype="float32", context=None, vocabulary=len(self.tokenizer), encodes=self._source.task == "seq2seq", generates=generates,
            labels=() if generates else ("no", "yes"),
        )  # fmt: skip

    def weights(self) -> Weights:
        size = file_bytes(local_folder(self._source))
        return Weights(size, 0, size // 4)

    def run(self, prepared: list[list[int]], new_tokens: int, watch: Callable[[], None]) -> None:
        if self._settings.fails == "hanging":
            time.sleep(3600)
        if self._settings.fails == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(new_tokens - (self._settings.fails == "fewer tokens") if self.traits.generates else 1):
            time.sleep(self._settings.token_seconds)
            watch()

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        empty = self._settings.fails == "no text"
        return Written([[] if empty else prompt[: generation.max_new_tokens] for prompt in prompts])

    def read(self, pieces: list[Piece], progress: Progress, original: "Source | None" = None) -> list[Likelihood]:
        counted = [sum(label >= 0 for label in (piece.labels if self.traits.encodes else piece.labels[1:])) for piece in pieces]
        return [Likelihood(self._settings.nats * count, count) for count in counted]

    def classify(self, prompts: list[list[int]], progress: Progress) -> list[int | None]:
        return [len(prompt) % 2 for prompt in prompts]
