"""How long a generation takes: to the first token, per further token, and as a whole.

Prefill reads the whole prompt at once and is bound by arithmetic. Decoding reads every weight for each token and is bound by memory
bandwidth. Both are timed in one run, by a clock that generation calls after every token. Prompts are random tokens of exact length and
the output length is forced, so that both sides do the same work.

On a CPU a turn pauses after every slice, so that the other sides' turns go on beside it, slice by slice. The speed of a machine wanders as
flicker noise does: means over one second differ from the next as much as means over 0.1 s do. So sides that are compared within hundredths
of a second reach the same precision in a tenth of the time.
"""

import time
from collections.abc import Callable
from typing import Any

from compress.engines import Engine, Traits, random_prompts

SLICE_S = 0.05  # at its start the caches hold another side; that costs a model of 14 MB 0.6 to 1.5 % of it (docs/measuring.md)
Rest = Callable[[int], None]  # is told how many tokens there are, and returns when the generation may go on


class Pace:
    """Calls `rest` whenever a slice of a turn is over: takes the tokens of a generation, and passes on those of the turn."""

    def __init__(self, rest: Rest):
        self._rest, self._since = rest, time.perf_counter()

    def __call__(self, before: int, tokens: int) -> None:
        if time.perf_counter() - self._since >= SLICE_S:
            self._rest(before + tokens)
            self._since = time.perf_counter()


class Clock:
    """Notes the time whenever it is called.

    Where tokens are queued on a GPU it records CUDA events, so that nothing waits for the host; else it reads a monotonic clock.

    rest   called on a CPU after each token; the time that it takes doesn't count
    """

    def __init__(self, queues: bool, rest: Rest | None = None):
        self._queues = queues
        self._rest = None if queues else rest
        self._marks: list[Any] = []
        self._rested = 0.0

    def start(self) -> None:
        if self._queues:
            import torch

            torch.cuda.synchronize()
        self._marks = []
        self._rested = 0.0
        self._mark()

    def __call__(self) -> None:
        self._mark()
        if self._rest is not None:
            before = time.perf_counter()
            self._rest(len(self._marks) - 1)
            self._rested += time.perf_counter() - before

    def seconds(self) -> list[float]:
        """Time from start to each mark."""
        if self._queues:
            import torch

            torch.cuda.synchronize()
            return [self._marks[0].elapsed_time(mark) / 1000 for mark in self._marks[1:]]
        return [mark - self._marks[0] for mark in self._marks[1:]]

    def _mark(self) -> None:
        if self._queues:
            import torch

            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter() - self._rested)


def prompts(traits: Traits, batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Random tokens for a model, the same for all models of one vocabulary size."""
    return random_prompts(traits.vocabulary, traits.end, batch_size, prompt_tokens)


def seconds(engine: Engine, rows: list[list[int]], new_tokens: int, rest: Rest | None = None) -> list[float]:
    """Seconds from the start of a greedy generation to each of its `new_tokens` tokens; the last is the whole latency.

    Of a classification it is a list of one. Raises RuntimeError where another number of tokens came.
    """
    clock, prepared = Clock(engine.traits.queues, rest), engine.prepare(rows)
    clock.start()
    engine.run(prepared, new_tokens, clock)
    marks = clock.seconds()
    if len(marks) != (expected := new_tokens if engine.traits.generates else 1):
        raise RuntimeError(f"{expected} tokens were forced and {len(marks)} came")
    return marks
