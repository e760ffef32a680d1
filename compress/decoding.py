"""What a model's generation config may set: what a batch changes about it, what has no place in a measurement, what is refused.

Each field of transformers' `GenerationConfig` is in one of the sets below. tests/test_decoding.py goes through them, and compares batches
with generations of single prompts for those where batches matter. A field in none of the sets, of a newer transformers or of somebody's
own, is treated the safest way: whole generations of prompts of equal length.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import ModelError
from compress.model.source import settings
from compress.recipe import Generation

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from compress.model.source import Source

# `leaving`: rows that have ended leave the batch, and the others continue in a new generation from where they are
# `whole`: every row stays to the end; `equal`: and a batch has prompts of one length, so that none is padded
Batching = Literal["leaving", "whole", "equal"]
FILE = "generation_config.json"

SPECIAL = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})
# say how tokens are drawn or beams searched, how many are written and how fast, and not which token is the best
SEARCH = frozenset({
    "do_sample", "early_stopping", "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_new_tokens", "min_p", "num_beams", "temperature",
    "top_h", "top_k", "top_p", "typical_p", "use_cache",
})  # fmt: skip
# read a row's own tokens or scores, wherever its generation began and whatever stands beside it
FREE = SPECIAL | SEARCH | {
    "bad_words_ids", "forced_eos_token_id", "remove_invalid_values", "renormalize_logits", "sequence_bias", "suppress_tokens",
}  # fmt: skip
# the same where the prompt is an encoder's: a decoder's padding, on the left, counts as tokens written before
FREE_BEHIND_ENCODER = frozenset({"forced_bos_token_id", "min_length", "no_repeat_ngram_size", "repetition_penalty"})
# count from where a generation begins, or carry something through it
WHOLE = frozenset({"begin_suppress_tokens", "exponential_decay_length_penalty", "guidance_scale", "min_new_tokens"})
WHOLE_BEHIND_ENCODER = frozenset({"stop_strings", "watermarking_config"})
# look at the prompt with its padding
EQUAL = frozenset({"encoder_no_repeat_ngram_size", "encoder_repetition_penalty"})
# the values at which they do nothing, besides None
NEUTRAL = {
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "min_length": 0, "min_new_tokens": 0,
    "no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
}  # fmt: skip
# how fast it is written, how much is returned, how long it may be by default: the harness decides these
OVERRULED = frozenset({
    "assistant_early_exit", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile",
    "is_assistant", "low_memory", "max_cache_len", "max_length", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "prefill_chunk_size", "prompt_lookup_num_tokens", "return_dict_in_generate", "speculation_type",
    "use_mtp",
})  # fmt: skip
# details of the others, without effect on their own
DETAILS = frozenset({
    "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "diversity_penalty", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind", "transformers_version",
})  # fmt: skip
REMOTE = "transformers loads code from the hub for it, and none is run here"
REFUSED = {
    "constraints": REMOTE,
    "dola_layers": REMOTE,
    "force_words_ids": REMOTE,
    "max_time": "a text that the clock ends comes out otherwise each time",
    "num_beam_groups": REMOTE,
    "penalty_alpha": REMOTE,
    "token_healing": "it rewrites the prompt, and both models must get the same one",
}
IDS = ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "bad_words_ids")  # tokens that have to be there


def batching(config: "GenerationConfig", encoder: bool) -> Batching:
    """How prompts may be batched so that each is answered as if it were the only one.

    encoder   the prompt goes to an encoder
    """
    left = acting(vars(config)) - FREE - (FREE_BEHIND_ENCODER if encoder else frozenset())
    if passes_over_padding():
        left.discard("repetition_penalty")
    if left - WHOLE - (WHOLE_BEHIND_ENCODER if encoder else frozenset()):
        return "equal"
    return "whole" if left else "leaving"


def takes_the_best(config: "GenerationConfig") -> bool:
    """Whether a greedy generation takes the token that the model itself scores highest, at every step."""
    return not acting(vars(config)) - SPECIAL - SEARCH


def acting(values: Mapping[str, Any]) -> set[str]:
    """The settings of a generation config, as plain data, that may change the text and that the harness doesn't decide."""
    return (
        {name for name, value in values.items() if not name.startswith("_") and value is not None and value != NEUTRAL.get(name)}
        - OVERRULED
        - DETAILS
    )


@cache
def passes_over_padding() -> bool:
    """Whether transformers' repetition penalty leaves out the padding before a prompt, which 5.15 doesn't and 5.24 does."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    try:
        RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.zeros(1, dtype=torch.long))
    except ValueError:
        return False
    return True


def refuse(settings: dict[str, Any], vocabulary: int | None, where: str, sampled: bool) -> None:
    """Raise ModelError for what a generation config asks and can't be done.

    settings     the config as plain data
    vocabulary   how many tokens the model has; None where that is not known
    where        what the config is called in messages
    sampled      the recipe draws at the config's own temperature
    """
    for name, why in REFUSED.items():
        if (value := settings.get(name)) and not (name == "num_beam_groups" and value == 1):
            raise ModelError(f"{where}: {name}: {value}: {why}; remove it there")
    if settings.get("cache_implementation") == "quantized":
        raise ModelError(f"{where}: cache_implementation: quantized: keys and values are held whole here; remove it there")
    if isinstance(start := settings.get("decoder_start_token_id"), list):
        raise ModelError(f"{where}: decoder_start_token_id: {start}: must be a single token, the same for every prompt")
    if sampled and (temperature := settings.get("temperature")) is not None and not temperature > 0:
        raise ModelError(
            f"{where}: temperature: {temperature}: must be above 0 where generation.do_sample is true; give generation.temperature"
        )
    if vocabulary is None:
        return
    for name in IDS:
        if beyond := [token for token in _tokens(settings.get(name)) if not 0 <= token < vocabulary]:
            raise ModelError(f"{where}: {name}: {beyond[0]} is no token of the model, which has {vocabulary:,}; correct it there")
    ends = list(_tokens(settings.get("eos_token_id")))
    if ends and min(ends) >= vocabulary:
        raise ModelError(f"{where}: eos_token_id: {ends[0]} is no token of the model, which has {vocabulary:,}, so that it would never end")


def check(source: "Source", sampled: bool) -> None:
    """See that the generation config of a model can be followed, by its files alone and without torch.

    Raises ModelError as `refuse` does, and where the file can't be read.
    """
    generation, config = settings(source, FILE), settings(source, "config.json")
    text = next((part for key in ("text_config", "decoder") if isinstance(part := config.get(key), dict)), config)
    size = text.get("vocab_size", config.get("vocab_size"))
    refuse(generation, size if isinstance(size, int) else None, f"{source.id}: {FILE}", sampled)


def followed(engine: str, own: Mapping[str, Any], recipe: Generation, supported: Collection[str], beams: bool = False) -> dict[str, Any]:
    """The generation settings for an engine that searches greedily: the recipe's, else those of the model's own generation config.

    own         the model's generation config as plain data
    supported   what the engine follows besides the settings that all engines do
    beams       whether it has beam search, too

    Raises ModelError for what it doesn't do.
    """
    if recipe.do_sample:
        raise ModelError(f"engine: {engine}: generation.do_sample: its draws aren't those of other engines; leave it out")
    if recipe.num_beams > 1 and not beams:
        raise ModelError(f"engine: {engine}: generation.num_beams: {recipe.num_beams}; it has no beam search, leave it out")
    values = {**own, **{name: value for name, value in recipe.model_dump(exclude={"seed"}).items() if value is not None}}
    if unknown := acting(values) - SPECIAL - SEARCH - set(supported):
        raise ModelError(f"engine: {engine}: {', '.join(sorted(unknown))} isn't supported; remove it from the recipe and {FILE}")
    return values


def ends(settings: Mapping[str, Any], otherwise: Any, padding: int | None) -> frozenset[int]:
    """The tokens that end a text: those of a generation config as plain data, or `otherwise`, one or a list, and padding."""
    return frozenset(_tokens(settings.get("eos_token_id", otherwise))) | ({padding} if padding is not None else frozenset())


def overruled(config: "GenerationConfig") -> list[str]:
    """What a config sets otherwise than the harness decides, as `key: value`."""
    mere = {"max_length", "output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"}
    return [f"{name}: {value}" for name in sorted(OVERRULED - mere) if (value := getattr(config, name, None)) not in (None, False, 1)]


def held(config: "GenerationConfig") -> "GenerationConfig":
    """The config without what the harness decides."""
    config = copy.deepcopy(config)
    for name in OVERRULED:
        setattr(config, name, None)
    return config


def neutral(config: "GenerationConfig") -> "GenerationConfig":
    """A config of nothing but special tokens, with which the distributions are the model's own."""
    return type(config)(**{name: getattr(config, name) for name in SPECIAL})


@contextmanager
def generating_by(writer: "PreTrainedModel", config: "GenerationConfig") -> Iterator[None]:
    """Give a model this generation config while the block runs; `generate` takes from it what it isn't told."""
    own = writer.generation_config
    writer.generation_config = config
    try:
        yield
    finally:
        writer.generation_config = own


def _tokens(value: Any) -> Iterator[int]:
    """The numbers in a token id, or in lists of them."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _tokens(part)
    elif isinstance(value, int):
        yield value
