"""Engines run models: one is a file or a folder here, found by its name, and the harness knows it by what stands in this file alone.

An engine knows token ids, and nothing of examples, clocks and verdicts. Whoever measures asks the same of each, so that what is served is
what is measured.
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

LOW = 10  # token ids below which special ones lie, most often


@dataclass(frozen=True)
class About:
    """What an engine can do and needs.

    reads            what it opens, in words
    opens            the `export` method whose folders it opens; None for folders of Hugging Face
    unread           the stages whose folders it doesn't open all the same
    tasks, devices   what it does, and where
    packages, extra  distributions that must be installed, and the extra of this package that installs them
    apart            what pip installs into an environment of its own, by device, where the engine doesn't go together with this package
    unwanted         what comes with that on a CPU, and doesn't go together with it there
    likelihoods      whether it tells how likely a given text is
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
        """The line that installs the packages; nothing where there are none."""
        if not self.apart:
            return install_line(self.extra) if self.extra else ""
        return line_apart(self.apart["cuda"]) if has_gpu() else line_apart(self.apart["cpu"], self.unwanted)

    def missing(self) -> list[str]:
        """The packages that aren't installed here. Nothing is imported."""
        return lacking(self.packages)

    def require(self, name: str, interpreter: Interpreter | None = None) -> None:
        """See that an engine of this name has its packages, in the environment of that interpreter where one is given.

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
    """What is to be opened, and how.

    device    cpu or cuda
    threads   of the CPU
    runtime   the recipe's, which is for transformers
    settings  the engine's own, as its `Settings` has them
    """

    source: Source
    device: str
    threads: int
    runtime: Runtime
    settings: Settings


@dataclass(frozen=True)
class Traits:
    """What an opened model is.

    dtype       what it computes in
    context     the most tokens that it takes; None where nothing bounds them
    vocabulary  how many tokens there are
    encodes     whether a prompt goes into an encoder, and not before the answer
    generates   whether it writes; else it classifies
    start       the token that a decoder begins with
    end         the token that an input to a classifier ends with, where it matters
    ends        the tokens that end a text
    labels      of a classifier, in its order
    queues      whether tokens are queued on a GPU, so that they are there later than the engine says
    changed     how many layers a setting of the runtime changed
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
    """What a model holds after its first step: bytes of its weights as they lie, of buffers that no file need hold; how many numbers.

    reserved   bytes that are kept ready for keys and values, whether or not there are any
    """

    weight_bytes: int
    buffer_bytes: int
    parameters: int
    reserved: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of text whose likelihood is asked for: token ids (n,), and for each the token to predict there, -100 where none is.

    Without an encoder `labels` has the length of `ids`, and each is predicted from those before it; behind an encoder `ids` are its input
    and `labels` the answer.

    example  which it belongs to
    begins   whether it begins the example
    """

    example: int
    ids: list[int]
    labels: list[int]
    begins: bool = True


@dataclass(frozen=True)
class Written:
    """Token ids written to each prompt, without end tokens, and what there is to say of them."""

    tokens: list[list[int]]
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One decode step, looked at apart from the timed turns, as `compress.results.sides.Step` has it."""

    weight_bytes: int
    cache_bytes: int
    flops: int
    prefill_flops: int | None
    seconds: float | None
    shares: dict[str, float]


@dataclass(frozen=True)
class Explained:
    """What the machine can do at best (bytes or operations a second, by name), and a step behind each batch of prompts."""

    ceilings: dict[str, float]
    steps: list[Step]


class Engine(ABC):
    """A model and what runs it. Making one imports what it needs and reads the tokenizer; weights come with `open`."""

    tokenizer: "PreTrainedTokenizerBase"
    traits: Traits

    @abstractmethod
    def open(self) -> None:
        """Bring the weights into memory and make a first step, at which some are laid out anew; `traits` are known from then on.

        Raises ModelError for what it can't run.
        """

    @abstractmethod
    def weights(self) -> Weights:
        """What is held."""

    def prepare(self, prompts: list[list[int]]) -> Any:
        """Prompts of one length as `run` takes them."""
        return prompts

    @abstractmethod
    def run(self, prepared: Any, new_tokens: int, watch: Callable[[], None]) -> None:
        """Write exactly `new_tokens` tokens to each prompt, the likeliest ones, and call `watch` when each is there; or classify once."""

    @abstractmethod
    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        """What the model writes to each prompt, until it ends."""

    def read(self, pieces: list[Piece], progress: Progress, original: Source | None = None) -> list[Likelihood]:
        """The likelihood of each piece, with the divergence from an original's where one is given.

        Raises ModelError where the engine can't, OutOfMemory where memory doesn't hold the original beside this model.
        """
        raise ModelError(f"{type(self).__module__.rpartition('.')[-1]} gives no likelihoods")

    def classify(self, prompts: list[list[int]], progress: Progress) -> list[int | None]:
        """The number of the label of each prompt; None where scores are no numbers."""
        raise ModelError(f"{type(self).__module__.rpartition('.')[-1]} classifies nothing")

    def why_no_divergence(self, original: Source) -> str | None:
        """Why distributions can't be compared with an original's; None where they can."""
        return "the engine gives no distributions"

    def own_generation(self) -> dict[str, str]:
        """What the model's own generation config says; it holds where the recipe says nothing."""
        return {}

    def evaluate(self, task: str, samples: int | None) -> tuple[Samples, list[str]]:
        """Scores of a task of lm_eval, and what there is to say."""
        raise ModelError("lm_eval's tasks are for transformers")

    def explain(self, batches: Sequence[list[list[int]]], new_tokens: int, progress: Progress) -> Explained | None:
        """What a step behind each batch of prompts does; None where the engine doesn't tell."""
        return None

    @contextmanager
    def cache_seen(self) -> Iterator[list[int]]:
        """Bytes of keys and values after each call of the model while the block runs; none where they aren't known."""
        yield []


class EngineModule(Protocol):
    """The module of an engine, as its users see it."""

    __doc__: str | None
    ABOUT: About
    Settings: type[Settings]

    def make(self, opening: Opening, batch_tokens: int | None = None) -> Engine:
        """Not open yet. `batch_tokens` bounds a batch of examples, what is to be written counted; None takes what memory holds."""


def random_prompts(vocabulary: int, end: int | None, batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Random token ids (batch_size, prompt_tokens), always the same; special ids are left out as far as they are low.

    end   what each row ends with, where it matters

    Raises MemoryError where so many numbers have no place, before any is drawn.
    """
    bytearray(8 * batch_size * prompt_tokens)
    draw, low = random.Random(0), min(LOW, vocabulary - 1)
    rows = [[draw.randrange(low, vocabulary) for _ in range(prompt_tokens)] for _ in range(batch_size)]
    return rows if end is None else [[*row[:-1], end] for row in rows]


def batched(lengths: Sequence[int], tokens: int, progress: Progress, what: str, spread: int | None = None) -> Iterator[list[int]]:
    """Rows of so many tokens in batches of about equally long ones, longest first, which hold at most so many tokens with their padding.

    spread   by how many tokens rows of a batch may differ at most
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
    """The engines, by the files of this folder."""
    return methods.names("engines")


def find(name: str) -> EngineModule:
    """The engine of that name. The caller has checked that it is one of `names()`."""
    return cast(EngineModule, methods.find("engines", name))


def require(name: str, interpreter: Interpreter | None = None) -> EngineModule:
    """The engine, its packages being there, in the environment of that interpreter where one is given.

    Raises MissingPackage with the line that installs them.
    """
    module = find(name)
    module.ABOUT.require(name, interpreter)
    return module


def code(name: str) -> list[Path]:
    """The files that an engine is made of."""
    module: ModuleType = cast(ModuleType, find(name))
    file = Path(str(module.__file__))
    return [Path(__file__), *(sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file])]
