"""The mistakes of a recipe that show before any work: in its model's folder, in its data files, and in what is installed here.

It loads no torch and fetches nothing; hub ids are listed as not looked at. It reads a model's config.json and the headers of its weights,
and the first rows of a data file.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress import data, decoding, methods, rows
from compress.errors import CompressError, DataError, InputError, MissingPackage, ModelError
from compress.extras import install_line
from compress.forecast.plan import read_config, widths
from compress.methods import Task, TuneSettings
from compress.metrics import GENERATED, TASK
from compress.model.source import Source, locate
from compress.packages import lacking
from compress.recipe import Recipe, Stage
from compress.scripts import PACKAGES
from compress.yamlfile import Place, dotted

CLASSIFIES = "ForSequenceClassification"
WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")  # where a template may lie besides the config


@dataclass
class Sight:
    """What was seen of a recipe's surroundings.

    mistakes   a line each: file, line, key, what is wrong
    seen       what was looked at, and how much of it
    unseen     what lies on the hub
    """

    recipe: Recipe
    mistakes: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    _kinds: set[type[CompressError]] = field(default_factory=set)

    def add(self, place: Place, error: CompressError) -> None:
        """Note a mistake that belongs to a key."""
        key = dotted(place)
        self.mistakes.append(f"{self.recipe.at(place)}: {key}: {str(error).removeprefix(f'{key}: ')}")
        self._kinds.add(type(error))

    def end(self) -> None:
        """Raise all mistakes at once, if there are any."""
        if self.mistakes:
            raise (self._kinds.pop() if len(self._kinds) == 1 else InputError)("\n".join(self.mistakes))


def look(recipe: Recipe, stages: bool = True) -> Sight:
    """Look at all that a run of the recipe needs. Without `stages`, another model is measured, so neither model nor stages matter."""
    sight = Sight(recipe)
    if stages:
        _look_at_model(sight, recipe.model.id, ("model",))
        for index, stage in enumerate(recipe.stages):
            _look_at_stage(sight, stage, ("stages", index))
            follower = recipe.stages[index + 1].family if index + 1 < len(recipe.stages) else None
            if any(engine.is_plain for engine in recipe.engines) if follower is None else follower != "export":
                _look_at_readers(sight, stage, ("stages", index))
        _look_at_widths(sight)
    _look_at_measuring(sight)
    for purpose in _purposes(recipe, stages):
        _look_at_split(sight, purpose)
    sight.seen, sight.unseen = list(dict.fromkeys(sight.seen)), list(dict.fromkeys(sight.unseen))
    return sight


def _look_at_model(sight: Sight, id: str, place: Place) -> None:
    recipe = sight.recipe
    try:
        folder = Path(locate(id, recipe.folder))
        if not folder.is_dir():
            sight.unseen.append(id)
            return
        config = read_config(folder)
    except ModelError as error:
        sight.add((*place, "id"), error)
        return
    sight.seen.append(f"{folder} (config and headers)")
    if problem := task_problem(config, recipe.model.task):
        sight.add((*place, "task") if place == ("model",) else place, ModelError(f"{folder / 'config.json'}: {problem}"))
    if place == ("model",) and GENERATED & set(recipe.groups):
        try:
            decoding.check(Source(str(folder), recipe.model.task), recipe.generation.do_sample and recipe.generation.temperature is None)
        except ModelError as error:
            sight.add(("model", "id"), error)
    if place == ("model",) and recipe.data.chat and not _has_template(folder):
        sight.add(("data", "chat"), DataError("the model's tokenizer has no chat template; write out the prompt and leave out chat"))


def task_problem(config: dict[str, Any], task: Task) -> str | None:
    """Why the class that a config names doesn't serve a task, as far as its name tells; None where it does or the name doesn't tell."""
    names = [str(name) for name in config.get("architectures") or []]
    both = config.get("is_encoder_decoder")
    serves: Task
    if any(name.endswith(CLASSIFIES) for name in names):
        serves = "sequence-classification"
    elif not any(name.endswith(WRITES) for name in names):
        return None if task != "sequence-classification" or not names else f"names {', '.join(names)}, which has no head that classifies"
    elif both:
        serves = "seq2seq"
    elif any(name.endswith(WRITES[:2]) for name in names):
        serves = "causal-lm"
    else:  # models of images and text have such names, too
        return None if task != "sequence-classification" else f"names {', '.join(names)}, which has no head that classifies"
    return None if serves == task else f"names {', '.join(names)}, which is for task {serves}, not for {task}"


def _has_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in TEMPLATES):
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, RecursionError):
        return True  # loading says what is wrong with it


def _look_at_stage(sight: Sight, stage: Stage, place: Place) -> None:
    try:
        methods.require(stage.family, stage.method, stage.settings)
    except MissingPackage as error:
        sight.add((*place, stage.family), error)
    for role, other in stage.settings.models().items():
        _look_at_model(sight, other.id, (*place, role))


def _look_at_readers(sight: Sight, stage: Stage, place: Place) -> None:
    """Whether the packages are here by which transformers reads a stage's artifact."""
    readers = stage.settings.readers()
    if missing := lacking(readers):
        problem = (
            f"transformers reads its artifact by {', '.join(missing)}, not installed here; measure it in another engine (`compress"
            f" engines`), or install with: {install_line(*(readers[package] for package in missing))}"
        )
        sight.add((*place, stage.family), MissingPackage(problem))


def _look_at_widths(sight: Sight) -> None:
    """Whether the model's layers have shapes that the next format can hold."""
    recipe, columns = sight.recipe, widths(sight.recipe)
    if any(stage.method == "structured" for stage in recipe.stages):  # the shapes are others then
        return
    for index, (before, stage) in enumerate(pairwise(recipe.stages), 1):
        if why := stage.settings.why_not_behind(str(before), before.settings, columns):
            sight.add(("stages", index), ModelError(f"`{stage}`: {why}"))
    if not recipe.stages or (last := recipe.stages[-1]).family == "export":
        return
    for form in {engine.about.opens for engine in recipe.engines} - {None}:
        if why := methods.find("export", form).Settings().why_not_behind(str(last), last.settings, columns):
            sight.add(("engine",), ModelError(f"export: {form}: {why}"))


def _look_at_measuring(sight: Sight) -> None:
    """Packages of engines, lm_eval for its tasks, the C++ compiler that torch.compile calls."""
    recipe, compiler = sight.recipe, os.environ.get("CXX", "g++")
    if recipe.benchmark.runtime.compile and shutil.which(compiler) is None:
        problem = (
            f"torch.compile calls the C++ compiler {compiler}, which isn't here; install it "
            "(apt-get install g++), name another in the environment variable CXX, or leave compile out"
        )
        sight.add(("benchmark", "runtime", "compile"), MissingPackage(problem))
    if (package := PACKAGES.get(recipe.tokenizers.bleu)) and find_spec(package[0]) is None:
        problem = (
            f"bleu's tokenizer {recipe.tokenizers.bleu} needs packages that aren't here; char needs none. Install with: "
            f"{install_line(package[1])}"
        )
        sight.add(("metrics",), MissingPackage(problem))
    for engine in recipe.engines:
        try:
            engine.about.require(engine.name, recipe.interpreter(engine))
        except MissingPackage as error:
            sight.add(("engine",), error)
    if any(group.startswith(TASK) for group in recipe.groups) and find_spec("lm_eval") is None:
        problem = f"lm_eval's tasks need lm-eval, not installed here. Install with: {install_line('lm_eval')}"
        sight.add(("metrics",), MissingPackage(problem))


def _purposes(recipe: Recipe, stages: bool) -> Iterator[str]:
    """The purposes that examples are needed for."""
    yield "evaluation"
    checked = recipe.stages if stages else ()
    if recipe.data.shots or any(stage.needs_examples for stage in checked):
        yield "train"
    if any(isinstance(stage.settings, TuneSettings) and stage.settings.early_stopping for stage in checked):
        yield "validation"


def _look_at_split(sight: Sight, purpose: str) -> None:
    """Whether the first rows of a split make examples."""
    recipe, settings = sight.recipe, sight.recipe.data
    split = settings.splits.get(purpose)  # type: ignore[call-overload]
    if split is None:
        what = "the benchmark" if purpose == "evaluation" else "a stage"
        sight.add(("data", "splits"), DataError(f"names no split for {purpose}, which {what} needs; it has {', '.join(settings.splits)}"))
        return
    try:
        place = rows.locate(settings, recipe.folder, split)
        if isinstance(place, rows.HubSplit):
            rows.require_datasets(place)
            sight.unseen.append(place.id)
            return
        table = rows.head(place, data.HEAD)
    except (DataError, MissingPackage) as error:
        sight.add(("data", "source"), error)
        return
    if table.rows and (missing := list(data.missing(settings, table))):
        for key, problem in missing:
            sight.add(("data", key), DataError(problem))
        return
    try:
        data.look(settings, table, purpose)
    except DataError as error:
        sight.add(("data",), error)
    else:
        sight.seen.append(f"{place} ({'all' if table.whole else 'the first'} {len(table.rows):,} rows)")
