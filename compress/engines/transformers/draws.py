"""Draws from a model's distributions that are the same in every batch, on every device.

Sampling takes no random numbers from a generator that the batching would share out: each row's logits get Gumbel noise that seed, example
and position determine, and the likeliest token is then a draw from the distribution (Gumbel 1954; Maddison et al. 2014). So the draws are
the same on both sides, too, which makes their difference less noisy.
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

WARPERS = {  # what bends a distribution before a draw, in transformers' order, with the value that changes nothing
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

    start   the tokens that stand before the first that is written
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
    """What distributions are bent by before a draw. Raises ModelError for a value that can't be."""
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
    """Whether a token that was drawn, alone or in the batch (`others`), stands where rounding decides whether it is drawn from at all."""
    drawn = scores.isfinite()
    if drawn[others].any():
        return bool(logits[scores.argmax()] <= logits[drawn].min() + slack)
    return bool(logits[others].max() >= logits[~drawn].max() - slack)
