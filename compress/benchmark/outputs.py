"""A model's answers to the examples, kept: the same model is asked the same only once. Times and memory are never kept."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from compress import decoding, engines, rouge, scores, scripts
from compress.benchmark.messages import Loaded, Outputs
from compress.border import plain
from compress.data import examples_digest
from compress.files import whole_folder
from compress.methods import Example
from compress.model.source import Source, fingerprint
from compress.packages import versions
from compress.recipe import ChosenEngine, Recipe, digest

HERE = Path(__file__).parent
CODE = (  # besides the engine's own
    *(HERE / f"{part}.py" for part in ("messages", "quality", "scorer", "worker")),
    HERE.parent / "products.py",  # which imports torch
    *(Path(str(module.__file__)) for module in (decoding, rouge, scores, scripts)),
)
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "torchao",
    "bitsandbytes",
    "compressed-tensors",
    "rouge-score",
    "sacrebleu",
    "regex",
    "lm-eval",
)
MACHINE = ("device", "gpu", "cuda", "cpu", "cpu_instructions", "cores")  # of the environment that a worker tells


def name(
    source: Source,
    recipe: Recipe,
    examples: list[Example],
    loaded: Loaded,
    original: Source | None = None,
    engine: ChosenEngine | None = None,
) -> str:
    """A name for outputs, from all that they depend on: the model's content, examples, prompt, generation, code, versions, machine.

    original   the model whose distributions are compared with, if any
    engine     what the model runs in; None for the recipe's
    loaded     only those runtime settings count that changed layers; the threads of timings don't
    """
    data, environment, chosen = recipe.data, loaded.environment, engine or recipe.engine
    packages, interpreter = [*PACKAGES, *chosen.about.packages], recipe.interpreter(chosen)
    code = hashlib.sha256(b"".join(file.read_bytes() for file in [*CODE, *engines.code(chosen.name)])).hexdigest()
    return digest(
        [
            fingerprint(source), original and fingerprint(original), examples_digest(examples), recipe.groups,
            asdict(recipe.tokenizers), recipe.generation.model_dump(),
            [data.chat, data.max_tokens, data.stride, data.join, data.samples, data.seed, data.shots, data.shot_separator],
            sorted(setting for setting, layers in loaded.traits.changed.items() if layers), {key: environment[key] for key in MACHINE},
            versions(packages), interpreter and interpreter.versions(packages), code,
            chosen.as_written(), loaded.traits.dtype,
        ]
    )  # fmt: skip


def find(folder: Path, name: str) -> Outputs | None:
    """The outputs of that name, with a remark that they are of a former run; None where there are none. A damaged file is removed."""
    file = folder / name / "outputs.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["digest"] != digest(kept["outputs"]):
            raise ValueError
        outputs = msgspec.convert(kept["outputs"], Outputs)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        shutil.rmtree(file.parent, ignore_errors=True)
        return None
    return replace(outputs, remarks=[f"outputs and scores were taken from a former run ({name})", *outputs.remarks])


def keep(folder: Path, name: str, outputs: Outputs) -> None:
    """Write outputs, all or nothing."""
    content = plain(outputs)
    with whole_folder(folder / name) as partial:
        (partial / "outputs.json").write_text(json.dumps({"digest": digest(content), "outputs": content}), encoding="utf-8")
