"""Generations of an exact number of tokens in transformers, with a callback after each: to time, count and profile."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

from compress.decoding import generating_by, neutral
from compress.engines import random_prompts
from compress.recipe import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = Runtime()


class Told(StoppingCriteria):  # type: ignore[misc]
    """Calls `watch` after each token, and stops nothing."""

    def __init__(self, watch: Callable[[], None]):
        self._watch = watch

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._watch()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def batch(model: "PreTrainedModel", prompts: list[list[int]]) -> dict[str, Any]:
    """Prompts of one length as the model's inputs."""
    ids = torch.tensor(prompts, device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def end_of_input(model: "PreTrainedModel") -> int | None:
    """The token that a classifier's input must end with, if any: BART classifies by its state there."""
    end = model.config.eos_token_id
    return end if not model.can_generate() and isinstance(end, int) else None


def prompts(model: "PreTrainedModel", batch_size: int, prompt_tokens: int) -> dict[str, Any]:
    """Random tokens as the model's inputs."""
    return batch(model, random_prompts(model.config.get_text_config().vocab_size, end_of_input(model), batch_size, prompt_tokens))


def generate(model: "PreTrainedModel", inputs: dict[str, Any], new_tokens: int, watch: StoppingCriteria, runtime: Runtime = PLAIN) -> Any:
    """A greedy generation of exactly `new_tokens` tokens, `watch` being called after each. Returns the ids.

    Of the model's generation config only the special tokens count: the rest would change the work, or its amount.
    """
    # else transformers would make a static cache as long as the longest before
    model._previous_max_cache_length = -1
    with torch.no_grad(), generating_by(model, neutral(model.generation_config)):
        return model.generate(
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]), pad_token_id=0, **_cache_options(model, runtime),
        )  # fmt: skip


def classify(model: "PreTrainedModel", inputs: dict[str, Any], times: int, watch: StoppingCriteria) -> None:
    """Forward passes of a classifier, `times` of them, `watch` being called after each."""
    with torch.no_grad():
        for _ in range(times):
            model(**inputs)
            watch(inputs["input_ids"], None)


def step(model: "PreTrainedModel") -> None:
    """The shortest run of a model, two tokens or one classification: it makes the changes that a first step makes."""
    inputs, nobody = prompts(model, 1, 4), Told(lambda: None)
    if model.can_generate():
        generate(model, inputs, 2, nobody)
    else:
        classify(model, inputs, 1, nobody)


def _cache_options(model: "PreTrainedModel", runtime: Runtime) -> dict[str, Any]:
    """The options for a static cache and compiled steps, which are compiled for each grid point."""
    if runtime.cache == "dynamic":
        return {}
    if not runtime.compile:
        return {"cache_implementation": "static", "disable_compile": True}
    on_gpu = model.device.type == "cuda"
    how = CompileConfig(mode="reduce-overhead" if on_gpu else "default", dynamic=False)
    how._compile_all_devices = not on_gpu  # transformers compiles on a CPU when it is told to
    return {"cache_implementation": "static", "compile_config": how}
