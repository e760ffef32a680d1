"""Draws from a model's distributions that are the same in every batch, on every device.

No generator is shared by the rows of a batch: each row's logits get Gumbel noise that seed, example and position determine. The likeliest
token is then a draw from the distribution (Gumbel 1954; Maddison et al. 2014). So both sides draw with the same noise, too, which makes
their difference less noisy.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from compress.decoding import FILE
from compress.errors import ModelError

WARPERS = {  # what changes a distribution before a draw, in transformers' order, each with its neutral value
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_h": (TopHLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (EtaLogitsWarper, 0.0),
}


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds to every row's scores (rows, vocabulary) noise of its own: Philox keyed by seed and example, counted by position.

    start   how many tokens stand before the first that is written
    """

    def __init__(self, seed: int, examples: list[int], start: int):
        self._seed, self._examples, self._start = seed, examples, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position, size = input_ids.shape[1] - self._start, scores.shape[1]
        drawn = [self._exponential(example, position, size) for example in self._examples]
        return scores.float() - torch.from_numpy(np.stack(drawn)).to(scores.device).log()

    def _exponential(self, example: int, position: int, size: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        stream = np.random.Philox(key=[self._seed, example], counter=[0, 0, 0, position])
        return np.random.Generator(stream).standard_exponential(size, dtype=np.float32)


def warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """The processors that change distributions before a draw. Raises ModelError for a value that isn't allowed."""
    processors = []
    for name, (kind, neutral) in WARPERS.items():
        value = getattr(config, name, None)
        if value in (None, neutral):
            continue
        try:
            processors.append(kind(value))
        except ValueError as error:
            raise ModelError(f"{FILE}: {name}: {value}: {error}") from None
    return processors


def at_edge(scores: Tensor, logits: Tensor, others: Tensor, slack: float) -> bool:
    """Whether rounding decides if a drawn token can be drawn at all: the one drawn alone, or those of the batch (`others`)."""
    drawn = scores.isfinite()
    if drawn[others].any():
        return bool(logits[scores.argmax()] <= logits[drawn].min() + slack)
    return bool(logits[others].max() >= logits[~drawn].max() - slack)
