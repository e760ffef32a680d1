"""Depth: whole blocks go, those that change their input least or evenly spaced ones, so that every step runs through fewer.

`by: influence`: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect". A block's influence is 1
minus the mean cosine similarity of the hidden states before and behind it. Here it is over the real tokens of the calibration examples, all
measured on the whole model. `by: spacing`: Sanh et al. 2019, "DistilBERT"; Shleifer and Rush 2020, "Pre-trained Summarization
Distillation". Looks at no example; the first and the last block stay. On any model made of blocks; each stack of an encoder-decoder by
itself. Best followed by some training.
"""

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from compress import methods
from compress.errors import BrokenPromise, InputError, ModelError
from compress.methods import About, Context
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ABOUT = About(at_run_time="fewer blocks one after the other; embeddings and the head take as long as before", calibrated=True)


Kind = frozenset[tuple[str, tuple[int, ...]]]  # names and shapes of a block's weights


class Stacks(methods.Settings):
    """How many blocks go of either stack of an encoder-decoder."""

    encoder: int = Field(0, ge=0, description="blocks of the encoder that go")
    decoder: int = Field(0, ge=0, description="blocks of the decoder that go")

    @model_validator(mode="after")
    def _some(self) -> "Stacks":
        if not self.encoder and not self.decoder:
            raise ValueError("nothing to drop: give encoder, decoder or both a number above 0")
        return self


class Settings(methods.Settings):
    drop: Annotated[int, Field(ge=1)] | Stacks = Field(
        description="how many blocks go: of every stack, or as {encoder: 2, decoder: 4} of each"
    )
    by: Literal["influence", "spacing"] = Field(
        "influence",
        description="which go: those that change their input least on the train split, or those between blocks evenly spaced",
    )


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with fewer blocks, renumbered, and a config that says so.

    Raises InputError where a stack would be emptied or isn't there, and ModelError where blocks or their config can't be found. Raises
    DataError when there is nothing to measure influence on.
    """
    from compress.prune._rebuilt import rebuilt

    model = bundle.model
    stacks = _stacks(model)
    going = {role: _going(role, name, blocks, settings, model) for role, (name, blocks) in stacks.items()}
    for role, (_, blocks) in stacks.items():
        _number_key(model.config, role, len(blocks))
    influences = _influences(bundle, {role: blocks for role, (_, blocks) in stacks.items()}, context) if settings.by == "influence" else {}
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    for role, (name, blocks) in stacks.items():
        left, kinds = len(blocks) - going[role], _kinds(blocks)
        first = _first(kinds)
        if settings.by == "spacing":
            kept = [*range(first), *(first + index for index in spaced(len(blocks) - first, left - first))]
            if not first and {kinds[index] for index in kept} != set(kinds):
                raise InputError(f"by: spacing would leave none of a kind of block that {name} has; say by: influence, or drop fewer")
            context.say(f"blocks evenly spaced in {name}, {len(blocks)} -> {left} blocks: {', '.join(map(str, kept))} are kept")
        else:
            scores = influences[role]
            kept = _kept(kinds, first, going[role], scores)
            told = ", ".join(f"{n} {score:.3g}{'' if n in kept else ' (dropped)'}" for n, score in enumerate(scores))
            context.say(f"block influence in {name}, {len(blocks)} -> {left} blocks: {told}")
        if going[role]:
            _shorten(config, role, len(blocks), kept)
            state = _renumbered(state, name, kept)
    return bundle.holding(rebuilt(model, config, state))


def _first(kinds: list[Kind]) -> int:
    """How many blocks of one kind stand before all others, which are of another: dense ones before those with experts. Else 0."""
    first = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), 0)
    return first if len(kinds) > first + 1 and len(set(kinds[first:])) == 1 else 0


def _kinds(blocks: "nn.ModuleList") -> list[Kind]:
    """What weights each block has; only those of one kind can take each other's place. T5's position bias goes along with the first."""
    return [
        frozenset((name, tuple(weight.shape)) for name, weight in block.state_dict().items() if "relative_attention_bias" not in name)
        for block in blocks
    ]


def _kept(kinds: list[Kind], first: int, going: int, scores: list[float]) -> list[int]:
    """The blocks that are kept: without those with the lowest scores. The first ones stay, or one of each kind where kinds alternate."""
    kept = list(range(len(kinds)))
    for index in sorted(range(first, len(kinds)), key=lambda index: scores[index]):
        if len(kinds) - len(kept) < going and (first or sum(kinds[other] == kinds[index] for other in kept) > 1):
            kept.remove(index)
    return kept


def spaced(blocks: int, left: int) -> list[int]:
    """The numbers of the blocks that are left, evenly spaced from the first to the last. Where one is left, it is the first.

    A half is rounded to the even number. So 1, 3 and 6 of 12 are those of Shleifer and Rush's table, which spaces some others less evenly.
    """
    return [round(place * (blocks - 1) / max(left - 1, 1)) for place in range(left)]


def _stacks(model: "PreTrainedModel") -> "dict[str, tuple[str, nn.ModuleList]]":
    """The name and blocks of each stack, by its role: encoder and decoder, or blocks where there is one.

    Raises ModelError where there are none, or others.
    """
    from compress.calibration.stream import is_encoder
    from compress.structure import block_stacks

    both = bool(model.config.is_encoder_decoder)
    stacks: dict[str, tuple[str, nn.ModuleList]] = {}
    for name, blocks in block_stacks(model).items():
        role = "blocks" if not both else "encoder" if is_encoder(model, blocks) else "decoder"
        if role in stacks:
            raise ModelError(f"{type(model).__name__}: {stacks[role][0]} and {name} both hold blocks; in which order they run is not known")
        stacks[role] = name, blocks
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no blocks to drop")
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            f"{type(model).__name__}: attention is scaled by a block's number (scale_attn_by_inverse_layer_idx), which changes"
        )
    return stacks


def _going(role: str, name: str, blocks: "nn.ModuleList", settings: Settings, model: "PreTrainedModel") -> int:
    """How many blocks of a stack go."""
    if isinstance(settings.drop, int):
        number = settings.drop
    elif role == "blocks":
        raise InputError(
            f"drop: {type(model).__name__} has one stack of {len(blocks)} blocks, {name}; say drop: and a number below {len(blocks)}"
        )
    else:
        number = settings.drop.encoder if role == "encoder" else settings.drop.decoder
    kinds = _kinds(blocks)
    least = _first(kinds) or len(set(kinds))
    if number > len(blocks) - least:
        left = "none" if number >= len(blocks) else f"{len(blocks) - number}, and of its kinds of blocks {least} have to stay"
        raise InputError(f"drop: {number} of the {len(blocks)} blocks of {name} would leave {left}; at most {len(blocks) - least} can go")
    return number


def _influences(bundle: Bundle, stacks: "dict[str, nn.ModuleList]", context: Context) -> dict[str, list[float]]:
    """1 - mean cosine similarity of what goes into each block and what comes out, over real tokens."""
    import torch

    from compress.calibration.stream import batches, without_cache

    model = bundle.model
    alike = {role: [0.0] * len(blocks) for role, blocks in stacks.items()}
    tokens, real = dict.fromkeys(stacks, 0), dict["str", "Tensor"]()

    def hook_of(role: str, index: int) -> Callable[..., None]:
        def hook(block: "nn.Module", args: tuple[Any, ...], out: Any) -> None:
            behind = out[0] if isinstance(out, tuple) else out
            if behind.shape[:-1] != real[role].shape:
                raise ModelError(
                    f"{type(model).__name__} has hidden states of {tuple(behind.shape)} for tokens of {tuple(real[role].shape)}, so the"
                    " influence of its blocks can't be measured; say by: spacing"
                )
            before, after = (states[real[role]].float() for states in (args[0], behind))
            alike[role][index] += float(torch.cosine_similarity(before, after, dim=-1).double().sum())

        return hook

    handles = [block.register_forward_hook(hook_of(role, n)) for role, blocks in stacks.items() for n, block in enumerate(blocks)]
    try:
        with torch.no_grad(), without_cache(model):
            examples = batches(model, bundle.tokenizer, context)
            for done, inputs in enumerate(examples):
                context.progress("measuring each block's influence", done, len(examples))
                for role in stacks:
                    real[role] = inputs["decoder_attention_mask" if role == "decoder" else "attention_mask"].bool()
                    tokens[role] += int(real[role].sum())
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    influences = {role: [1 - total / tokens[role] for total in totals] for role, totals in alike.items()}
    if any(math.isnan(score) for scores in influences.values() for score in scores):
        raise BrokenPromise(f"{type(model).__name__}: hidden states are NaN on the calibration data; model.dtype: float32 may help")
    return influences


def _shorten(config: Any, role: str, blocks: int, kept: list[int]) -> None:
    """Write into a config how many blocks are left, and cut its lists with an entry a block (`layer_types`) to theirs."""
    from compress.structure import size_cache_by_decoder

    key = _number_key(config, role, blocks)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == blocks and role == "blocks":
            setattr(config, name, [value[index] for index in kept])
    setattr(config, key, len(kept))
    size_cache_by_decoder(config)


def _number_key(config: Any, role: str, blocks: int) -> str:
    """What a config calls the number of a stack's blocks. Raises ModelError where nothing in it is that number."""
    keys = {
        "encoder": ("encoder_layers", "num_layers"),
        "decoder": ("num_decoder_layers", "decoder_layers"),
        "blocks": ("num_hidden_layers",),
    }[role]
    key = next((key for key in keys if getattr(config, key, None) == blocks), None)
    if key is None:
        raise ModelError(f"{config.model_type}: its config has no {' or '.join(keys)} that is the number of its blocks, {blocks}")
    return key


def _renumbered(state: "dict[str, Tensor]", stack: str, kept: list[int]) -> "dict[str, Tensor]":
    """The weights of the kept blocks by their new numbers, and all others. T5's first block keeps the position bias of its stack."""
    new = {}
    for name, weight in state.items():
        if not name.startswith(f"{stack}."):
            new[name] = weight
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in kept:
            new[f"{stack}.{kept.index(int(number))}.{rest}"] = weight
        elif number == "0" and rest.endswith("relative_attention_bias.weight"):
            new.setdefault(f"{stack}.0.{rest}", weight)  # a block with a bias of its own, coming later, takes its place
    return new
