"""Checks across the blocks of a recipe: whether stages, data, metrics and gates fit the task and each other."""

from collections.abc import Iterator

from compress import methods, yamlfile
from compress.methods import Task, TuneSettings
from compress.metrics import CLASSIFIED, GENERATED, GROUPS, METRICS, READ, TASK
from compress.mistakes import Problems, suggest
from compress.recipe.blocks import ChosenEngine, Gate, Recipe, Runtime


def agree(recipe: Recipe, document: yamlfile.Document, problems: Problems) -> None:
    """Add a problem for all that doesn't fit together."""
    for index, stage in enumerate(recipe.stages[:-1]):
        follower = recipe.stages[index + 1]
        if why := follower.settings.why_not_behind(str(stage), stage.settings):
            problems.add(document, ("stages", index + 1), f"`{follower}`: {why}")
        carried = follower.family == "export" and stage.family != "export"
        if methods.find(stage.family, stage.method).ABOUT.packs and not carried:
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
    named = recipe.groups if recipe.metrics else ()
    for index, group in enumerate(named):
        place = ("metrics", index)
        if group in named[:index]:
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
    for index, engine in enumerate(recipe.engines):
        for why_not in _engine_problems(recipe, engine):
            problems.add(document, ("engines", index) if "engines" in document.data else ("engine",), f"{engine.name}: {why_not}")
    if problem := _runtime_problem(recipe.benchmark.runtime, task):
        problems.add(document, ("benchmark",), f"runtime: {problem}")
    needs_target = not text and {group for group in recipe.groups if not group.startswith(TASK)} - {"generated_tokens"}
    if needs_target and recipe.data.target is None:
        problems.add(document, ("data",), f"target is missing; {', '.join(sorted(needs_target))} can't be measured without")
    measured = {name for group in recipe.groups for name in GROUPS.get(group, ())}
    for name, gate in recipe.check.items():
        if problem := gate_problem(name, gate) or _unmeasured(name, measured, recipe.groups):
            problems.add(document, ("check", name), problem)


def _engine_problems(recipe: Recipe, engine: ChosenEngine) -> Iterator[str]:
    """Why a recipe can't be measured in an engine."""
    about, last = engine.about, recipe.stages[-1] if recipe.stages else None
    if recipe.model.task not in about.tasks:
        yield f"it is for task {' and '.join(about.tasks)}, not for {recipe.model.task}"
    if last is not None and last.family == "export" and last.method != about.opens:
        yield f"it opens no {last.method}, which `{last}` writes; take the engine that does"
    if last is not None and str(last) in about.unread:
        yield f"it doesn't open what `{last}` writes; take another method or engine"
    if engine.is_plain:
        return
    carried = None if last is None or last.family == "export" or about.opens is None else methods.find("export", about.opens)
    if last is not None and carried is not None and (why := carried.Settings().why_not_behind(str(last), last.settings)):
        yield why
    if recipe.benchmark.runtime != Runtime():
        yield "benchmark.runtime is for transformers; leave it out"
    if recipe.generation.do_sample and set(recipe.groups) & GENERATED:
        yield "generation.do_sample: no two engines draw alike; leave it out"
    unknown = [group for group in recipe.groups if group.startswith(TASK) or group == "divergence"]
    unknown += [] if about.likelihoods else sorted(READ & set(recipe.groups) - {"divergence"})
    if unknown:
        yield f"{', '.join(unknown)} can't be measured in it; leave out, or measure in transformers"


def _runtime_problem(runtime: Runtime, task: Task) -> str | None:
    """Which of these settings exclude each other or the task."""
    if runtime.cache == "static" and task == "sequence-classification":
        return "cache: static is for models that write, a classifier has none; leave it out"
    if runtime.compile and runtime.cache != "static" and task != "sequence-classification":
        return "compile: true needs cache: static; transformers compiles steps only over a cache of fixed length"
    if runtime.compile and runtime.cpu_int8:
        return "compile and cpu_int8 exclude each other: torch.compile can't look into FBGEMM's packed weights; leave one out"
    return None


def _unmeasured(name: str, measured: set[str], groups: tuple[str, ...]) -> str | None:
    """A gate on what a recipe doesn't measure."""
    if name.startswith(TASK):
        if not any(name.startswith(f"{group}:") for group in groups):
            return f"{name} isn't measured by this recipe; put {':'.join(name.split(':')[:2])} under metrics"
    elif (group := next((group for group, names in GROUPS.items() if name in names), None)) and name not in measured:
        return f"{name} isn't measured by this recipe; put {group} under metrics"
    return None


def gate_problem(name: str, gate: Gate) -> str | None:
    """What is wrong with a gate, whatever is measured."""
    if name not in METRICS:
        return f"{name!r} is not a metric{suggest(name, tuple(METRICS))}"
    metric = METRICS[name]
    if metric.better == "lower" and gate.max_drop is not None:
        return f"max_drop makes no sense, {name} is better lower; use max_rise or max_ratio"
    if metric.better == "higher" and gate.max_rise is not None:
        return f"max_rise makes no sense, {name} is better higher; use max_drop or min_ratio"
    return None
