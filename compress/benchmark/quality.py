"""How a model reads the examples: their tokens, likelihoods and labels. What it writes is in generation.py, scores are in scores.py."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.benchmark.batching import Batches
from compress.errors import DataError
from compress.prompts import Prompt, Prompts, text_of
from compress.scores import Likelihood
from compress.structure import context_length, decoder_inputs

Texts = list[str]
AT_ONCE = 256  # tokens whose distributions are compared together; one of 150,000 numbers takes 600 kB, several times
Piece = tuple[int, list[int], list[int]]  # example, input, and the labels of it or, behind an encoder, of the answer


class Reader:
    """Texts become token ids for a model, cut to what it can take.

    max_tokens   the longest input wanted, or None
    chat         texts are a user's turns, put into the tokenizer's chat template
    keep_end     what is too long loses its start, where examples of the task stand, and not its end
    cut          the prompts that have been cut so far
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None, chat: bool = False,
        keep_end: bool = False,
    ):  # fmt: skip
        self.model, self.tokenizer, self.cut = model, tokenizer, set[str]()
        self.context = context_length(model.config, tokenizer)
        self._max_tokens = max_tokens
        self._prompts = {unended: Prompts(tokenizer, chat, unended, keep_end) for unended in (False, True)}

    def limit(self, room: int = 0) -> int | None:
        """The longest input, leaving `room` in the context; None where nothing bounds it. Raises DataError when nothing is left."""
        limits = [x for x in (self._max_tokens, None if self.context is None else self.context - room) if x is not None]
        limit = min(limits, default=None)
        if limit is not None and limit < 1:
            raise DataError(f"{room} tokens to come leave no room for a prompt in the model's context of {self.context} tokens")
        return limit

    def read(self, prompts: Sequence[Prompt], room: int = 0, unended: bool = False, whole: bool = False) -> list[list[int]]:
        """Token ids of each prompt, leaving `room` in the context; `unended` leaves off the end token that some tokenizers add.

        whole   nothing is cut

        Raises DataError when nothing is left, or when a prompt has no token.
        """
        limit = None if whole else self.limit(room)
        found = []
        for number, prompt in enumerate(prompts):
            ids, cut = self._prompts[unended].read(prompt, limit)
            text = text_of(prompt)
            if not ids:
                raise DataError(f"example {number + 1} of those drawn is empty and the tokenizer adds nothing to it: {text!r}")
            if cut:
                self.cut.add(text)
            found.append(ids)
        return found

    def batch(self, rows: list[list[int]], left: bool = False) -> Any:
        """Rows of ids as padded tensors on the model's device."""
        self.tokenizer.padding_side = "left" if left else "right"
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)


def likelihoods(
    reader: Reader, prompts: Sequence[Prompt], targets: Texts | None, batches: Batches, stride: int | None = None,
    original: PreTrainedModel | None = None,
) -> list[Likelihood]:  # fmt: skip
    """The likelihood of each target given its prompt, or of each text where there are no targets.

    original   the model from which the reader's diverges

    A plain text's first token is given, not predicted. Texts and targets are cut to the context; with a `stride`
    texts are read whole, in windows.

    Raises DataError when no text has a token to predict.
    """
    both = reader.model.config.is_encoder_decoder
    pieces: list[Piece] = []
    if targets is None:
        for example, row in enumerate(reader.read(prompts, whole=stride is not None)):
            pieces += [(example, ids, [-100] * given + ids[given:]) for ids, given in windows(row, reader.limit(), stride)]
    else:
        answers = reader.tokenizer(text_target=targets, add_special_tokens=both, verbose=False)["input_ids"]
        most = reader.context if both or reader.context is None else reader.context // 2
        reader.cut |= {text_of(prompt) for prompt, answer in zip(prompts, answers, strict=True) if most is not None and len(answer) > most}
        answers = [answer[:most] for answer in answers]
        if both:
            pieces = list(zip(range(len(prompts)), reader.read(prompts), answers, strict=True))
        else:  # the answer stands in the same context as its prompt
            for example, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                read = reader.read([prompt], room=len(answer), unended=True)[0]
                pieces.append((example, read + answer, [-100] * len(read) + answer))
    return _summed(reader, pieces, len(prompts), batches, original)


def stream_likelihoods(
    reader: Reader, text: str, batches: Batches, stride: int | None, samples: int | None, seed: int,
    original: PreTrainedModel | None = None,
) -> tuple[list[Likelihood], Texts]:  # fmt: skip
    """The likelihood of each window of one long text, and the part of the text that it counts.

    Without a stride, or with one of their size, windows follow each other, and the first token of each is only given, as where perplexities
    of GPTQ were taken (Frantar et al. 2022), but for the last window, which may be shorter. Else every token but the first counts once.

    stride    tokens from the beginning of a window to that of the next
    samples   so many windows are drawn with `seed`; None takes all

    Raises DataError for a stride that leaves gaps, for a model without a limit and for a text without a token to predict.
    """
    size = reader.limit()
    if size is None:
        raise DataError("data.join: windows are as long as the model's context, and this one has no limit; give data.max_tokens")
    ids = reader.read([text], whole=True)[0]
    if stride in (None, size):
        found = [(ids[start : start + size], 1) for start in range(0, len(ids) - 1, size)]
    else:
        found = windows(ids, size, stride)
    if samples is not None and samples < len(found):
        found = [found[number] for number in sorted(random.Random(seed).sample(range(len(found)), samples))]
    pieces = [(number, window, [-100] * given + window[given:]) for number, (window, given) in enumerate(found)]
    return _summed(reader, pieces, len(found), batches, original), [reader.tokenizer.decode(window[given:]) for window, given in found]


def _summed(
    reader: Reader, pieces: list[Piece], examples: int, batches: Batches, original: PreTrainedModel | None
) -> list[Likelihood]:  # fmt: skip
    """The likelihood of each of so many `examples` over its pieces. Raises DataError where none has a token."""
    model, both = reader.model, reader.model.config.is_encoder_decoder
    rows = [Likelihood()] * examples
    begins = {example: index for index, (example, _, _) in reversed(list(enumerate(pieces)))}

    def work(batch: list[int]) -> None:
        inputs = reader.batch([pieces[i][1] for i in batch])
        labels = _padded([pieces[i][2] for i in batch]).to(model.device)
        if both:
            inputs["decoder_input_ids"] = decoder_inputs(model, labels)
        else:
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        with torch.no_grad():
            ours = model(**inputs).logits
            theirs = ours if original is None else original(**inputs).logits
            found = [
                _likelihood(ours[row][real], theirs[row][real], label[real], begins[pieces[i][0]] == i)
                for row, (i, label) in enumerate(zip(batch, labels, strict=True))
                for real in [label != -100]
            ]
        for index, likelihood in zip(batch, found, strict=True):  # all of a batch or, where memory ran out, nothing
            example = pieces[index][0]
            rows[example] = rows[example].plus(likelihood)

    batches.each([len(ids) + (len(labels) if both else 0) for _, ids, labels in pieces], work, "reading")
    if not sum(row.tokens for row in rows):
        raise DataError("no example has a token to predict; perplexity needs texts of two tokens or more")
    return rows


def _likelihood(ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, begins: bool) -> Likelihood:
    """Of labels (tokens,) and logits (tokens, vocabulary), of which the shorter vocabulary counts. `begins`: the text does."""
    nats = torch.nn.functional.cross_entropy(ours.float(), labels, reduction="none").double().sum().item()
    if theirs is ours:
        return Likelihood(nats, len(labels), equal=len(labels))
    size = min(ours.shape[-1], theirs.shape[-1])
    parts = zip(ours[:, :size].split(AT_ONCE), theirs[:, :size].split(AT_ONCE), strict=True)  # type: ignore[no-untyped-call]
    compared = [_divergence(*part) for part in parts]
    divergence = torch.cat([apart for apart, _ in compared])
    first = divergence[0].item() if begins and len(labels) else 0.0
    return Likelihood(nats, len(labels), divergence.sum().item(), sum(equal for _, equal in compared), first)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of logits (tokens, vocabulary): each token's divergence, (tokens,) float64, and at how many both think the same the likeliest."""
    q, p = ours.float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
    shares = p.exp()
    divergence = torch.where(shares > 0, shares * (p - q), 0).sum(dim=-1, dtype=torch.float64)
    return divergence, (p.argmax(dim=-1) == q.argmax(dim=-1)).sum().item()


def windows(row: list[int], size: int | None, stride: int | None) -> list[tuple[list[int], int]]:
    """A text in windows of `size` tokens, each begun `stride` tokens after the one before, and how many tokens of each are only given.

    Every token but the first counts once, with at least `size` - `stride` tokens before it from the second window on (Hugging Face,
    "Perplexity of fixed-length models"). Raises DataError for a stride that leaves tokens without any before them.
    """
    if stride is None or size is None:
        return [(row, 1)]
    if stride >= size:
        raise DataError(f"data.stride: {stride} is too far for windows of {size} tokens, in which some must be given; at most {size - 1}")
    found, start, counted = [], 0, 1
    while True:
        end = min(start + size, len(row))
        found.append((row[start:end], counted - start))
        if end == len(row):
            return found
        start, counted = start + stride, end


def classify(reader: Reader, prompts: Sequence[Prompt], batches: Batches) -> list[int | None]:
    """The label that the model gives each input; None where its scores are no numbers."""
    encoded = reader.read(prompts)
    labels: list[int | None] = [None] * len(prompts)

    def work(batch: list[int]) -> None:
        inputs = reader.batch([encoded[i] for i in batch])
        with torch.no_grad():
            logits = reader.model(**inputs).logits
        best, broken = logits.argmax(dim=-1).tolist(), logits.isnan().any(dim=-1).tolist()
        for index, label, none in zip(batch, best, broken, strict=True):
            labels[index] = None if none else label

    batches.each([len(row) for row in encoded], work, "classifying")
    return labels


def _padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])
