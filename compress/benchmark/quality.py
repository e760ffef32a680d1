"""What a model makes of the examples: its texts, its likelihoods, its labels. Scoring is elsewhere (scores.py)."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.architecture import context_length
from compress.errors import DataError
from compress.model import require_template
from compress.process import Progress

Texts = list[str]


class Reader:
    """Texts become token ids for a model, cut to what it can take.

    max_tokens   the longest input wanted, or None
    chat         texts are a user's turns, put into the tokenizer's chat template
    cut          how many inputs have been cut so far
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None, chat: bool = False):
        self.model, self.tokenizer, self.cut = model, tokenizer, 0
        self.context = context_length(model.config, tokenizer)
        self._max_tokens, self._chat = max_tokens, chat
        if chat:
            require_template(tokenizer)

    def read(self, texts: Texts, room: int = 0, unended: bool = False) -> list[list[int]]:
        """Token ids of each text, leaving `room` in the context; `unended` leaves off the end token that some tokenizers add.

        Raises DataError when nothing is left, or when a text has no token.
        """
        limits = [x for x in (self._max_tokens, None if self.context is None else self.context - room) if x is not None]
        limit = min(limits, default=None)
        if limit is not None and limit < 1:
            raise DataError(f"{room} tokens to come leave no room for a prompt in the model's context of {self.context} tokens")
        if self._chat:
            turns = [[{"role": "user", "content": text}] for text in texts]
            texts = [str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns]
        rows = self.tokenizer(texts, add_special_tokens=not self._chat, return_attention_mask=False, verbose=False)["input_ids"]
        found = []
        for number, row in enumerate(rows):
            kept = row[:-1] if unended and len(row) > 1 and row[-1] == self.tokenizer.eos_token_id else row
            if limit is not None and len(kept) > limit:
                ended = kept[-1] == self.tokenizer.eos_token_id
                kept = [*kept[: limit - 1], kept[-1]] if ended else kept[:limit]
                self.cut += 1
            if not kept:
                raise DataError(f"example {number + 1} of those drawn is empty and the tokenizer adds nothing to it: {texts[number]!r}")
            found.append(kept)
        return found

    def batch(self, rows: list[list[int]], left: bool = False) -> Any:
        """Rows of ids as padded tensors on the model's device."""
        self.tokenizer.padding_side = "left" if left else "right"
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)


def generate(reader: Reader, prompts: Texts, settings: dict[str, Any], batch_size: int, progress: Progress) -> list[list[int]]:
    """The tokens that the model adds to each prompt, without padding and end tokens, in the order of the prompts.

    Prompts are sorted by length, so that a batch has little padding; decoder-only models are padded on the left. What `settings` leave
    None is as the model's own generation config has it.
    """
    model, both = reader.model, reader.model.config.is_encoder_decoder
    settings = {key: value for key, value in settings.items() if value is not None and key != "seed"}
    new_tokens = settings["max_new_tokens"]
    if reader.context is not None and new_tokens >= reader.context:
        raise DataError(f"generation.max_new_tokens: {new_tokens} does not fit the model's context of {reader.context} tokens")
    encoded = reader.read(prompts, room=0 if both else new_tokens, unended=not both)
    pad, ends = reader.tokenizer.pad_token_id, model.generation_config.eos_token_id
    stop = {pad, *(ends if isinstance(ends, list) else [ends])}
    outputs: list[list[int]] = [[] for _ in prompts]
    for batch in batches(encoded, batch_size, progress, "generating"):
        inputs = reader.batch([encoded[i] for i in batch], left=not both)
        with torch.inference_mode():
            tokens = model.generate(**inputs, **settings, pad_token_id=pad)
        start = 1 if both else inputs["input_ids"].shape[1]
        for index, row in zip(batch, tokens[:, start:].tolist(), strict=True):
            outputs[index] = _until(row, stop)
    return outputs


def likelihoods(reader: Reader, prompts: Texts, targets: Texts | None, batch_size: int, progress: Progress) -> list[list[float]]:
    """[negative log-likelihood in nats, tokens] of each target given its prompt, or of each text where there are no targets.

    A plain text's first token is given, not predicted. Texts and targets are cut to the context.

    Raises DataError when no text has a token to predict.
    """
    model, both = reader.model, reader.model.config.is_encoder_decoder
    answers: list[list[int]] = [[] for _ in prompts]
    if targets is None:
        encoded = reader.read(prompts)
    else:
        answers = reader.tokenizer(text_target=targets, add_special_tokens=both, verbose=False)["input_ids"]
        most = reader.context if both or reader.context is None else reader.context // 2
        answers = [answer[:most] for answer in answers]
        if both:
            encoded = reader.read(prompts)
        else:  # the answer stands in the same context as its prompt
            read = [reader.read([prompt], room=len(answer), unended=True)[0] for prompt, answer in zip(prompts, answers, strict=True)]
            encoded = [prompt + answer for prompt, answer in zip(read, answers, strict=True)]
    rows: list[list[float]] = [[] for _ in prompts]
    for batch in batches(encoded, batch_size, progress, "reading"):
        inputs = reader.batch([encoded[i] for i in batch])
        if both:
            labels = _padded([answers[i] for i in batch]).to(model.device)
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        else:
            given = [len(encoded[i]) - len(answers[i]) if targets is not None else 1 for i in batch]
            labels = _padded([[-100] * g + encoded[i][g:] for i, g in zip(batch, given, strict=True)]).to(model.device)
        with torch.inference_mode():
            logits = model(**inputs).logits
        if not both:
            logits, labels = logits[:, :-1], labels[:, 1:]
        for index, told, label in zip(batch, logits, labels, strict=True):
            real = label != -100
            loss = torch.nn.functional.cross_entropy(told[real].float(), label[real], reduction="none")
            rows[index] = [loss.double().sum().item(), float(real.sum())]
    if not sum(row[1] for row in rows):
        raise DataError("no example has a token to predict; perplexity needs texts of two tokens or more")
    return rows


def classify(reader: Reader, prompts: Texts, batch_size: int, progress: Progress) -> list[int]:
    """The label that the model gives each input."""
    encoded = reader.read(prompts)
    labels = [0] * len(prompts)
    for batch in batches(encoded, batch_size, progress, "classifying"):
        inputs = reader.batch([encoded[i] for i in batch])
        with torch.inference_mode():
            best = reader.model(**inputs).logits.argmax(dim=-1).tolist()
        for index, label in zip(batch, best, strict=True):
            labels[index] = label
    return labels


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
