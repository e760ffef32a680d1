"""Engines run models. An engine is a file or a folder here, found by its name; the harness uses only what this file declares.

An engine knows token ids, and nothing of examples, clocks and verdicts. The harness asks the same of each, so what is served is what is
measured.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from compress import methods
from compress.errors import MissingPackage, ModelError
from compress.extras import install_line, line_apart
from compress.hardware import has_gpu
from compress.interpreter import Interpreter
from compress.methods import Settings, Task
from compress.model.source import Source
from compress.packages import lacking
from compress.process import Progress
from compress.recipe import Generation, Runtime
from compress.scores import Likelihood, Samples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

LOW = 10  # most special tokens have lower ids


@dataclass(frozen=True)
class About:
    """What an engine can do, and what it needs.

    reads            what it opens, in words
    opens            the `export` method whose folders it opens; None for folders of Hugging Face
    unread           stages whose folders it can't open, against that rule
    tasks, devices   what it does, and where
    packages, extra  distributions that must be installed, and the extra of this package that installs them
    apart            by device what pip installs into a separate environment; empty where the engine works in this package's own
    unwanted         packages that come along with that on a CPU and break it there
    likelihoods      whether it tells how likely a text is
    """

    reads: str
    opens: str | None = None
    unread: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ("seq2seq", "causal-lm", "sequence-classification")
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ()
    extra: str | None = None
    apart: Mapping[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()
    likelihoods: bool = True

    @property
    def install_line(self) -> str:
        """The line that installs the packages; empty where there are none."""
        if not self.apart:
            return install_line(self.extra) if self.extra else ""
        return line_apart(self.apart["cuda"]) if has_gpu() else line_apart(self.apart["cpu"], self.unwanted)

    def missing(self) -> list[str]:
        """The packages that aren't installed here. Nothing is imported."""
        return lacking(self.packages)

    def require(self, name: str, interpreter: Interpreter | None = None) -> None:
        """Check that an engine of this name has its packages: here, or in the interpreter's environment.

        Raises MissingPackage with the line that installs them.
        """
        if interpreter is not None:
            try:
                interpreter.require(self.packages)
            except MissingPackage as error:
                raise MissingPackage(f"engine: {name}: python: {error}") from None
        elif missing := self.missing():
            raise MissingPackage(f"engine: {name} needs {', '.join(missing)}, not installed here. Install with: {self.install_line}")


@dataclass(frozen=True)
class Opening:
    """A model to open, and how.

    device    cpu or cuda
    threads   of the CPU
    runtime   the recipe's block, which only transformers heeds
    settings  the engine's own, as its `Settings` has them
    """

    source: Source
    device: str
    threads: int
    runtime: Runtime
    settings: Settings


@dataclass(frozen=True)
class Traits:
    """The traits of an opened model.

    dtype       what it computes in
    context     the most tokens that it takes; None where nothing bounds them
    vocabulary  the number of tokens
    encodes     whether a prompt goes into an encoder; else it stands before the answer
    generates   whether it writes; else it classifies
    start       the token that a decoder begins with
    end         the token that a classifier's input must end with, if any
    ends        the tokens that end a text
    labels      of a classifier, in its order
    queues      whether tokens are queued on a GPU, and so done later than the engine says
    changed     how many layers each runtime setting changed
    """

    dtype: str
    context: int | None
    vocabulary: int
    encodes: bool
    generates: bool
    start: int | None = None
    end: int | None = None
    ends: frozenset[int] = frozenset()
    labels: tuple[str, ...] = ()
    queues: bool = False
    changed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """What a model holds after its first step: bytes of its weights as stored in memory, bytes of buffers, and how many weights there are.

    reserved   bytes set aside for keys and values, used or not
    """

    weight_bytes: int
    buffer_bytes: int
    parameters: int
    reserved: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of text whose likelihood is asked for: token ids (n,), and the tokens to predict, -100 where none is.

    Without an encoder `labels` has the length of `ids`, and each is predicted from the tokens before it. With an encoder `ids` are its
    input and `labels` the answer.

    example  the index of its example
    begins   whether it begins the example
    """

    example: int
    ids: list[int]
    labels: list[int]
    begins: bool = True


@dataclass(frozen=True)
class Written:
    """Token ids written to each prompt, without end tokens, and remarks on them."""

    tokens: list[list[int]]
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One decode step, inspected outside the timed turns; the fields are those of `compress.results.sides.Step`."""

    weight_bytes: int
    cache_bytes: int
    flops: int
    prefill_flops: int | None
    seconds: float | None
    shares: dict[str, float]


@dataclass(frozen=True)
class Explained:
    """What the machine can do at best (bytes or operations a second, by name), and a step after each batch of prompts."""

    ceilings: dict[str, float]
    steps: list[Step]


class Engine(ABC):
    """A model and what runs it. The constructor imports what it needs and reads the tokenizer; `open` loads the weights."""

    tokenizer: "PreTrainedTokenizerBase"
    traits: Traits

    @abstractmethod
    def open(self) -> None:
        """Load the weights and make a first step, which may rearrange some. From then on there are `traits`.

        Raises ModelError for what it can't run.
        """

    @abstractmethod
    def weights(self) -> Weights:
        """What the model holds in memory."""

    def prepare(self, prompts: list[list[int]]) -> Any:
        """Prompts of one length as `run` takes them."""
        return prompts

    @abstractmethod
    def run(self, prepared: Any, new_tokens: int, watch: Callable[[], None]) -> None:
        """Write exactly `new_tokens` tokens to each prompt, the likeliest ones, and call `watch` when each is there; or classify once."""

    @abstractmethod
    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        """The model's answer to each prompt, up to its end."""

    def read(self, pieces: list[Piece], progress: Progress, original: Source | None = None) -> list[Likelihood]:
        """The likelihood of each piece and, where there is an `original`, the divergence from it.

        Raises ModelError where the engine can't, OutOfMemory where memory doesn't hold the original beside this model.
        """
        raise ModelError(f"{type(self).__module__.rpartition('.')[-1]} gives no likelihoods")

    def classify(self, prompts: list[list[int]], progress: Progress) -> list[int | None]:
        """The index of each prompt's label; None where scores are NaN."""
        raise ModelError(f"{type(self).__module__.rpartition('.')[-1]} classifies nothing")

    def why_no_divergence(self, original: Source) -> str | None:
        """Why distributions can't be compared with an original's; None where they can."""
        return "the engine gives no distributions"

    def own_generation(self) -> dict[str, str]:
        """The model's own generation config, which holds where the recipe leaves a setting out."""
        return {}

    def evaluate(self, task: str, samples: int | None) -> tuple[Samples, list[str]]:
        """Scores of a task of lm_eval, and remarks."""
        raise ModelError("lm_eval's tasks are for transformers")

    def explain(self, batches: Sequence[list[list[int]]], new_tokens: int, progress: Progress) -> Explained | None:
        """What a step after each batch of prompts does; None where the engine doesn't tell."""
        return None

    @contextmanager
    def cache_seen(self) -> Iterator[list[int]]:
        """Bytes of keys and values after each call of the model while the block runs; empty where the engine doesn't tell."""
        yield []


class EngineModule(Protocol):
    """The module of an engine, as its users see it."""

    __doc__: str | None
    ABOUT: About
    Settings: type[Settings]

    def make(self, opening: Opening, batch_tokens: int | None = None) -> Engine:
        """An engine, not opened yet. `batch_tokens` bounds a batch of examples with its answers; None takes what memory holds."""


def random_prompts(vocabulary: int, end: int | None, batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Random token ids (batch_size, prompt_tokens), always the same. The lowest ids, where special tokens mostly lie, are left out.

    end   the token that each row ends with, if any

    Raises MemoryError where memory doesn't hold them, before any is drawn.
    """
    bytearray(8 * batch_size * prompt_tokens)
    draw, low = random.Random(0), min(LOW, vocabulary - 1)
    rows = [[draw.randrange(low, vocabulary) for _ in range(prompt_tokens)] for _ in range(batch_size)]
    return rows if end is None else [[*row[:-1], end] for row in rows]


def batched(lengths: Sequence[int], tokens: int, progress: Progress, what: str, spread: int | None = None) -> Iterator[list[int]]:
    """Batches of rows of about equal length, longest first.

    lengths  tokens of each row
    tokens   the most that a batch holds, its padding included
    spread   by how many tokens the rows of a batch may differ at most
    """
    waiting = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while waiting:
        progress(what, len(lengths) - len(waiting), len(lengths))
        longest = lengths[waiting[0]]
        fit = max(1, tokens // longest)
        if spread is not None:
            fit = min(fit, sum(lengths[row] >= longest - spread for row in waiting))
        yield waiting[:fit]
        waiting = waiting[fit:]
    progress(what, len(lengths), len(lengths))


def nats(logits: "NDArray[np.float32]", labels: "NDArray[np.int64]") -> float:
    """Minus the log of the labels' probability, of logits (tokens, vocabulary) and labels (tokens,)."""
    import numpy as np

    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    logs = np.log(np.exp(wide).sum(axis=1)) - np.take_along_axis(wide, labels[:, None], axis=1)[:, 0]
    return float(logs.sum())


def names() -> tuple[str, ...]:
    """The names of the engines, from the files of this folder."""
    return methods.names("engines")


def find(name: str) -> EngineModule:
    """The engine of that name. The caller has checked that it is one of `names()`."""
    return cast(EngineModule, methods.find("engines", name))


def require(name: str, interpreter: Interpreter | None = None) -> EngineModule:
    """The engine, checked for its packages: here, or in the interpreter's environment.

    Raises MissingPackage with the line that installs them.
    """
    module = find(name)
    module.ABOUT.require(name, interpreter)
    return module


def code(name: str) -> list[Path]:
    """The source files of an engine."""
    module: ModuleType = cast(ModuleType, find(name))
    file = Path(str(module.__file__))
    return [Path(__file__), *(sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file])]
