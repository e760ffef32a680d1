"""What a model makes of the examples: its texts, its likelihoods, its labels. Scoring is elsewhere (scores.py)."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.architecture import context_length
from compress.errors import DataError
from compress.process import Progress

Texts = list[str]


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Texts, settings: dict[str, Any], batch_size: int,
    max_tokens: int | None, progress: Progress,
) -> list[list[int]]:  # fmt: skip
    """The tokens that the model adds to each prompt, without padding and end tokens, in the order of the prompts.

    Prompts are sorted by length, so that a batch has little padding; decoder-only models are padded on the left.
    """
    settings = {key: value for key, value in settings.items() if value is not None and key != "seed"}
    new_tokens, context = settings["max_new_tokens"], context_length(model.config)
    if context is not None and new_tokens >= context:
        raise DataError(f"generation.max_new_tokens: {new_tokens} does not fit the model's context of {context} tokens")
    room = 0 if model.config.is_encoder_decoder else new_tokens
    encoded = encode(model, tokenizer, prompts, max_tokens, room)
    tokenizer.padding_side = "left" if not model.config.is_encoder_decoder else "right"
    ends = model.generation_config.eos_token_id
    stop = {tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [ends])}
    outputs: list[list[int]] = [[] for _ in prompts]
    for batch in batches(encoded, batch_size, progress, "generating"):
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, **settings, pad_token_id=tokenizer.pad_token_id)
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        for index, row in zip(batch, tokens[:, start:].tolist(), strict=True):
            outputs[index] = _until(row, stop)
    return outputs


def likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Texts, targets: Texts | None, batch_size: int,
    max_tokens: int | None, progress: Progress,
) -> list[list[float]]:  # fmt: skip
    """[negative log-likelihood in nats, tokens] of each target given its prompt, or of each text where there are no targets.

    A plain text's first token is given, not predicted. Texts are cut at `max_tokens` or the model's context.

    Raises DataError when no text has two tokens.
    """
    encoder_decoder = model.config.is_encoder_decoder
    answers = None
    if targets is not None:
        answers = [tokenizer(text_target=text, add_special_tokens=encoder_decoder)["input_ids"] for text in targets]
    inside = answers is not None and not encoder_decoder  # the answer stands in the same context as its prompt
    encoded = encode(model, tokenizer, prompts, max_tokens, max(map(len, answers)) if inside and answers else 0)
    if inside and answers:
        encoded = [_strip_end(prompt, tokenizer) + answer for prompt, answer in zip(encoded, answers, strict=True)]
    tokenizer.padding_side = "right"
    rows: list[list[float]] = [[] for _ in prompts]
    for batch in batches(encoded, batch_size, progress, "reading"):
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt").to(model.device)
        if encoder_decoder:
            assert answers is not None
            labels = _padded([answers[i] for i in batch])
        else:
            given = [len(encoded[i]) - len(answers[i]) if answers is not None else 1 for i in batch]
            labels = _padded([[-100] * g + encoded[i][g:] for i, g in zip(batch, given, strict=True)])
        labels = labels.to(model.device)
        with torch.inference_mode():
            logits = model(**inputs, labels=labels).logits.float()
        if not encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        for index, loss, label in zip(batch, losses.double().sum(dim=1).tolist(), (labels != -100).sum(dim=1).tolist(), strict=True):
            rows[index] = [loss, float(label)]
    if not sum(row[1] for row in rows):
        raise DataError("no example has a token to predict; perplexity needs texts of two tokens or more")
    return rows


def classify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Texts, batch_size: int, max_tokens: int | None, progress: Progress
) -> list[int]:
    """The label that the model gives each input."""
    encoded = encode(model, tokenizer, prompts, max_tokens, 0)
    tokenizer.padding_side = "right"
    labels = [0] * len(prompts)
    for batch in batches(encoded, batch_size, progress, "classifying"):
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            best = model(**inputs).logits.argmax(dim=-1).tolist()
        for index, label in zip(batch, best, strict=True):
            labels[index] = label
    return labels


def label_number(model: PreTrainedModel, text: str) -> int:
    """The number of a label written as a number or by name. Raises DataError."""
    names = model.config.label2id or {}
    if text in names:
        return int(names[text])
    if text.isdigit() and int(text) < model.config.num_labels:
        return int(text)
    raise DataError(f"label {text!r} is none of the model's: numbers below {model.config.num_labels}, or {', '.join(names)}")


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, max_tokens: int | None, room: int) -> list[list[int]]:
    """Token ids, cut to `max_tokens` and to what the model's context leaves beside `room` tokens to come.

    Raises DataError when nothing is left for the input.
    """
    context = context_length(model.config)
    limit = min([x for x in (max_tokens, None if context is None else context - room) if x is not None], default=None)
    if limit is not None and limit < 1:
        raise DataError(f"{room} tokens to come leave no room for a prompt in the model's context of {context} tokens")
    return list(tokenizer(texts, truncation=limit is not None, max_length=limit, return_attention_mask=False)["input_ids"])


def batches(encoded: list[list[int]], size: int, progress: Progress, what: str) -> Iterator[list[int]]:
    """Indices in batches, longest first, so that memory runs out at once or not at all."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), size):
        progress(what, start, len(order))
        yield order[start : start + size]
    progress(what, len(order), len(order))


def _padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])


def _until(tokens: list[int], stop: set[int | None]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop:
            return tokens[:index]
    return tokens


def _strip_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt without the end token that some tokenizers put behind any text: the answer goes on from it."""
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens
