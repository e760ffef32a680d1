"""A recipe: which model, which data, which stages, how it is measured and what it must still be able to do.

Reading one is pure: no network, no torch, no environment variables. Every mistake is found at once and named by file,
line and key. `Recipe.digest` names a run, since what a run depends on is all in the recipe.
"""

import hashlib
import json
import os
from copy import copy
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator

from compress import methods, yamlfile
from compress.errors import printable
from compress.methods import Dtype, Settings, Task, TuneSettings
from compress.metrics import CLASSIFIED, GENERATED, GROUPS, METRICS, TASK
from compress.mistakes import Problems, suggest

OURS = ("artifacts", "searches", "sweeps")  # what stands beside recipes' folders of reports
LONGEST = 200  # bytes of a recipe's file name
NAMED: dict[str, Any] = {"benchmark": "standard", "check": {}}  # blocks that may be a file's name; what stands where nothing is said
Count = Annotated[int, Field(ge=1, le=2**40)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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
    prompt: str | None = Field(None, description="what the model is given; {field} stands for a row's field")
    target: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="the reference or references; a field may hold a list"
    )
    text: str | None = Field(None, description="plain text for perplexity, instead of prompt and target")
    chat: bool = Field(False, description="wrap the prompt in the tokenizer's chat template, as a user's turn")
    stride: Count | None = Field(
        None, description="texts that are too long are read in windows, each so many tokens further; null cuts them at their end"
    )
    shots: int = Field(0, ge=0, le=1000, description="examples of the train split, drawn with the seed, that stand before each prompt")
    shot_separator: str = Field("\n\n", min_length=1, description="what stands behind each of them")
    samples: Count | None = Field(500, description="evaluation examples, drawn with the seed; null takes all")
    max_tokens: Count | None = Field(None, description="longest input in tokens; null takes the model's context")
    seed: Seed = 0

    @field_validator("prompt", "target", "text")
    @classmethod
    def _template(cls, value: str | list[str] | None) -> str | list[str] | None:
        for template in [value] if isinstance(value, str) else value or []:
            fields(template)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "Data":
        if (self.text is None) == (self.prompt is None):
            raise ValueError("either text or prompt is wanted, one of the two")
        if self.text is not None and (self.target is not None or self.chat):
            raise ValueError("text stands alone: target and chat go with prompt")
        if self.stride is not None and self.text is None:
            raise ValueError("stride is for text, which may be longer than the model's context")
        if self.shots and (self.target is None or "train" not in self.splits):
            raise ValueError("shots are prompts with their targets from the train split; target and splits.train are wanted")
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
        given = [key for key in ("temperature", "top_k", "top_p") if getattr(self, key) is not None]
        if given and not self.do_sample:
            raise ValueError(f"{', '.join(given)} only count with do_sample: true")
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
    """What is timed. A round starts a fresh process for each side; in a round the sides take turns, on a CPU in slices of 0.05 s.

    Every turn times `iterations` generations at each point of batch_sizes x prompt_tokens. Rounds are what intervals rest on: after the
    first few, more follow until each point's latency ratio is known to `precision`, or until `max_minutes` are over.
    """

    batch_sizes: list[Count] = Field([1, 8], min_length=1)
    prompt_tokens: list[Count] = Field([128, 512], min_length=1)
    new_tokens: Annotated[int, Field(ge=2)] = 32
    rounds: Count = Field(5, description="the fewest; fewer where the gates on speed and memory are clear beyond doubt before")
    precision: float | None = Field(
        0.02, gt=0, lt=1, description="half the interval of each latency ratio, as a share of it; null takes just `rounds`"
    )
    max_minutes: float = Field(10, gt=0, le=100_000, description="no further round begins after so many minutes of rounds")
    confidence: float = Field(0.95, ge=0.5, lt=1, description="of intervals, and so of every gate")
    turns: Count = Field(9, description="the fewest of a round; with a precision it takes more, for as long as its processes took to start")
    iterations: Count = Field(1, description="timings at each point that follow each other in a turn; what disturbs one disturbs the next")
    warmup: Annotated[int, Field(ge=0)] = 2
    quality_batch_tokens: Count | None = Field(
        None, description="tokens of one batch of quality examples, padding and output counted; null takes what free memory holds"
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="CPU threads; null takes all that the process may use")
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
            raise ValueError(f"a limit is wanted: {', '.join(type(self).model_fields)}")
        return self


class Stage(BaseModel):
    """One step of the line: a family, a method of it and that method's own settings."""

    family: str
    method: str
    settings: SerializeAsAny[Settings]

    def as_written(self) -> dict[str, Any]:
        return {self.family: self.method, **self.settings.model_dump(mode="json")}

    def __str__(self) -> str:
        return f"{self.family}: {self.method}"


class Recipe(Settings):
    """The whole of it."""

    version: Literal[1]
    model: Model
    data: Data
    metrics: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description=f"any of {', '.join(GROUPS)}, and lm_eval:NAME for lm_eval's tasks; null takes those that fit the task"
    )
    generation: Generation = Field(default_factory=Generation)
    calibration: Calibration = Field(default_factory=Calibration)
    benchmark: Benchmark = Field(default_factory=Benchmark)
    check: dict[str, Gate] = Field({}, description="metric: limits, or the name of a file under checks/; what decides the verdict")

    _stages: tuple[Stage, ...] = ()  # read apart, each with the settings of its method
    _file: Path = Path("recipe.yaml")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    @property
    def name(self) -> str:
        """The file's name without its ending; no part of the digest."""
        return self._file.stem

    @property
    def folder(self) -> Path:
        """Where relative paths begin; no part of the digest."""
        return self._file.parent

    def called(self, name: str) -> "Recipe":
        """The same under another name."""
        found = self.model_copy()
        found._file = self._file.resolve().with_name(f"{name}.yaml")
        return found

    def as_written(self) -> dict[str, Any]:
        """The recipe as plain data, defaults filled in."""
        return {**self.model_dump(mode="json"), "stages": [stage.as_written() for stage in self.stages]}

    @property
    def digest(self) -> str:
        return digest(self.as_written())

    @property
    def groups(self) -> tuple[str, ...]:
        """The metric groups to measure."""
        if self.metrics is not None:
            return tuple(self.metrics)
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


def shipped() -> Path:
    """The recipes that come with the package."""
    inside, beside = Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else beside


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by its bare name (`quickstart`).

    Raises RecipeError with every mistake, a line each.
    """
    file = _found(path, shipped())
    document, problems = yamlfile.read(file), Problems()
    for assignment in overrides:
        for key in NAMED:
            if assignment.startswith(f"{key}."):  # one key of a block that is given by its name
                document.data[key] = _named(key, document, file.parent, problems)
        document.override(assignment)
    data = dict(document.data)
    written = data.pop("stages", [])
    data.update({key: _named(key, document, file.parent, problems) for key in NAMED})
    recipe = problems.validate(Recipe, data, document, ())
    stages = _stages(written, document, problems)
    problems.end()
    assert recipe is not None
    if file.stem in OURS:
        problems.add(document, (), f"a recipe can't be called {file.stem}, a folder beside the reports; rename the file", "the file")
    if file.stem != printable(file.stem) or "\n" in file.stem or len(os.fsencode(file.name)) > LONGEST:
        wanted = f"UTF-8 without control characters, at most {LONGEST} bytes"
        problems.add(document, (), f"a recipe's name is that of its reports: {wanted}; rename the file", "the file")
    recipe._stages, recipe._file = stages, file
    _agree(recipe, document, problems)
    problems.end()
    return recipe


def load_gates(path: str | Path) -> dict[str, Gate]:
    """Gates from a file of their own, metric: limits, or shipped ones by their bare name (`mlperf-99`).

    Raises RecipeError with every mistake, a line each.
    """
    document, problems = yamlfile.read(_found(path, shipped() / "checks")), Problems()
    found: dict[str, Gate] = {}
    for name, block in document.data.items():
        if gate := problems.validate(Gate, block, document, (name,)):
            found[name] = gate
            if problem := _gate_problem(name, gate):
                problems.add(document, (name,), problem)
    problems.end()
    return found


def _found(path: str | Path, among: Path) -> Path:
    """The file itself, or where there is none the shipped one of that bare name."""
    file = Path(path)
    if not os.path.exists(file) and file.name == str(file) and os.path.exists(among / f"{file}.yaml"):  # noqa: PTH110 - no error for odd names
        return among / f"{file}.yaml"
    return file


def _named(key: str, document: yamlfile.Document, folder: Path, problems: Problems) -> Any:
    """A block of the recipe; a name stands for <key>s/<name>.yaml beside the recipe or among the shipped ones."""
    value = document.data.get(key, copy(NAMED[key]))  # an override writes into it
    if not isinstance(value, str):
        return value
    places = [folder / f"{key}s", shipped() / f"{key}s"]
    for place in places:
        file = place / f"{value}.yaml"
        if Path(value).name == value and len(value) < 100 and file.is_file():
            other = yamlfile.read(file)
            blocks = [(Benchmark, other.data, ())] if key == "benchmark" else [(Gate, gate, (name,)) for name, gate in other.data.items()]
            for kind, block, where in blocks:
                problems.validate(kind, block, other, where)
            return other.data if not problems.lines else {}
    known = sorted({f.stem for place in places for f in place.glob("*.yaml")})
    problems.add(document, (key,), f"there is no {key} {value!r}{suggest(value, known)}")
    return {}


def _stages(written: Any, document: yamlfile.Document, problems: Problems) -> tuple[Stage, ...]:
    if not isinstance(written, list):
        problems.add(document, ("stages",), "a list is wanted, each entry like `- quantize: int8_dynamic`")
        return ()
    stages = [_stage(item, index, document, problems) for index, item in enumerate(written)]
    return tuple(stage for stage in stages if stage is not None)


def _stage(item: Any, index: int, document: yamlfile.Document, problems: Problems) -> Stage | None:
    place: yamlfile.Place = ("stages", index)
    families = [key for key in item if key in methods.FAMILIES] if isinstance(item, dict) else []
    if len(families) != 1:
        found = f"this one has {', '.join(map(repr, item)) or 'nothing'}" if isinstance(item, dict) else f"this is {item!r}"
        wanted = " or ".join(f"`{family}: method`" for family in methods.FAMILIES)
        problems.add(document, place, f"{wanted} is wanted in each stage; {found}")
        return None
    family, method = families[0], item[families[0]]
    if method not in methods.names(family):
        problems.add(document, (*place, family), f"there is no method {method!r}{suggest(method, methods.names(family))}")
        return None
    rest = {key: value for key, value in item.items() if key != family}
    prefix = f"stages[{index}] ({family}: {method})"
    settings = problems.validate(methods.find(family, method).Settings, rest, document, place, prefix)
    return None if settings is None else Stage(family=family, method=method, settings=settings)


def _agree(recipe: Recipe, document: yamlfile.Document, problems: Problems) -> None:
    """What no block can see alone."""
    for index, stage in enumerate(recipe.stages[:-1]):
        if methods.find(stage.family, stage.method).ABOUT.packs:
            follower = recipe.stages[index + 1]
            problems.add(
                document, ("stages", index + 1), f"`{follower}` can't follow `{stage}`, whose output is packed: make that the last stage"
            )
    task, text = recipe.model.task, recipe.data.text is not None
    for index, stage in enumerate(recipe.stages):
        if task not in (fit := methods.find(stage.family, stage.method).ABOUT.tasks):
            problems.add(document, ("stages", index, stage.family), f"{stage.method} is for task {' and '.join(fit)}, not for {task}")
        if index == 0 and (why := stage.settings.why_not_first()):
            problems.add(document, ("stages", index), f"`{stage}`: {why}")
        if isinstance(stage.settings, TuneSettings) and (stopping := stage.settings.early_stopping):
            place: yamlfile.Place = ("stages", index, "early_stopping")
            if "validation" not in recipe.data.splits:
                problems.add(document, place, "data.splits names no split for validation, which is what it looks at")
            if stopping.metric == "rougeL" and (recipe.data.target is None or task == "sequence-classification"):
                problems.add(document, (*place, "metric"), "rougeL is for tasks that generate and data with a target; loss suits any")
    if text and task != "causal-lm":
        problems.add(document, ("data", "text"), f"text is for task causal-lm; {task} wants prompt and target")
    if recipe.data.shots and task == "sequence-classification":
        problems.add(document, ("data", "shots"), "shots are for tasks that generate; a classifier was trained to its task")
    for index, group in enumerate(recipe.metrics or []):
        place = ("metrics", index)
        if group in (recipe.metrics or [])[:index]:
            problems.add(document, place, f"{group} stands twice")
        if group.startswith(TASK) and len(group) > len(TASK):
            if task == "sequence-classification":
                problems.add(document, place, f"{group}: lm_eval's tasks are for models that generate")
        elif group not in GROUPS:
            problems.add(document, place, f"{group!r} is not a metric group{suggest(group, tuple(GROUPS))}")
        elif (group in CLASSIFIED) != (task == "sequence-classification"):
            problems.add(document, place, f"{group} can't be measured on task {task}")
        elif group in GENERATED and text:
            problems.add(document, place, f"{group} needs prompt and target; data has text")
    if problem := _runtime_problem(recipe.benchmark.runtime, task):
        problems.add(document, ("benchmark",), f"runtime: {problem}")
    needs_target = not text and {group for group in recipe.groups if not group.startswith(TASK)} - {"generated_tokens"}
    if needs_target and recipe.data.target is None:
        problems.add(document, ("data",), f"target is missing; {', '.join(sorted(needs_target))} can't be measured without")
    measured = {name for group in recipe.groups for name in GROUPS.get(group, ())}
    for name, gate in recipe.check.items():
        if problem := _gate_problem(name, gate) or _unmeasured(name, measured, recipe.groups):
            problems.add(document, ("check", name), problem)


def _runtime_problem(runtime: Runtime, task: Task) -> str | None:
    """What can't be run so."""
    if runtime.cache == "static" and task == "sequence-classification":
        return "cache: static is for models that write, a classifier has none; leave it out"
    if runtime.compile and runtime.cache != "static" and task != "sequence-classification":
        return "compile: true needs cache: static; transformers compiles steps over a cache of fixed length alone"
    if runtime.compile and runtime.cpu_int8:
        return "compile and cpu_int8 exclude each other: torch.compile can't look into FBGEMM's packed weights; leave one out"
    return None


def _unmeasured(name: str, measured: set[str], groups: tuple[str, ...]) -> str | None:
    """A gate on what a recipe doesn't measure."""
    if name.startswith(TASK):
        if not any(name.startswith(f"{group}:") for group in groups):
            return f"{name} isn't measured by this recipe; put {':'.join(name.split(':')[:2])} under metrics"
    elif METRICS[name].kind == "quality" and name not in measured:
        group = next(group for group, names in GROUPS.items() if name in names)
        return f"{name} isn't measured by this recipe; put {group} under metrics"
    return None


def _gate_problem(name: str, gate: Gate) -> str | None:
    """What is wrong with a gate whatever is measured."""
    if name not in METRICS:
        return f"{name!r} is not a metric{suggest(name, tuple(METRICS))}"
    metric = METRICS[name]
    if metric.better == "lower" and gate.max_drop is not None:
        return f"max_drop makes no sense, {name} is better lower; use max_rise or max_ratio"
    if metric.better == "higher" and gate.max_rise is not None:
        return f"max_rise makes no sense, {name} is better higher; use max_drop or min_ratio"
    return None


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, the settings of every method included."""
    document = Recipe.model_json_schema()
    stages = []
    for family, name, method in methods.everyone():
        block = method.Settings.model_json_schema()
        document["$defs"].update(block.pop("$defs", {}))
        block["properties"] = {family: {"const": name}, **block.get("properties", {})}
        block["required"] = [family, *block.get("required", [])]
        stages.append({**block, "title": f"{family}: {name}", "description": (method.__doc__ or "").split("\n")[0]})
    document["properties"]["stages"] = {
        "type": "array", "items": {"anyOf": stages}, "default": [], "description": "what is done to the model, in this order",
    }  # fmt: skip
    for key, default in NAMED.items():
        document["properties"][key] = {
            "anyOf": [document["properties"][key], {"type": "string"}],
            "default": default,
            "description": f"the name of a file under {key}s/, or the block itself",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress recipe", **document}
