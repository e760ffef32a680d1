"""From examples to a model's tokens, and from its likelihoods to sums by example. Scores are in scores.py."""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.engines import Piece
from compress.errors import DataError
from compress.prompts import Prompt, Prompts, text_of
from compress.scores import Likelihood

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = list[str]
Read = Callable[[list[Piece]], list[Likelihood]]


class Reader:
    """Turns texts into token ids for a model, cut to what it can take.

    context      the most tokens that the model takes, or None
    encodes      whether prompts go into an encoder; else they stand before the answer
    max_tokens   the most tokens of an input, or None
    chat         texts are a user's turns, put into the tokenizer's chat template
    keep_end     cut a long prompt at its start, where examples of the task stand; else at its end
    cut          the prompts that have been cut so far
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", context: int | None, encodes: bool, max_tokens: int | None = None, chat: bool = False,
        keep_end: bool = False,
    ):  # fmt: skip
        self.tokenizer, self.context, self.encodes, self.cut = tokenizer, context, encodes, set[str]()
        self.prompts, self._max_tokens = Prompts(tokenizer, chat, keep_end), max_tokens

    def limit(self, room: int = 0) -> int | None:
        """The longest input that leaves `room` in the context; None where nothing bounds it. Raises DataError when no token is left."""
        limits = [x for x in (self._max_tokens, None if self.context is None else self.context - room) if x is not None]
        limit = min(limits, default=None)
        if limit is not None and limit < 1:
            raise DataError(f"{room} tokens to come leave no room for a prompt in the model's context of {self.context} tokens")
        return limit

    def read(self, prompts: Sequence[Prompt], room: int = 0, unended: bool = False, whole: bool = False) -> list[list[int]]:
        """Token ids of each prompt.

        room      tokens of the context that prompts leave free
        unended   leave off the end token that some tokenizers add
        whole     cut nothing

        Raises DataError when no token is left for prompts, or when a prompt has no token.
        """
        limit = None if whole else self.limit(room)
        rows = []
        for number, prompt in enumerate(prompts):
            ids, cut = self.prompts.read(prompt, limit, unended)
            text = text_of(prompt)
            if not ids:
                raise DataError(f"example {number + 1} of those drawn is empty and the tokenizer adds nothing to it: {text!r}")
            if cut:
                self.cut.add(text)
            rows.append(ids)
        return rows

    def to_write(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
        """Token ids of prompts to which `new_tokens` tokens are written. Raises DataError where those leave no room."""
        if self.context is not None and new_tokens >= self.context:
            raise DataError(f"generation.max_new_tokens: {new_tokens} does not fit the model's context of {self.context} tokens")
        return self.read(prompts, room=0 if self.encodes else new_tokens, unended=not self.encodes)


def likelihoods(
    reader: Reader, prompts: Sequence[Prompt], targets: Texts | None, read: Read, stride: int | None = None
) -> list[Likelihood]:  # fmt: skip
    """The likelihood of each target after its prompt, or of each text where there are no targets.

    read   returns the likelihood of each piece of text

    The first token of a plain text is context only, not predicted. Texts and targets are cut to the context; with a `stride` texts are
    read whole, in windows.

    Raises DataError when no text has a token to predict.
    """
    both = reader.encodes
    pieces: list[Piece] = []
    if targets is None:
        for example, row in enumerate(reader.read(prompts, whole=stride is not None)):
            spans = windows(row, reader.limit(), stride)
            pieces += [Piece(example, ids, [-100] * prefix + ids[prefix:], number == 0) for number, (ids, prefix) in enumerate(spans)]
    else:
        answers = [reader.prompts.target(target, special=both) for target in targets]
        most = reader.context if both or reader.context is None else reader.context // 2
        reader.cut |= {text_of(prompt) for prompt, answer in zip(prompts, answers, strict=True) if most is not None and len(answer) > most}
        answers = [answer[:most] for answer in answers]
        if both:
            pieces = [Piece(example, *pair) for example, pair in enumerate(zip(reader.read(prompts), answers, strict=True))]
        else:  # the answer stands in the same context as its prompt
            for example, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                ids = reader.read([prompt], room=len(answer), unended=True)[0]
                pieces.append(Piece(example, ids + answer, [-100] * len(ids) + answer))
    return _summed(pieces, len(prompts), read)


def stream_likelihoods(
    reader: Reader, text: str, read: Read, stride: int | None, samples: int | None, seed: int
) -> tuple[list[Likelihood], Texts]:  # fmt: skip
    """The likelihood of each window of one long text, and the part of the text that it counts.

    Without a stride, or with one of their size, windows follow each other. The first token of each is context only, as in the perplexities
    of GPTQ (Frantar et al. 2022); unlike there, the last window may be shorter. With another stride every token but the first counts once.

    stride    tokens from the start of a window to the start of the next
    samples   how many windows are drawn, by `seed`; None takes all

    Raises DataError for a stride that leaves gaps, for a model without a limit and for a text without a token to predict.
    """
    size = reader.limit()
    if size is None:
        raise DataError("data.join: windows are as long as the model's context, and this one has no limit; give data.max_tokens")
    ids = reader.read([text], whole=True)[0]
    if stride in (None, size):
        spans = [(ids[start : start + size], 1) for start in range(0, len(ids) - 1, size)]
    else:
        spans = windows(ids, size, stride)
    if samples is not None and samples < len(spans):
        spans = [spans[number] for number in sorted(random.Random(seed).sample(range(len(spans)), samples))]
    pieces = [Piece(number, window, [-100] * prefix + window[prefix:]) for number, (window, prefix) in enumerate(spans)]
    return _summed(pieces, len(spans), read), [reader.tokenizer.decode(window[prefix:]) for window, prefix in spans]


def _summed(pieces: list[Piece], examples: int, read: Read) -> list[Likelihood]:
    """The likelihood of each example, summed over its pieces; `examples` is their number. Raises DataError where none has a token."""
    rows = [Likelihood()] * examples
    for piece, likelihood in zip(pieces, read(pieces), strict=True):
        rows[piece.example] = rows[piece.example].plus(likelihood)
    if not sum(row.tokens for row in rows):
        raise DataError("no example has a token to predict; perplexity needs texts of two tokens or more")
    return rows


def windows(row: list[int], size: int | None, stride: int | None) -> list[tuple[list[int], int]]:
    """A text in windows of `size` tokens, and how many tokens of each are context only. Windows start `stride` tokens apart.

    Every token but the first counts once. From the second window on it has at least `size` - `stride` tokens before it (Hugging Face,
    "Perplexity of fixed-length models"). Raises DataError for a stride that leaves tokens without any before them.
    """
    if stride is None or size is None:
        return [(row, 1)]
    if stride >= size:
        raise DataError(f"data.stride: {stride} is too far for windows of {size} tokens, which need some context; give {size - 1} at most")
    spans, start, counted = [], 0, 1
    while True:
        end = min(start + size, len(row))
        spans.append((row[start:end], counted - start))
        if end == len(row):
            return spans
        start, counted = start + stride, end
