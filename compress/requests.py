"""The requests to working processes besides measuring, and their answers. Both sides import these records; none needs torch."""

from dataclasses import dataclass, field
from typing import Any

from compress.border import Request
from compress.methods import Example
from compress.model.source import Source


@dataclass(frozen=True)
class Shown:
    """What a stage may see.

    examples     of the train split
    validation   what early stopping evaluates
    max_tokens   each example's longest input
    chat         prompts are a user's turns
    """

    examples: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    max_tokens: int = 512
    chat: bool = False


@dataclass(frozen=True)
class Make(Request[None]):
    """Make the artifact of one stage in the folder `target`, which appears whole or not at all.

    settings   the method's, as plain data
    scratch    a folder for checkpoints, which the method creates
    cache      a folder for what other stages can use, which the method creates
    models     what it may load besides the source: `original`, the recipe's model, and those that its settings name
    processes  how many get this request, to do the stage together; the first makes the artifact
    """

    answer = None

    source: Source
    family: str
    method: str
    settings: dict[str, Any]
    shown: Shown
    target: str
    device: str
    scratch: str | None = None
    cache: str | None = None
    models: dict[str, Source] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class Inspect(Request[dict[str, Any]]):
    """Inspect a model in inputs of so many tokens (None: 128, or all that fit); the answer is an `Inspection` without the model's name."""

    answer = dict[str, Any]

    source: Source
    device: str
    batch_size: int = 1
    tokens: int | None = None


@dataclass(frozen=True)
class SeeTemplate(Request[None]):
    """See that a model's chat template works; raises what is wrong with it."""

    answer = None

    source: Source
