"""How a model continues a prompt: by beam search, or by sampling from its own distributions."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress import decoding
from compress.calibration.stream import Row
from compress.errors import ModelError
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def writer(bundle: Bundle) -> "PreTrainedModel":
    """The bundle's model, to write texts. Raises ModelError for a classifier."""
    if not bundle.model.can_generate():
        raise ModelError(f"{bundle.source.id}: a classifier writes no text to learn from; `distill: logits` is for classifiers")
    return bundle.model


def prompt_of(model: "PreTrainedModel", row: Row) -> list[int]:
    """The tokens that a model is to continue: the encoder's input, or a decoder's without the target and without an end token."""
    _, ids, answer = row
    if model.config.is_encoder_decoder:
        return ids
    ids = ids[: len(ids) - len(answer)]
    return ids[:-1] if ids and ids[-1] in ends_of(model) else ids


def write(
    model: "PreTrainedModel", prompts: list[list[int]], max_new_tokens: int, num_beams: int, temperature: float | None
) -> list[list[int]]:
    """The tokens that a model adds to each prompt, up to its end token where it writes one.

    temperature   for sampling from the model's own distributions; None takes the likeliest tokens, by its generation config
    """
    both, training = bool(model.config.is_encoder_decoder), model.training
    filler, width = model.config.get_text_config().pad_token_id or 0, max(map(len, prompts))

    def side(rows: list[list[int]], value: int) -> Tensor:  # a decoder continues at the right end
        gaps = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([row + gap if both else gap + row for row, gap in zip(rows, gaps, strict=True)], device=model.device)

    own = model.generation_config
    how = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    # penalties, minimum lengths and the like would change the model's own distributions
    config = decoding.held(own) if temperature is None else decoding.neutral(own)
    model.eval()
    try:
        with decoding.generating_by(model, config):
            tokens = model.generate(
                input_ids=side(prompts, filler), attention_mask=side([[1] * len(row) for row in prompts], 0), max_new_tokens=max_new_tokens,
                num_beams=num_beams, pad_token_id=filler, use_cache=True, **how,
            )  # fmt: skip
    finally:
        model.train(training)
    ends = ends_of(model)
    return [_to_end(row, ends) for row in tokens[:, 1 if both else width :].tolist()]


def ends_of(model: "PreTrainedModel") -> set[int]:
    """The tokens at which a model stops."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def _to_end(tokens: list[int], ends: set[int]) -> list[int]:
    last = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
