"""The usage section of an artifact's card: code that loads and runs the model as it was measured, and what that must print.

Plain transformers, but for kernels that the recipe's runtime set. The code holds the report's first example whole.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import exports, methods
from compress.errors import printable
from compress.extras import requirements
from compress.metrics import GENERATED
from compress.model.loading import AUTO
from compress.recipe import Recipe
from compress.report.table import cell
from compress.results.report import Prediction, Report

READERS = {"gptq": "gptqmodel optimum", "bitsandbytes": "bitsandbytes accelerate"}  # what reads packed weights, not called as their format
LONGEST = 4000  # characters of an example that the code holds
LINE = 100  # characters of a piece of it
UNBOUND = 10**9  # tokens, from which on a tokenizer means that it has no limit
PLACEHOLDER = "A text."


@dataclass(frozen=True)
class Use:
    """How a model is to be run.

    task     of the recipe
    data, generation   the recipe's blocks, as plain data
    device   where it was measured
    packed   the format of its packed weights, by its config; empty where they aren't packed
    kernels  functions of this package that set the kernels it was run with
    longest  tokens of an input at most; None where nothing bounds it
    stops    whether the model's own generation config has strings to stop at
    likely   whether only a likelihood was measured
    """

    task: str
    data: dict[str, Any]
    generation: dict[str, Any]
    device: str
    packed: str
    kernels: list[str]
    longest: int | None
    stops: bool
    likely: bool


def section(recipe: Recipe, artifact: Path, report: Report | None) -> str:
    """Code that runs as it stands in the artifact's folder, with what it prints where a report has that."""
    use = _use(recipe, artifact, report)
    export, engine = exports.read(artifact), recipe.engine.module
    example = next((prediction for prediction in report.predictions if len(prediction.prompt) <= LONGEST), None) if report else None
    if export is not None:
        method = methods.find("export", export.format)
        return _in_its_engine(use, method, requirements(method.ABOUT.extra or ""), example, report)
    if hasattr(engine, "usage"):
        return _in_its_engine(use, engine, [engine.ABOUT.apart[use.device]], example, report)
    lines = [*_loaded(use), "", *_asked(use, example), *_printed(use, example is not None)]
    readers = READERS.get(use.packed, use.packed).split()
    packages = ["torch", "transformers", *readers, *(["accelerate"] if use.device != "cpu" else [])]
    install = f"    pip install {' '.join(map(shlex.quote, dict.fromkeys(packages)))}"
    if use.kernels:
        install += f"\n\nand compress, the package that made it: {' and '.join(f'`{name}`' for name in use.kernels)} sets the kernels."
    code = "```python\n" + "\n".join(lines) + "\n```"
    return "\n\n".join(["## How to load it", install, "In this folder, as it was measured:", code, *_promise(use, example, report)])


def _in_its_engine(use: Use, module: Any, packages: list[str], example: Prediction | None, report: Report | None) -> str:
    """The code of a folder that an engine of its own opens, as that engine's module or the format's has it."""
    install = f"    pip install transformers {' '.join(map(shlex.quote, packages))}"
    asked = [line for line in _asked(use, example) if not line.startswith(("inputs =", "labels =", "answer =", "target ="))]
    code = "```python\n" + "\n".join(module.usage(use.task, asked, use.generation["max_new_tokens"])) + "\n```"
    promise = [] if use.likely else _promise(use, example, report)
    return "\n\n".join(["## How to load it", install, "In this folder, as it was measured:", code, *promise])


def measured_with(recipe: Recipe, device: str) -> str:
    """The runtime in which figures were measured, where it isn't plain transformers; else nothing."""
    if not recipe.engine.is_plain:
        return str(recipe.engine.as_written())
    runtime = recipe.benchmark.runtime
    parts = ["int8 layers by `compress.use_cpu_int8`"] if runtime.cpu_int8 and device == "cpu" else []
    parts += ["2:4 layers by `compress.use_sparse_24`"] if runtime.sparse_24 and device == "cuda" else []
    parts += ["timed with a static cache"] if runtime.cache == "static" else []
    parts += ["timed steps compiled by torch.compile"] if runtime.compile else []
    return ", ".join(parts)


def _use(recipe: Recipe, artifact: Path, report: Report | None) -> Use:
    written, environment = recipe.as_written(), report.environment if report else {}
    task, generated, device = recipe.model.task, bool(GENERATED & set(recipe.groups)), environment.get("device", "cpu")
    packed = (_json(artifact / "config.json").get("quantization_config") or {}).get("quant_method") or ""
    runtime, longest = recipe.benchmark.runtime, environment.get("longest_input")
    kernels = ["use_cpu_int8"] if runtime.cpu_int8 and device == "cpu" and packed == "torchao" else []
    kernels += ["use_sparse_24"] if runtime.sparse_24 and device == "cuda" else []
    return Use(
        task=task, data=written["data"], generation=written["generation"], device=device, packed=packed, kernels=kernels,
        longest=longest if longest and longest < UNBOUND else None,
        stops=bool(_json(artifact / "generation_config.json").get("stop_strings")),
        likely="perplexity" in recipe.groups and not generated and task != "sequence-classification",
    )  # fmt: skip


def _loaded(use: Use) -> list[str]:
    auto = AUTO[use.task]
    where = '"."  # this folder, or the model\'s id on the hub'
    device = "" if use.device == "cpu" else f', device_map="{use.device}"'
    side = ', truncation_side="left"' if use.data["shots"] and use.longest and use.task != "causal-lm" else ""
    return [
        "import torch",
        f"from transformers import {auto}, AutoTokenizer",
        *(["", "import compress"] if use.kernels else []),
        "",
        f"place = {where}",
        f"tokenizer = AutoTokenizer.from_pretrained(place{side})",
        f'model = {auto}.from_pretrained(place, dtype="auto"{device})',
        *(f"compress.{function}(model)" for function in use.kernels),
        *(["model.config.pad_token_id = tokenizer.pad_token_id"] if use.task == "sequence-classification" else []),
    ]


def _asked(use: Use, example: Prediction | None) -> list[str]:
    """The input, as token ids of one row."""
    lines = _literal("prompt", example.prompt if example else PLACEHOLDER)
    text, special = "prompt", ""
    if use.data["chat"]:
        turn = '[{"role": "user", "content": prompt}]'
        lines.append(f"text = tokenizer.apply_chat_template({turn}, tokenize=False, add_generation_prompt=True)")
        text, special = "text", ", add_special_tokens=False"
    plain = use.task == "causal-lm" and use.data["text"] is None
    cut = f", truncation=True, max_length={use.longest}" if use.longest and use.task != "causal-lm" else ""
    lines.append(f"ids = tokenizer({text}{special}{cut}).input_ids")
    if plain:
        lines.append("ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids  # it is to go on")
    if use.longest and use.task == "causal-lm" and not (use.likely and plain):
        lines.append(f"ids = ids[{f'-{use.longest}:' if use.data['shots'] else f':{use.longest}'}]")
    if use.likely and use.data["text"] is None:
        lines += _literal("target", example.references[0] if example and example.references else PLACEHOLDER)
        special = "" if use.task == "seq2seq" else ", add_special_tokens=False"
        lines.append(f"answer = tokenizer(text_target=target{special}).input_ids")
    return [*lines, *_inputs(use)]


def _inputs(use: Use) -> list[str]:
    inputs = "inputs = torch.tensor([ids], device=model.device)"
    if not use.likely:
        return [inputs]
    if use.data["text"] is not None:
        return [inputs, "labels = inputs"]
    if use.task == "seq2seq":
        return [inputs, "labels = torch.tensor([answer], device=model.device)"]
    return [
        "inputs = torch.tensor([ids + answer], device=model.device)",
        "labels = torch.tensor([[-100] * len(ids) + answer], device=model.device)",
    ]


def _printed(use: Use, measured: bool) -> list[str]:
    """What is made of the input."""
    if use.likely:
        result = "loss = model(inputs, labels=labels).loss"
        shown = 'print(f"{loss.exp().item():.4g}")  # perplexity'
    elif use.task == "sequence-classification":
        result = "label = model(inputs).logits.argmax().item()"
        shown = "print(model.config.id2label[label])"
    else:
        settings = {key: value for key, value in use.generation.items() if value is not None and key != "seed"}
        arguments = ", ".join(["attention_mask=torch.ones_like(inputs)", *(f"{key}={value!r}" for key, value in settings.items())])
        result = f"output = model.generate(inputs, {arguments}{', tokenizer=tokenizer' if use.stops else ''})"
        new = "output[0, len(ids) :]" if use.task == "causal-lm" else "output[0]"
        first = f".split({use.data['shot_separator']!r})[0].strip()" if use.data["shots"] else ""
        shown = f"print(tokenizer.decode({new}, skip_special_tokens=True).strip(){first})"
    return ["with torch.no_grad():", f"    {result}", shown]


def _promise(use: Use, example: Prediction | None, report: Report | None) -> list[str]:
    """What the code prints, or why that can't be foretold."""
    if report is None or not report.predictions:
        return []
    if example is None:
        return [f"All of the report's examples are longer than {LONGEST:,} characters, so none of them stands here."]
    name = f"The prompt is example {cell(example.id[:100])} of the report"
    if use.generation["do_sample"] and example.candidate is not None:
        return [f"{name}. Its output was drawn, and transformers draws another."]
    expected = example.candidate
    if expected is None and use.likely and example.candidate_score is not None and not (use.data["stride"] or use.data.get("join")):
        expected = f"{example.candidate_score:.4g}"
    if expected is None:
        return []
    if report.environment.get("inputs_cut") and use.longest:
        name += f", if it is no longer than {use.longest:,} tokens (longer ones were cut within, and this code cuts at an end)"
    if not expected:
        return [f"{name}, for which the code prints an empty line, as the report has it."]
    shown = "\n".join(f"    {line}" for line in printable(expected).split("\n"))
    return [f"{name}, for which the code prints what the report has:", shown]


def _literal(name: str, text: str) -> list[str]:
    """Python that assigns a text to a name: printable, in short lines, with nothing that Markdown or HTML would act upon."""
    pieces = re.findall(rf"(?s:.{{1,{LINE}}}(?:\s|\Z)|.{{1,{LINE}}})", text) or [""]
    written = [repr(piece).replace("`", r"\x60").replace("<", r"\x3c") for piece in pieces]
    return [f"{name} = {written[0]}"] if len(written) == 1 else [f"{name} = (", *(f"    {piece}" for piece in written), ")"]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
