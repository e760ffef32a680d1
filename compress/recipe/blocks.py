"""The blocks of a recipe as typed data: each key, what it allows, its default and what it means."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from compress import methods
from compress.interpreter import Interpreter
from compress.methods import Dtype, Settings, Task
from compress.metrics import GROUPS
from compress.recipe.scoring import Scoring, tokenizers
from compress.scripts import Tokenizers, choose
from compress.yamlfile import Document, Place

Count = Annotated[int, Field(ge=1, le=2**40)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Plain = str | bool | int | float
PLAIN = "transformers"  # the default engine, and the one that others are held against


class Model(Settings):
    """The model to compress: a hub id, a folder, or `builtin`."""

    id: str = Field(min_length=1, description="hub id, folder (relative to the recipe), or builtin")
    task: Task
    dtype: Dtype = Field("auto", description="the dtype that both sides are loaded in; auto is the stored one")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")


class Data(Settings):
    """Where the examples come from and how a row becomes one."""

    source: str = Field(min_length=1, description="hub id, a file or folder of jsonl, json, csv or parquet, or builtin")
    subset: str | None = Field(None, description="the configuration of a hub data set")
    splits: dict[Literal["train", "validation", "evaluation"], str] = Field(
        {"train": "train", "evaluation": "test"}, description="which split of the source serves which purpose"
    )
    prompt: str | None = Field(None, description="the model's input; {field} stands for a row's field")
    target: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="the reference or references; a field may hold a list"
    )
    text: str | None = Field(None, description="plain text for perplexity, instead of prompt and target")
    where: dict[str, Plain | Annotated[list[Plain], Field(min_length=1)]] = Field(
        {},
        description="the rows to use: for each field its value, or a list of values that it may have; a row must match in all fields",
    )
    empty: Literal["skip", "refuse"] = Field(
        "skip",
        description="for rows in which a field in use is empty, or the whole text, prompt or target is blank: skip counts them and"
        " leaves them out, refuse stops",
    )
    join: str | None = Field(
        None,
        description='joins the texts by this (papers have "\\n\\n" for wikitext) into one stream that perplexity reads in windows of'
        " max_tokens or the context. samples counts these windows; null reads each text by itself",
    )
    chat: bool = Field(False, description="wrap the prompt in the tokenizer's chat template, as a user's turn")
    stride: Count | None = Field(
        None,
        description="reads texts that are too long in windows, each so many tokens further; null cuts them at their end. Joined texts are"
        " always read in windows: with null, each begins where the one before ends",
    )
    shots: int = Field(0, ge=0, le=1000, description="examples of the train split, drawn with the seed, that stand before each prompt")
    shot_separator: str = Field("\n\n", min_length=1, description="the text behind each of them")
    samples: Count | None = Field(500, description="evaluation examples, drawn with the seed; null takes all")
    max_tokens: Count | None = Field(None, description="longest input in tokens; null takes the model's context")
    seed: Seed = 0

    @field_validator("prompt", "target", "text")
    @classmethod
    def _template(cls, value: str | list[str] | None) -> str | list[str] | None:
        for template in [value] if isinstance(value, str) else value or []:
            if not template.strip():
                raise ValueError("is empty; a field of a row is expected, such as {text}")
            fields(template)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "Data":
        if (self.text is None) == (self.prompt is None):
            raise ValueError("either text or prompt is expected, one of the two")
        if self.text is not None and (self.target is not None or self.chat):
            raise ValueError("text stands alone: target and chat go with prompt")
        if self.stride is not None and self.text is None:
            raise ValueError("stride is for text, which may be longer than the model's context")
        if self.join is not None and self.text is None:
            raise ValueError("join is for text, whose rows make one stream")
        if self.shots and (self.target is None or "train" not in self.splits):
            raise ValueError("shots are prompts with their targets from the train split; target and splits.train are expected")
        return self


class Generation(Settings):
    """How text is generated for the quality metrics; the same on both sides."""

    max_new_tokens: Count = 64
    num_beams: Count = 1
    do_sample: bool = False
    temperature: float | None = Field(None, gt=0)
    top_k: Count | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: Seed = 0

    @model_validator(mode="after")
    def _sampling(self) -> "Generation":
        sampling_keys = [key for key in ("temperature", "top_k", "top_p") if getattr(self, key) is not None]
        if sampling_keys and not self.do_sample:
            raise ValueError(f"{', '.join(sampling_keys)} only count with do_sample: true")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample: true draws single outputs, and num_beams is {self.num_beams}; give one of the two")
        return self


class Calibration(Settings):
    """What calibrated methods see, drawn from the train split."""

    samples: Count = 128
    max_tokens: Count = 512
    seed: Seed = 0


class Runtime(Settings):
    """How the models are run, both alike, where plain transformers isn't how they will be deployed."""

    cpu_int8: bool = Field(
        False, description="on a CPU, int8 layers by FBGEMM's kernels, as compress.use_cpu_int8(model) sets them, not torchao's"
    )
    sparse_24: bool = Field(
        False, description="on a GPU, layers pruned 2:4 by sparse tensor cores, as compress.use_sparse_24(model) sets them"
    )
    cache: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="static: keys and values of timed generations in tensors of their final length, as transformers' static cache",
    )
    compile: bool = Field(
        False, description="timed decode steps (of a classifier, forward passes) by torch.compile; compiling is reported apart from timings"
    )


class Benchmark(Settings):
    """What is timed. A round starts a fresh process for each side; in it the sides take turns, on a CPU in slices of 0.05 s.

    Every turn times `iterations` generations at each point of batch_sizes x prompt_tokens. Intervals rest on the rounds: after the
    first few, more follow until each point's latency ratio is known to `precision`, or until `max_minutes` are over.
    """

    batch_sizes: list[Count] = Field([1, 8], min_length=1)
    prompt_tokens: list[Count] = Field([128, 512], min_length=1)
    new_tokens: Annotated[int, Field(ge=2)] = 32
    rounds: Count = Field(5, description="the fewest rounds; three suffice where gates on speed and memory are clear, or time is over")
    precision: float | None = Field(
        0.02, gt=0, lt=1, description="half the interval of each latency ratio, as a share of the ratio; null takes just `rounds`"
    )
    max_minutes: float = Field(
        10,
        gt=0,
        le=100_000,
        description="no round starts after so many minutes; points too slow for three rounds in that time are left out",
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="of intervals, and so of every gate")
    turns: Count = Field(
        9,
        description="the fewest turns of a round, if time allows; with a precision more are taken, for as long as starting took",
    )
    iterations: Count = Field(1, description="timings at each point that follow each other in a turn; what disturbs one disturbs the next")
    warmup: Annotated[int, Field(ge=0)] = 2
    quality_batch_tokens: Count | None = Field(
        None, description="tokens of one batch of quality examples, padding and output counted; null takes what free memory holds"
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="CPU threads of timings; null: all there are, as for examples"
    )
    runtime: Runtime = Runtime()
    limit_minutes: float = Field(
        60, gt=0, le=100_000, description="the longest that one request to a measuring process may take, its rests not counted"
    )

    @property
    def points(self) -> list[tuple[int, int]]:
        """The grid of batch sizes and prompt tokens, smallest first."""
        return [(batch, prompt) for prompt in sorted(set(self.prompt_tokens)) for batch in sorted(set(self.batch_sizes))]


class Gate(Settings):
    """Limits on one metric of the candidate. Differences are in the metric's unit, ratios are candidate / baseline."""

    max_drop: float | None = Field(None, description="may be lower than the baseline by at most this")
    max_rise: float | None = Field(None, description="may be higher than the baseline by at most this")
    max_ratio: float | None = Field(None, gt=0)
    min_ratio: float | None = Field(None, gt=0)
    max: float | None = Field(None, description="at most this, whatever the baseline has")
    min: float | None = Field(None, description="at least this, whatever the baseline has")

    @model_validator(mode="after")
    def _some(self) -> "Gate":
        if not self.model_fields_set:
            raise ValueError(f"a limit is expected: {', '.join(type(self).model_fields)}")
        return self


class Stage(BaseModel):
    """One step of the line: a family, a method of it and that method's own settings."""

    family: str
    method: str
    settings: SerializeAsAny[Settings]

    @property
    def needs_examples(self) -> bool:
        """Whether it can't do without examples of the train split."""
        return methods.find(self.family, self.method).ABOUT.calibrated or self.settings.needs_examples()

    def as_written(self) -> dict[str, Any]:
        return {self.family: self.method, **self.settings.model_dump(mode="json")}

    def __str__(self) -> str:
        return f"{self.family}: {self.method}"


class ChosenEngine(BaseModel):
    """An engine in which both models are measured, with its own settings; `python` is the interpreter of an environment of its own."""

    model_config = ConfigDict(frozen=True)

    name: str
    settings: SerializeAsAny[Settings]
    python: str | None = None

    @property
    def module(self) -> Any:
        """The engine's file, as `compress.engines.EngineModule` has it."""
        return methods.find("engines", self.name)

    @property
    def about(self) -> Any:
        """The engine's ABOUT."""
        return self.module.ABOUT

    @property
    def is_plain(self) -> bool:
        """Whether it is transformers, in which everything can be measured."""
        return self.name == PLAIN

    def as_written(self) -> str | dict[str, Any]:
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        settings |= {"python": self.python} if self.python else {}
        return {"name": self.name, **settings} if settings else self.name


class Recipe(Settings):
    """A whole recipe."""

    version: Literal[1]
    model: Model
    data: Data
    metrics: Annotated[list[str | Scoring], Field(min_length=1)] | None = Field(
        None,
        description=f"any of {', '.join(GROUPS)}, and lm_eval:NAME for lm_eval's tasks; `rouge: {{tokenizer: words}}` in a name's place"
        " says how texts are cut; null takes those that fit the task",
    )
    generation: Generation = Field(default_factory=Generation)
    calibration: Calibration = Field(default_factory=Calibration)
    benchmark: Benchmark = Field(default_factory=Benchmark)
    check: dict[str, Gate] = Field({}, description="metric: limits, or the name of a file under checks/; what decides the verdict")

    _stages: tuple[Stage, ...] = ()  # read apart, each with the settings of its method
    _engines: tuple[ChosenEngine, ...] = ()  # likewise; transformers where there is none
    _file: Path = Path("recipe.yaml")
    _tokenizers: Tokenizers | None = None  # those that the references have decided on
    _document: Document | None = None  # where its keys stand

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    @property
    def engines(self) -> tuple[ChosenEngine, ...]:
        """What both models are measured in, each with a verdict of its own."""
        return self._engines or (ChosenEngine(name=PLAIN, settings=Settings()),)

    @property
    def engine(self) -> ChosenEngine:
        """The first of them."""
        return self.engines[0]

    def in_engine(self, engine: ChosenEngine) -> "Recipe":
        """The same recipe, measured in that engine only."""
        recipe = self.model_copy()
        recipe._engines = (engine,)
        return recipe

    def interpreter(self, engine: ChosenEngine) -> Interpreter | None:
        """What runs an engine in an environment of its own. A link to another Python is kept, since Python finds its packages by it."""
        if engine.python is None:
            return None
        return Interpreter(Path(os.path.abspath(self.folder / os.path.expanduser(engine.python))))  # noqa: PTH100, PTH111

    def with_stages(self, stages: Sequence[Stage]) -> "Recipe":
        """The same recipe with other stages."""
        recipe = self.model_copy()
        recipe._stages = tuple(stages)
        return recipe

    @property
    def name(self) -> str:
        """The file's name without its ending; no part of the digest."""
        return self._file.stem

    @property
    def folder(self) -> Path:
        """Where relative paths begin; no part of the digest."""
        return self._file.parent

    def at(self, place: Place) -> str:
        """Where a key stands, for messages."""
        return self.name if self._document is None else self._document.at(place)

    def called(self, name: str) -> "Recipe":
        """The same recipe under another name."""
        recipe = self.model_copy()
        recipe._file = self._file.resolve().with_name(f"{name}.yaml")
        return recipe

    @property
    def tokenizers(self) -> Tokenizers:
        """What metrics on texts cut them with; `auto` until the references have decided. No part of the digest."""
        return self._tokenizers or tokenizers(self.metrics or [])

    def decided_by(self, references: Sequence[Sequence[str]]) -> "Recipe":
        """The same recipe with the tokenizers that suit these references."""
        recipe = self.model_copy()
        recipe._tokenizers = choose(self.tokenizers, references)
        return recipe

    def as_written(self) -> dict[str, Any]:
        """The recipe as plain data, defaults filled in."""
        engines = [engine.as_written() for engine in self.engines]
        measured = {} if engines == [PLAIN] else {"engines": engines}
        return {**self.model_dump(mode="json"), "stages": [stage.as_written() for stage in self.stages], **measured}

    @property
    def digest(self) -> str:
        return digest(self.as_written())

    @property
    def groups(self) -> tuple[str, ...]:
        """The metric groups to measure."""
        if self.metrics is not None:
            return tuple(entry if isinstance(entry, str) else entry.group for entry in self.metrics)
        if self.model.task == "sequence-classification":
            return ("accuracy", "f1")
        return ("perplexity",) if self.data.text is not None else ("rouge", "generated_tokens")


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fields(template: str) -> list[str]:
    """The fields that a template names. Raises ValueError for anything but plain {name}."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; a literal brace is written {{{{ or }}}}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ValueError(f"{{{name}}} is not a plain field such as {{dialogue}}; a literal brace is written {{{{ or }}}}")
    return [name for _, name, _, _ in parts if name is not None]
