"""What flows through a model during calibration: batches of examples, led up to the blocks, and the hidden states between two blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only

from compress import experts
from compress.errors import DataError, ModelError
from compress.methods import Context, Example
from compress.prompts import Prompts
from compress.structure import context_length, decoder_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 2048  # enough for a GPU to have work, and few enough for the activations of one batch to be small beside a block
Row = tuple[Example, list[int], list[int]]  # an example, its token ids, those of its target
Inputs = dict[str, Any]  # what the model is called with for one batch
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides the hidden states


@dataclass
class Stream:
    """The inputs of one block, batch by batch; all in main memory.

    hidden  the hidden states, (examples, tokens, width)
    calls   the other arguments of the call
    real    which tokens are not padding, (examples, tokens)
    behind  how many entries the block returns after its hidden states; None where it returns a tensor and no tuple
    """

    hidden: list[Tensor]
    calls: list[Call]
    real: list[Tensor]
    behind: int | None = None

    def through(self, module: Callable[..., Any], index: int, device: str) -> Tensor:
        """The hidden states behind a block for one batch, on the device. A mixture's experts get no padding."""
        if isinstance(module, nn.Module):
            experts.leave_padding_out(module, self.real[index])
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), self.calls[index])
        return _states(module(self.hidden[index].to(device), *args, **kwargs))

    def rows(self, states: Tensor, index: int) -> Tensor:
        """Rows (tokens, width) of states inside the block that belong to real tokens.

        States of another length are the encoder's, given to a decoder's cross attention (`padded` makes the lengths differ); those
        are zero where they are padding.
        """
        flat, real = states.reshape(-1, states.shape[-1]), self.real[index].reshape(-1).to(states.device)
        return flat[real] if len(flat) == len(real) and not real.all() else flat


def encoded(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: Context) -> list[Row]:
    """Each example with its token ids, and those of its first reference with its end, which in a decoder follow the example's.

    A note in the report counts the examples that were too long or too short.

    Raises DataError when no example is left that has two tokens or more and for chat without a template, ModelError for encoder-decoders
    that classify.
    """
    both, limit = model.config.is_encoder_decoder, min(context.max_tokens, context_length(model.config, tokenizer) or context.max_tokens)
    if both and not model.can_generate():
        raise ModelError(
            f"{type(model).__name__}: an encoder-decoder that classifies can't be shown examples here;"
            " methods that need none work on it (`compress methods` lists them)"
        )
    if not model.can_generate() and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by it decoders that classify find the last real token
    rows, cut = [], 0
    prompts = Prompts(tokenizer, context.chat)
    for example in context.examples:
        target, answer, behind = example.references[0] if example.references else "", list[int](), False
        if model.can_generate() and (both or target):
            behind = not both  # the target stands behind the prompt
            ends = [tokenizer.eos_token_id] if behind and tokenizer.eos_token_id is not None else []
            answer = [*prompts.target(target, special=both), *ends]
        if not behind:
            ids, longer = prompts.read(example, limit)
            if len(answer) > limit - 1:  # `padded` may need one more
                answer, longer = prompts.target(target, both, limit - 1), True
        else:
            ids, longer = prompts.read(example, None, unended=True)
            if longer := len(ids) + len(answer) > limit:  # of the target at least half, of the prompt at least its template
                answer = answer[: max(1, min(max(limit // 2, limit - len(ids)), limit - prompts.least))]
                ids, _ = prompts.read(example, limit - len(answer), unended=True)
            ids = [*([] if ids == ends else ids), *answer]  # an end token alone is no prompt
        cut += longer
        if len(ids) > 1:
            rows.append((example, ids, answer))
    if not rows:
        raise DataError(
            f"no example has two tokens or more, of {len(context.examples)};"
            f" look at data.prompt, and at max_tokens, which is {context.max_tokens}"
        )
    context.cut.append({"cut": cut, "all": len(context.examples), "limit": limit, "by_key": limit == context.max_tokens})
    if cut:
        context.say(f"{cut:,} of the {len(context.examples):,} examples were longer than {limit:,} tokens and were cut at an end")
    if short := len(context.examples) - len(rows):
        context.say(f"{short:,} of the {len(context.examples):,} examples had fewer than two tokens and were left out")
    return rows


def batches(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: Context) -> list[Inputs]:
    """The calibration examples as padded batches of similar length: the prompt, or prompt and target; for encoder-decoders both sides.

    Raises DataError when no example is left that has two tokens or more.
    """
    pairs = [(ids, answer) for _, ids, answer in encoded(model, tokenizer, context)]
    parts: list[list[tuple[list[int], list[int]]]] = [[]]
    longest = 0
    for pair in sorted(pairs, key=lambda pair: (len(pair[0]), len(pair[1]))):
        longest = max(longest, *map(len, pair))
        if parts[-1] and (len(parts[-1]) + 1) * longest > BATCH_TOKENS:
            parts.append([])
            longest = max(map(len, pair))
        parts[-1].append(pair)
    return [padded(model, part) for part in parts]


def padded(model: "PreTrainedModel", part: list[tuple[list[int], list[int]]]) -> Inputs:
    """Encoded examples as one batch on the model's device, padded on the right, both sides of an encoder-decoder to unlike lengths."""

    def side(number: int) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(example[number]) for example in part]
        filler = model.config.get_text_config().pad_token_id or 0
        ids = pad_sequence(rows, batch_first=True, padding_value=filler)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return ids.to(model.device), mask.to(model.device)

    ids, mask = side(0)
    inputs: Inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        labels, mask = side(1)
        if labels.shape == ids.shape:
            labels, mask = pad(labels, (0, 1)), pad(mask, (0, 1))
        inputs |= {"decoder_input_ids": decoder_inputs(model, labels), "decoder_attention_mask": mask}
    return inputs


def lead_in(model: "PreTrainedModel", blocks: nn.ModuleList, examples: list[Inputs]) -> list[Stream]:
    """What each block is called with. Only the first has hidden states yet; the others' are filled in as they come.

    T5's first block is run, since it makes the position bias that the others get, and these reply with its output. Elsewhere a block
    returns hidden states only, and any will do.

    Raises ModelError where a block's output isn't the next one's input, blocks are run more than once, or there isn't one state for each
    token.
    """
    first, replies, number = blocks[0], list[Any](), 0  # replies has one at most, which blocks after the first repeat
    decoder = not is_encoder(model, blocks) and model.config.is_encoder_decoder
    real = [inputs["decoder_attention_mask" if decoder else "attention_mask"].bool().cpu() for inputs in examples]
    streams = [Stream([], [], real) for _ in blocks]

    moved: dict[int, tuple[Tensor, Tensor]] = {}  # blocks share masks and biases; one copy serves all

    def kept(tensor: Tensor) -> Tensor:
        return moved.setdefault(id(tensor), (tensor, tensor.cpu()))[1]

    def answer(index: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(streams[index].calls) > number:
            raise _cannot_follow(model, f"runs its {len(blocks)} blocks more than once")
        if index > 0 and not torch.equal(states, _states(replies[0])):
            raise _cannot_follow(model, f"changes the hidden states between its blocks {index - 1} and {index}")
        if states.shape[:-1] != real[number].shape:
            raise _unlike_tokens(model, states, real[number])
        streams[index].calls.append(tree_map_only(Tensor, kept, (args, kwargs)))
        if index == 0:
            streams[0].hidden.append(states.cpu())
            if not replies or isinstance(replies[0], tuple):
                replies[:] = [first(states, *args, **kwargs)]
            else:
                replies[:] = [states]
        if index == len(blocks) - 1 and (number > 0 or model.config.is_encoder_decoder):
            raise _Stop
        return replies[0]

    with _standing_in(blocks, answer):
        for number, inputs in enumerate(examples):  # noqa: B007, which `answer` looks at
            moved.clear()
            with suppress(_Stop):
                # the first batch goes to the end, though not through the head, which shows whether blocks are run again
                (model if model.config.is_encoder_decoder else model.base_model)(**inputs)
    for stream in streams:
        stream.behind = len(replies[0]) - 1 if replies and isinstance(replies[0], tuple) else None
    return streams


def look_ahead(model: "PreTrainedModel", stacks: dict[str, nn.ModuleList]) -> None:
    """Lead a few tokens through an encoder-decoder without weights, as far as that goes: the encoder's work would come before a refusal.

    Raises ModelError where a decoder's states don't stand one for each token.
    """
    if not model.config.is_encoder_decoder:
        return
    ids = torch.ones(1, 6, dtype=torch.long, device="meta")

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[:-1] != ids.shape:
            raise _unlike_tokens(model, states, ids)

    handles = [blocks[0].register_forward_pre_hook(hook, with_kwargs=True) for blocks in stacks.values()]
    try:
        model(input_ids=ids, decoder_input_ids=ids)
    except ModelError:
        raise
    except Exception:  # much of what asks for numbers doesn't run without; such models are looked at in their turn
        return
    finally:
        for handle in handles:
            handle.remove()


def _unlike_tokens(model: "PreTrainedModel", states: Tensor, tokens: Tensor) -> ModelError:
    return _cannot_follow(model, f"has hidden states of {tuple(states.shape)} for tokens of {tuple(tokens.shape)}")


def _states(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _cannot_follow(model: "PreTrainedModel", what: str) -> ModelError:
    return ModelError(f"{type(model).__name__} {what}, which calibration block by block can't follow; take a method that needs no examples")


def encode(model: "PreTrainedModel", blocks: nn.ModuleList, examples: list[Inputs], last: Stream) -> None:
    """Give every batch the encoder's output, made from the hidden states behind its last block, in place of its input."""
    from transformers.modeling_outputs import BaseModelOutput

    for inputs, hidden in zip(examples, last.hidden, strict=True):
        states, mask = hidden.to(model.device), inputs["attention_mask"]
        answer = states if last.behind is None else (states, *[None] * last.behind)
        with _standing_in(blocks, lambda *_, answer=answer: answer):
            out = model.get_encoder()(input_ids=inputs.pop("input_ids"), attention_mask=mask).last_hidden_state
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=out * mask[..., None].to(out.dtype))


def is_encoder(model: "PreTrainedModel", blocks: nn.ModuleList) -> bool:
    """Whether these blocks are the encoder of an encoder-decoder."""
    return bool(model.config.is_encoder_decoder) and any(blocks is part for part in model.get_encoder().modules())


class _Stop(Exception):
    """The last block of a stack was reached; what comes behind it isn't wanted."""


class _StandIn(nn.Module):
    """Stands where a block stood and answers in its place."""

    def __init__(self, block: nn.Module, answer: Callable[..., Any]):
        super().__init__()
        object.__setattr__(self, "_stands_for", block)
        object.__setattr__(self, "_answer", answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stands_for, name)  # models look at attributes of their blocks, such as the kind of attention

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._answer(hidden, args, kwargs)


@contextmanager
def _standing_in(blocks: nn.ModuleList, answer: Callable[..., Any]) -> Iterator[None]:
    """Every block answers answer(index, hidden, args, kwargs) while the context lasts."""
    real = list(blocks)
    for index, block in enumerate(real):
        blocks[index] = _StandIn(block, lambda *arguments, index=index: answer(index, *arguments))
    try:
        yield
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


@contextmanager
def without_cache(model: "PreTrainedModel") -> Iterator[None]:
    """A cache would grow with every call of a block. Each stack of an encoder-decoder has a config of its own."""
    configs = {id(m.config): m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", None)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
