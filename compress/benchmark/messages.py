"""What a measuring process is asked, and what it answers. Parent and child share these records; none needs torch."""

from dataclasses import dataclass, field
from typing import Any

from compress.border import Request
from compress.engines import Explained, Traits, Weights
from compress.methods import Example
from compress.model.source import Source
from compress.scores import Samples

GridPoint = tuple[int, int]  # batch size, prompt tokens


@dataclass(frozen=True)
class Loaded:
    """A model is in memory and has made its first step.

    peaks         bytes while it was loaded, as `memory.peak` has them
    interpreter   bytes that the process held before
    rest          bytes held beyond what the model's tensors take
    sampled_only  whether peaks are only the highest of samples
    """

    traits: Traits
    weights: Weights
    file_bytes: int
    peaks: dict[str, int]
    interpreter: int
    rest: int
    sampled_only: bool
    environment: dict[str, Any]


@dataclass(frozen=True)
class Load(Request[Loaded]):
    """Load a model, and run its first step.

    threads       None takes all that the process may use
    settings      the engine's, `runtime` transformers'
    batch_tokens  what a batch of examples may hold; None takes what fits
    """

    answer = Loaded

    source: Source
    device: str
    threads: int | None = None
    engine: str = "transformers"
    settings: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None


@dataclass(frozen=True)
class WarmedUp:
    """A point was run for the first times.

    reason           why it can't be run, without the other fields; None where it can
    out_of_memory    whether that is for want of memory
    memory           peaks, `cache` (bytes of keys and values, where the engine tells) and the allocator's `slack`
    compile_seconds  how much longer the first run was than the second, where steps are compiled
    marks            the last run's seconds to each token
    """

    reason: str | None = None
    out_of_memory: bool = False
    memory: dict[str, int] = field(default_factory=dict)
    compile_seconds: float | None = None
    marks: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class WarmUp(Request[WarmedUp]):
    """Run a point once and `repeats` times more."""

    answer = WarmedUp

    point: GridPoint
    new_tokens: int
    repeats: int


@dataclass(frozen=True)
class Timings:
    """For each point: seconds from the start to every token, a list an iteration, and the joules that the GPU drew in all, if known."""

    seconds: list[list[list[float]]]
    joules: list[float | None]


@dataclass(frozen=True)
class Time(Request[Timings]):
    """Time each point `iterations` times."""

    answer = Timings

    points: list[GridPoint]
    new_tokens: int
    iterations: int


@dataclass(frozen=True)
class Explain(Request[Explained | None]):
    """Look at a step at each point; the answer is None where the engine doesn't tell."""

    answer = Explained | None

    points: list[GridPoint]
    new_tokens: int


@dataclass(frozen=True)
class Outputs:
    """What a model answered to the examples.

    samples            metric -> an example's statistics, or the reason why there are none; a measuring process leaves out those on texts
    texts              what it wrote, or its labels; None where it only read
    windows            the text that each window counts, with data.join
    cut                prompts that were cut, to `limit` tokens
    longest_input      tokens that a prompt may have
    generation_config  what the model's own generation config says
    remarks            for the report
    """

    samples: Samples
    texts: list[str] | None = None
    windows: list[str] | None = None
    cut: int = 0
    limit: int | None = None
    longest_input: int | None = None
    generation_config: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer(Request[Outputs]):
    """Answer the examples.

    groups             of metrics
    generation, data   the recipe's blocks
    original           the model from which this one diverges, perhaps itself; None where there is none
    """

    answer = Outputs

    examples: list[Example]
    groups: list[str]
    generation: dict[str, Any]
    data: dict[str, Any]
    original: Source | None = None


@dataclass(frozen=True)
class Score(Request[Samples]):
    """Compare texts with their references; each has one or several.

    groups      of metrics
    tokenizers  what the metrics split texts with, as `scripts.Tokenizers` has them
    """

    answer = Samples

    texts: list[str]
    references: list[list[str]]
    groups: list[str]
    tokenizers: dict[str, str]
