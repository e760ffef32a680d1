"""A recipe's file becomes a Recipe: overrides, blocks that are a file's name, stages each with the settings of its method."""

import os
from copy import copy
from pathlib import Path
from typing import Any

from compress import methods, yamlfile
from compress.errors import printable
from compress.mistakes import Problems, suggest
from compress.recipe.agreement import agree, gate_problem
from compress.recipe.blocks import PLAIN, Benchmark, ChosenEngine, Gate, Recipe, Stage

PACKAGE = Path(__file__).parent.parent
OURS = ("artifacts", "searches", "sweeps")  # what stands beside recipes' folders of reports
LONGEST = 200  # bytes of a recipe's file name
NAMED: dict[str, Any] = {"benchmark": "standard", "check": {}}  # blocks that may be a file's name, with their defaults


def shipped() -> Path:
    """The recipes that come with the package."""
    inside, beside = PACKAGE / "recipes", PACKAGE.parent / "recipes"
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
        for key, other in (("engine", "engines"), ("engines", "engine")):
            if assignment.startswith(f"{key}="):
                document.data.pop(other, None)
    data = dict(document.data)
    written = data.pop("stages", [])
    chosen: dict[str, Any] = {key: data.pop(key) for key in ("engine", "engines") if key in data}
    data.update({key: _named(key, document, file.parent, problems) for key in NAMED})
    recipe = problems.validate(Recipe, data, document, ())
    stages = _stages(written, document, problems)
    engines = _engines(chosen, document, problems)
    problems.end()
    assert recipe is not None
    if file.stem in OURS:
        problems.add(document, (), f"a recipe can't be called {file.stem}, a folder beside the reports; rename the file", "the file")
    if file.stem != printable(file.stem) or "\n" in file.stem or len(os.fsencode(file.name)) > LONGEST:
        rule = f"UTF-8 without control characters, at most {LONGEST} bytes"
        problems.add(document, (), f"a recipe's name is that of its reports: {rule}; rename the file", "the file")
    recipe._stages, recipe._engines, recipe._file, recipe._document = stages, engines, file, document
    agree(recipe, document, problems)
    problems.end()
    return recipe


def load_gates(path: str | Path) -> dict[str, Gate]:
    """Gates from a file of their own, metric: limits, or shipped ones by their bare name (`mlperf-99`).

    Raises RecipeError with every mistake, a line each.
    """
    document, problems = yamlfile.read(_found(path, shipped() / "checks")), Problems()
    gates: dict[str, Gate] = {}
    for name, block in document.data.items():
        if gate := problems.validate(Gate, block, document, (name,)):
            gates[name] = gate
            if problem := gate_problem(name, gate):
                problems.add(document, (name,), problem)
    problems.end()
    return gates


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
    names = sorted({f.stem for place in places for f in place.glob("*.yaml")})
    problems.add(document, (key,), f"there is no {key} {value!r}{suggest(value, names)}")
    return {}


def _stages(written: Any, document: yamlfile.Document, problems: Problems) -> tuple[Stage, ...]:
    if not isinstance(written, list):
        problems.add(document, ("stages",), "a list is expected, each entry like `- quantize: int8_dynamic`")
        return ()
    stages = [_stage(item, index, document, problems) for index, item in enumerate(written)]
    return tuple(stage for stage in stages if stage is not None)


def _stage(item: Any, index: int, document: yamlfile.Document, problems: Problems) -> Stage | None:
    place: yamlfile.Place = ("stages", index)
    families = [key for key in item if key in methods.FAMILIES] if isinstance(item, dict) else []
    if len(families) != 1:
        contents = f"this one has {', '.join(map(repr, item)) or 'nothing'}" if isinstance(item, dict) else f"this is {item!r}"
        choices = " or ".join(f"`{family}: method`" for family in methods.FAMILIES)
        problems.add(document, place, f"{choices} is expected in each stage; {contents}")
        return None
    family, method = families[0], item[families[0]]
    if method not in methods.names(family):
        problems.add(document, (*place, family), f"there is no method {method!r}{suggest(method, methods.names(family))}")
        return None
    rest = {key: value for key, value in item.items() if key != family}
    prefix = f"stages[{index}] ({family}: {method})"
    settings = problems.validate(methods.find(family, method).Settings, rest, document, place, prefix)
    return None if settings is None else Stage(family=family, method=method, settings=settings)


def _engines(written: dict[str, Any], document: yamlfile.Document, problems: Problems) -> tuple[ChosenEngine, ...]:
    """Those under `engines`, or the one under `engine`: each a name, or a mapping with its `name` and settings."""
    if len(written) > 1:
        problems.add(document, ("engines",), "engine and engines mean the same; give one of the two")
        return ()
    ((key, value),) = written.items() or (("engine", PLAIN),)
    items = value if key == "engines" else [value]
    if not isinstance(items, list) or not items:
        problems.add(document, (key,), "a list of engines is expected, such as [transformers, ctranslate2]")
        return ()
    places: list[yamlfile.Place] = [(key, index) if key == "engines" else (key,) for index in range(len(items))]
    engines = [_engine(item, place, document, problems) for item, place in zip(items, places, strict=True)]
    names = [engine.name for engine in engines if engine is not None]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.add(document, places[index], f"{name} stands twice")
    return tuple(engine for engine in engines if engine is not None)


def _engine(item: Any, place: yamlfile.Place, document: yamlfile.Document, problems: Problems) -> ChosenEngine | None:
    block = {"name": item} if isinstance(item, str) else item
    if not isinstance(block, dict) or not isinstance(name := block.get("name"), str):
        problems.add(document, place, "the name of an engine is expected, or a mapping with its name and settings")
        return None
    if name not in (engines := methods.names("engines")):
        problems.add(document, place, f"there is no engine {name!r}{suggest(name, engines)}")
        return None
    python = block.get("python")
    if not (python is None or (isinstance(python, str) and python)):
        problems.add(document, (*place, "python"), f"{python!r}: the interpreter of an environment is expected, such as ../env/bin/python")
        return None
    rest = {key: value for key, value in block.items() if key not in ("name", "python")}
    settings = problems.validate(methods.find("engines", name).Settings, rest, document, place, f"engine: {name}")
    return None if settings is None else ChosenEngine(name=name, settings=settings, python=python)


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
    engine = {"anyOf": [{"enum": list(methods.names("engines"))}, {"type": "object", "required": ["name"]}]}
    document["properties"]["engine"] = {**engine, "default": PLAIN, "description": "what both models are measured in"}
    document["properties"]["engines"] = {"type": "array", "items": engine, "description": "several, with a verdict in each"}
    for key, default in NAMED.items():
        document["properties"][key] = {
            "anyOf": [document["properties"][key], {"type": "string"}],
            "default": default,
            "description": f"the name of a file under {key}s/, or the block itself",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress recipe", **document}
