"""Write recipe.md beside this file from the recipe's JSON schema.

python docs/make_recipe_reference.py
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from compress import methods
from compress.recipe import schema

PAGE = Path(__file__).with_name("recipe.md")
BLOCKS = {"model": "Model", "data": "Data", "generation": "Generation", "calibration": "Calibration", "benchmark": "Benchmark"}
METRICS = {"rouge": "Rouge", "bleu": "Bleu"}
PARTS = ("EarlyStopping", "OtherModel", "Student", "StackLayers", "Stacks")  # blocks within a stage
SHARED = 3  # methods that have a key alike, from which on it stands in the table of all
HEAD = """# A recipe, key by key

Made from the schema by `python docs/make_recipe_reference.py`; the schema itself, for editors:

    compress schema > recipe.schema.json

A recipe is YAML. Unknown keys are mistakes, and `compress validate` names each by file, line and key, and what is wrong with the
model and the data where they lie here. Keys whose default is "none" have to be given. Paths are relative to the recipe's file. Any key
can be overridden where a recipe is run: `--set stages.0.bits=3`.
"""

Row = tuple[str, str, str, str]


def page() -> str:
    """The whole page as Markdown."""
    whole = schema()
    parts = whole["$defs"]
    for value in whole["properties"].values():
        if "$ref" in value:
            value["description"] = parts[value["$ref"].rsplit("/", 1)[-1]]["description"].partition("\n")[0]
    lines = [HEAD, *_table(_rows(whole))]
    for key, name in BLOCKS.items():
        lines += ["", f"## {key}", "", _about(parts[name]), "", *_table(_rows(parts[name]))]
    lines += ["", "### benchmark.runtime", "", _about(parts["Runtime"]), "", *_table(_rows(parts["Runtime"]))]
    lines += [
        "",
        "## engine",
        "",
        "What both models are measured in: a name, or a mapping with its `name` and settings; `engines` is a list of several, with a"
        " verdict in each. See [serving.md](serving.md).",
    ]
    for name in methods.names("engines"):
        module = methods.find("engines", name)
        lines += ["", f"### engine: {name}", "", (module.__doc__ or "").split("\n")[0]]
        if properties := module.Settings.model_json_schema().get("properties"):
            lines += ["", *_table(_rows({"properties": properties}))]
    lines += [
        "",
        "## check",
        "",
        "A block a metric, each with one limit or more.",
        "",
        _about(parts["Gate"]),
        "",
        *_table(_rows(parts["Gate"])),
    ]
    lines += [
        "",
        "## metrics",
        "",
        "A list of names. In a name's place may stand the metric with its tokenizer: `rouge: {tokenizer: words}`.",
    ]
    for key, name in METRICS.items():
        lines += ["", f"### metrics.{key}", "", _about(parts[name]), "", *_table(_rows(parts[name]))]
    return "\n".join([*lines, *_stages(whole["properties"]["stages"]["items"]["anyOf"], parts)]) + "\n"


def _stages(stages: list[dict[str, Any]], parts: dict[str, Any]) -> list[str]:
    """Every method's own keys; before them those that several have alike."""
    rows = {stage["title"]: [row for row in _rows(stage) if row[0] not in methods.FAMILIES] for stage in stages}
    times = Counter(row[:3] for keys in rows.values() for row in keys)  # whatever their meanings' words
    alike: dict[tuple[str, ...], Row] = {}
    for row in (row for keys in rows.values() for row in keys if times[row[:3]] >= SHARED):
        alike[row[:3]] = max(row, alike.get(row[:3], row), key=lambda candidate: len(candidate[3]))
    lines = ["", "## stages", "", "A list; each entry names a family and a method of it, and has that method's keys beside."]
    lines += ["", "### Keys that several methods have", "", *_table(alike.values())]
    for stage in stages:
        keys = rows[stage["title"]]
        lines += ["", f"### {stage['title']}", "", stage["description"], ""]
        if own := [row for row in keys if row[:3] not in alike]:
            lines += [*_table(own), ""]
        if shared := [f"`{row[0]}`" for row in keys if row[:3] in alike]:
            lines += [f"{'Also ' if own else ''}{', '.join(shared)}, as above."]
    for name in PARTS:
        lines += ["", f"### {name}", "", _about(parts[name]), "", *_table(_rows(parts[name]))]
    return [line for line, after in zip(lines, [*lines[1:], "end"], strict=True) if line or after]


def _about(block: dict[str, Any]) -> str:
    return " ".join(block.get("description", "").split())


def _rows(block: dict[str, Any]) -> list[Row]:
    return [_row(key, value, block) for key, value in block["properties"].items()]


def _row(key: str, value: dict[str, Any], block: dict[str, Any]) -> Row:
    default = f"`{_yaml(value['default'])}`" if "default" in value else "see there"
    if isinstance(value.get("default"), dict) and len(value["default"]) > 2:
        default = "see there"
    if key in block.get("required", []):
        default = "none"
    return key, _kind(value), default, value.get("description", "")


def _kind(value: dict[str, Any]) -> str:
    """What a key may be, in words."""
    if "$ref" in value:
        name = str(value["$ref"]).rsplit("/", 1)[-1]
        place = next(
            (key for key, block in BLOCKS.items() if block == name),
            {"Runtime": "benchmarkruntime", "Gate": "check", "Scoring": "metrics"}.get(name, name.lower()),
        )
        return f"[{name}](#{place})"
    if "const" in value:
        return f"`{_yaml(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{_yaml(choice)}`" for choice in value["enum"])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(kind) for kind in value["anyOf"]))
    if value.get("type") == "array":
        return f"list of {_kind(value['items'])}" if "anyOf" not in value["items"] or len(value["items"]["anyOf"]) < 4 else "list"
    if value.get("type") == "object":
        inside = value.get("additionalProperties")
        return f"a key each: {_kind(inside)}" if isinstance(inside, dict) else "block"
    return str(value["type"]) + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    """from 1, above 0, below 1; the largest counts say nothing and are left out."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    bounds = [f"{word} {value[key]:,}" for key, word in words.items() if key in value and value[key] < 2**31]
    return f" {' '.join(bounds)}" if bounds else ""


def _yaml(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _table(rows: Any) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *(f"| `{key}` | {' | '.join(rest)} |" for key, *rest in cells)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
