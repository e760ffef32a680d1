"""Prompts and targets as token ids within their limits, for evaluation, calibration and training.

A prompt that is too long is cut within its content. What is around the content stays whole: the chat template with the assistant's opening,
and the recipe's words before and after a field. The text is cut at the end of a token, put into its template and tokenised again, so that
the ids are those of the shorter prompt.

    python -m compress.prompts REQUEST_FD REPLY_FD     checks a model's chat template before the work, as a working process
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.border import answering
from compress.errors import DataError
from compress.methods import Example
from compress.model.loading import load_tokenizer, require_template
from compress.process import Progress, serve
from compress.requests import SeeTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Example  # a plain text is all content
WORD, ANSWER = "compress", "workbench"  # two turns to try a template with


class Prompts:
    """How a tokenizer makes prompts and targets.

    chat      prompts are a user's turns, put into the tokenizer's chat template
    keep_end  a prompt that is too long loses the start of its content, where examples of the task are, and not its end

    Raises DataError where `chat` is set and the template doesn't work.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat: bool = False, keep_end: bool = False):
        self._tokenizer, self._chat, self._keep_end = tokenizer, chat, keep_end
        if chat:
            check_template(tokenizer)

    def read(self, prompt: Prompt, limit: int | None, unended: bool = False) -> tuple[list[int], bool]:
        """The ids, at most `limit`, and whether the prompt was cut.

        unended   leave off the end token that some tokenizers add, for decoders, which continue the prompt

        Raises DataError where the chat template alone takes more.
        """
        text = text_of(prompt)
        whole = self._ids(text, unended)
        if limit is None or len(whole) <= limit:
            return whole, False
        head, content, tail = _parts(prompt)
        ids = self._longest(head, content, tail, limit, unended) if self._chat or head or tail else None
        if ids is None and self._chat and (head or tail):  # what is around the content is too long itself
            ids = self._longest("", text, "", limit, unended)
        if ids is None and self._chat:
            raise DataError(f"{limit:,} tokens hold no prompt: the chat template alone takes {self.least:,}; raise max_tokens")
        return (self._truncated(text, limit, unended) if ids is None else ids), True

    def target(self, text: str, special: bool, limit: int | None = None) -> list[int]:
        """The ids of the text that is to follow a prompt, at most `limit`.

        special   with the tokenizer's special tokens around them, also where they are cut; a decoder's target needs none after its prompt
        """
        if limit is not None:
            self._tokenizer.truncation_side = "right"
        ids: list[int] = self._tokenizer(
            text_target=text, add_special_tokens=special, truncation=limit is not None, max_length=limit, verbose=False
        )["input_ids"]
        return ids

    @property
    def least(self) -> int:
        """Tokens of the shortest prompt."""
        return len(self._ids("", False)) if self._chat else 1

    def _ids(self, text: str, unended: bool) -> list[int]:
        if self._chat:
            ids: list[int] = self._tokenizer(rendered(self._tokenizer, text), add_special_tokens=False, verbose=False)["input_ids"]
            return ids
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        return ids[:-1] if unended and len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids

    def _longest(self, head: str, content: str, tail: str, limit: int, unended: bool) -> list[int] | None:
        """The ids with as much of the content as fits; None where nothing does."""
        ends = _ends(self._tokenizer, content, self._keep_end)[: limit + 1]

        def ids(number: int) -> list[int]:
            kept = content[len(content) - ends[number] :] if self._keep_end else content[: ends[number]]
            return self._ids(f"{head}{kept}{tail}", unended)

        low, high = 0, len(ends) - 1
        if len(best := ids(0)) > limit:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if len(attempt := ids(middle)) <= limit:
                low, best = middle, attempt
            else:
                high = middle - 1
        return best

    def _truncated(self, text: str, limit: int, unended: bool) -> list[int]:
        """A plain text as the tokenizer itself truncates it, its special tokens kept."""
        if limit < 1:
            return []
        ended = unended and self._tokenizer(text, verbose=False)["input_ids"][-1] == self._tokenizer.eos_token_id
        self._tokenizer.truncation_side = "left" if self._keep_end else "right"
        ids: list[int] = self._tokenizer(text, truncation=True, max_length=limit + ended, verbose=False)["input_ids"]
        return ids[:-1] if ended else ids


def rendered(tokenizer: "PreTrainedTokenizerBase", text: str, opened: bool = True) -> str:
    """A user's turn in the chat template, with the assistant's opening. Raises DataError with what the template complains about."""
    return _rendered(tokenizer, [{"role": "user", "content": text}], opened)


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError where a tokenizer has no chat template, or one that doesn't show a user's turn and open the assistant's."""
    require_template(tokenizer)
    way_out = "write out the prompt and leave out data.chat, or give the model another template"
    shown, bare = rendered(tokenizer, WORD), rendered(tokenizer, WORD, opened=False)
    if WORD not in shown:
        raise DataError(f"data.chat: the model's chat template leaves out what the user says: {shown[:200]!r} for {WORD!r}; {way_out}")
    if shown != bare:
        return
    try:
        both = _rendered(tokenizer, [{"role": "user", "content": WORD}, {"role": "assistant", "content": ANSWER}], opened=False)
    except DataError:
        return
    # templates such as Mistral's end a user's turn by what opens the assistant's; others have to be asked for it
    opening = both.removeprefix(bare).partition(ANSWER)[0]
    if both.startswith(bare) and opening.strip():
        raise DataError(
            f"data.chat: the model's chat template begins the assistant's turn by {opening!r}, and doesn't where add_generation_prompt asks"
            f" for it; {way_out}"
        )


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[dict[str, str]], opened: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opened))
    except Exception as error:  # a template may raise anything
        message = str(error).strip() or type(error).__name__
        raise DataError(
            f"data.chat: the model's chat template refuses a lone user turn: {message[:300]}; write out the prompt and leave out data.chat"
        ) from None


def text_of(prompt: Prompt) -> str:
    """The whole text of a prompt."""
    return prompt if isinstance(prompt, str) else prompt.prompt


def _parts(prompt: Prompt) -> tuple[str, str, str]:
    """What is before the content, the content, what is after it."""
    text = text_of(prompt)
    start, end = (0, len(text)) if isinstance(prompt, str) or prompt.content is None else prompt.content
    return text[:start], text[start:end], text[end:]


def _ends(tokenizer: "PreTrainedTokenizerBase", text: str, from_end: bool) -> list[int]:
    """After how many characters a text may be cut, 0 first: where its tokens end or, with `from_end`, begin, counted from its end."""
    if not tokenizer.is_fast:
        return list(range(len(text) + 1))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return sorted({0, *((len(text) - start if from_end else end) for start, end in offsets)})


def look(progress: Progress, request: SeeTemplate) -> None:
    """See that a model's chat template works. Raises DataError, and ModelError for a tokenizer that can't be loaded."""
    check_template(load_tokenizer(request.source))


if __name__ == "__main__":
    serve(answering({SeeTemplate: look}))
