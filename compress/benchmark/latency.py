"""How long a generation takes: to the first token, per further token, and as a whole.

Prefill reads the whole prompt at once and is bound by arithmetic; decoding reads every weight for each token and is bound by
memory bandwidth. They are timed apart in one run, by a clock that generation calls after every token. Prompts are random tokens of
exact length and the output length is forced, so that both sides do the same work.

On a CPU a turn rests after every slice of it, so that the other sides' turns go on beside it, slice by slice. The speed of a machine
wanders as flicker noise does: means over one second differ from those over the next by no less than means over 0.1 s do. What is compared
within hundredths of a second is known as well in a tenth of the time.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

from compress.decoding import generating_by, neutral
from compress.recipe import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PLAIN = Runtime()
SLICE_S = 0.05  # the caches are another side's at its begin, which costs a model of 14 MB 0.6 to 1.5 % of it (docs/measuring.md)
Rest = Callable[[int], None]  # is told how many tokens there are, and returns when the generation may go on


class Pace:
    """Has a turn `rest` whenever a slice of it is over: is told of a generation's tokens, and tells the turn's."""

    def __init__(self, rest: Rest):
        self._rest, self._since = rest, time.perf_counter()

    def __call__(self, before: int, tokens: int) -> None:
        if time.perf_counter() - self._since >= SLICE_S:
            self._rest(before + tokens)
            self._since = time.perf_counter()


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time of every token: CUDA events on a GPU, so that nothing waits for the host, else a monotonic clock.

    rest   called on a CPU after each token; the time that it takes doesn't count
    """

    def __init__(self, device: str, rest: Rest | None = None):
        self._cuda = device == "cuda"
        self._rest = None if self._cuda else rest
        self._marks: list[Any] = []
        self._rested = 0.0

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._marks = []
        self._rested = 0.0
        self._mark()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._mark()
        if self._rest is not None:
            before = time.perf_counter()
            self._rest(len(self._marks) - 1)
            self._rested += time.perf_counter() - before
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> list[float]:
        """Time from start to each mark."""
        if self._cuda:
            torch.cuda.synchronize()
            return [self._marks[0].elapsed_time(mark) / 1000 for mark in self._marks[1:]]
        return [mark - self._marks[0] for mark in self._marks[1:]]

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter() - self._rested)


def prompts(model: "PreTrainedModel", device: str, batch_size: int, prompt_tokens: int) -> dict[str, Any]:
    """Random token ids of one length, the same for every model of a vocabulary; special ids are left out as far as they are low."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (batch_size, prompt_tokens), generator=generator).to(device)
    if not model.can_generate() and isinstance(model.config.eos_token_id, int):
        ids[:, -1] = model.config.eos_token_id  # BART classifies what it has at the end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: "PreTrainedModel", inputs: dict[str, Any], new_tokens: int, watch: StoppingCriteria, runtime: Runtime = PLAIN) -> Any:
    """A greedy generation of exactly `new_tokens` tokens, `watch` being called after each. Returns the ids.

    What the model's generation config says besides the special tokens is left out: it would change the work, or how much of it there is.
    """
    # transformers would make a static cache as long as the longest that the model has had
    model._previous_max_cache_length = -1
    with torch.no_grad(), generating_by(model, neutral(model.generation_config)):
        return model.generate(
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]), pad_token_id=0, **_cache_options(model, runtime),
        )  # fmt: skip


def generation_seconds(
    model: "PreTrainedModel", inputs: dict[str, Any], new_tokens: int, device: str, runtime: Runtime = PLAIN, rest: Rest | None = None
) -> list[float]:
    """Seconds from the start of a greedy generation to each of its `new_tokens` tokens, the last being the whole latency."""
    clock = Clock(device, rest)
    clock.start()
    output = generate(model, inputs, new_tokens, clock, runtime)
    seconds = clock.seconds()
    produced = output.shape[1] - (1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1])
    if len(seconds) != new_tokens or produced != new_tokens:
        raise RuntimeError(f"{new_tokens} tokens were forced and {produced} came")
    return seconds


def classify(model: "PreTrainedModel", inputs: dict[str, Any], times: int, watch: StoppingCriteria) -> None:
    """So many forward passes of a classifier, `watch` being called after each."""
    with torch.no_grad():
        for _ in range(times):
            model(**inputs)
            watch(inputs["input_ids"], None)


def step(model: "PreTrainedModel", device: str) -> None:
    """The shortest run of all of a model, plain, after which what a first step changes is changed: two tokens, or one classification."""
    inputs, nobody = prompts(model, device, 1, 4), Clock(device)
    if model.can_generate():
        generate(model, inputs, 2, nobody)
    else:
        classify(model, inputs, 1, nobody)


def _cache_options(model: "PreTrainedModel", runtime: Runtime) -> dict[str, Any]:
    """What has transformers take a static cache and compile the steps over it, each grid point for itself."""
    if runtime.cache == "dynamic":
        return {}
    if not runtime.compile:
        return {"cache_implementation": "static", "disable_compile": True}
    on_gpu = model.device.type == "cuda"
    how = CompileConfig(mode="reduce-overhead" if on_gpu else "default", dynamic=False)
    how._compile_all_devices = not on_gpu  # transformers compiles on a CPU when it is told to
    return {"cache_implementation": "static", "compile_config": how}


def forward_seconds(model: "PreTrainedModel", inputs: dict[str, Any], device: str, rest: Rest | None = None) -> list[float]:
    """Seconds of one classification; a list of one."""
    clock = Clock(device, rest)
    clock.start()
    classify(model, inputs, 1, clock)
    return clock.seconds()
