"""CTranslate2's format: T5, BART, Marian, Pegasus, Llama and more, for its engine on CPUs and GPUs; in floats, or in 8 bits a row.

Weights keep their exact integers where each row lies on a symmetric grid of 8 bits or fewer, as after `quantize: rtn` with
`group_size: -1`. With `weights: int8` all others are rounded to nearest in 255 steps. The engine rounds the inputs of layers in 8 bits
token by token, as it runs.
"""

import copy
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import methods
from compress.errors import ModelError
from compress.export._beside import save_beside
from compress.export._dense import dense
from compress.exports import Export
from compress.methods import About, Context, Task
from compress.model.loading import Bundle, parameter_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

ABOUT = About(
    at_run_time="layers in 8 bits have their inputs rounded token by token, and multiply with the CPU's or GPU's own instructions for it",
    packages=("ctranslate2",),
    extra="ctranslate2",
    packs=True,
    smaller=False,
    tasks=("seq2seq", "causal-lm"),
)
FOLDER = "ctranslate2"
LARGEST = 128  # of the integers that 8 bits hold
ON_GRID = 1e-3  # of a step: how far float32 may put a number off the grid


class Settings(methods.Settings):
    weights: Literal["auto", "float32", "float16", "bfloat16", "int8"] = Field(
        "auto", description="auto: in 8 bits what lies on such a grid by row already, all else in float32; int8: all matrices in 8 bits"
    )

    def why_not_behind(self, stage: str, before: methods.Settings, columns: Collection[int] = ()) -> str | None:
        grid = {name: getattr(before, name, None) for name in ("bits", "symmetric", "group_size")}
        if self.weights != "auto" or grid["bits"] is None or (grid["symmetric"] and grid["group_size"] == -1):
            return None
        return f"it holds 8 bits or fewer a row, symmetric; in `{stage}` give group_size: -1 and symmetric: true, or here weights: int8"


PLAIN = Settings(weights="float32")  # what a baseline is measured in


@dataclass(frozen=True)
class Exported(Bundle):
    """A model that is saved in the engine's format."""

    weights: str = "auto"
    say: Callable[[str], None] = print

    def save(self, folder: Path) -> None:
        save_beside(self.model, self.tokenizer, folder)
        parameters = parameter_count(self.model)  # the converter takes the model apart
        stored = _convert(self, folder / FOLDER, self.weights)
        integers = stored["kept"] + stored["rounded"]
        if integers:
            whole = integers + stored["floats"]
            self.say(
                f"of {whole:,} weights {stored['kept'] / whole:.1%} keep their integers, {stored['rounded'] / whole:.1%} were rounded to"
                f" 8 bits a row, {stored['floats'] / whole:.1%} stay floats"
            )
        floats = self.weights if self.weights in ("float16", "bfloat16") else "float32"
        Export("ctranslate2", [f"{FOLDER}/model.bin"], "int8" if integers > stored["floats"] else floats, parameters).write(folder)


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model, to be saved for the engine. Raises ModelError for a type that it doesn't know."""
    exported = Exported(bundle.source, bundle.device, settings.weights, context.say)
    exported.__dict__.update(model=dense(bundle.source), tokenizer=bundle.tokenizer)
    return exported


def usage(task: Task, prompt: list[str], new_tokens: int) -> list[str]:
    """Python code that answers a prompt, to be run in an exported folder; the lines in `prompt` set `ids`, its tokens."""
    kind, call = ("Translator", "translate_batch") if task == "seq2seq" else ("Generator", "generate_batch")
    options = f"max_decoding_length={new_tokens}" if task == "seq2seq" else f"max_length={new_tokens}, include_prompt_in_result=False"
    result = "hypotheses[0]" if task == "seq2seq" else "sequences[0]"
    return [
        "import ctranslate2",
        "from transformers import AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = ctranslate2.{kind}("{FOLDER}", device="auto")',
        *prompt,
        "tokens = tokenizer.convert_ids_to_tokens(ids)",
        f"written = model.{call}([tokens], beam_size=1, {options})[0].{result}",
        "print(tokenizer.decode(tokenizer.convert_tokens_to_ids(written), skip_special_tokens=True).strip())",
    ]


def _convert(bundle: Exported, target: Path, weights: str) -> dict[str, int]:
    """Write the engine's folder. Returns how many weights of matrices kept their integers, were rounded, or stayed floats."""
    from ctranslate2.converters import TransformersConverter
    from ctranslate2.specs import model_spec

    stored, counted = {"kept": 0, "rounded": 0, "floats": 0}, set[int]()

    def store(spec: Any, name: str, value: Any) -> None:
        if not isinstance(value, model_spec.Variable) or value.is_scalar() or value.dtype not in ("float32", "float16", "bfloat16"):
            return
        key = name.rsplit("/", maxsplit=1)[-1]
        if weights in ("auto", "int8") and hasattr(spec, f"{key}_scale"):
            matrix = value.to("float32").numpy()
            grid = _grid(matrix)
            kind = "kept" if grid is not None else "rounded" if weights == "int8" else "floats"
            if (content := hash(matrix.tobytes())) not in counted:  # tied matrices are stored once
                stored[kind] += matrix.size
                counted.add(content)
            if kind != "floats":
                integers, scale = grid or _nearest(matrix)
                setattr(spec, key, model_spec.NumpyVariable(integers))
                setattr(spec, f"{key}_scale", model_spec.NumpyVariable(scale))
                return
        setattr(spec, key, value.to(weights if weights in ("float16", "bfloat16") else "float32"))

    class Converter(TransformersConverter):  # type: ignore[misc]
        """For a model that is loaded already."""

        def load_model(self, *_: Any, **__: Any) -> Any:
            return _as_it_reads(bundle.model)

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            """With a token for every row of the embedding, some of which have none."""
            tokenizer = copy.deepcopy(bundle.tokenizer)
            rows = bundle.model.get_input_embeddings().num_embeddings
            tokenizer.add_tokens([f"<unused_{number}>" for number in range(len(tokenizer), rows)])
            return tokenizer

        def _load(self) -> Any:
            spec = super()._load()

            class Stored(type(spec)):  # type: ignore[misc]
                """The same, storing weights by `store` in place of its own rounding, once they are checked."""

                def optimize(self, quantization: str | None = None) -> None:
                    model_spec.visit_spec(self, store)
                    super().optimize(quantization)

            spec.__class__ = Stored
            return spec

    scratch = target.with_name(f"{target.name}.config")
    bundle.config.save_pretrained(scratch)  # the converter reads the type from a folder
    try:
        Converter(str(scratch)).convert(str(target), force=True)
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ModelError(f"export: ctranslate2: it can't convert a {bundle.config.model_type}: {first[:300]}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _name_tokens(target / "config.json")
    return stored


def _name_tokens(file: Path) -> None:
    """Put the end token in the engine's config in place of a token that the tokenizer lacks: the engine reads only names."""
    config = json.loads(file.read_text(encoding="utf-8"))
    unnamed = {key: config["eos_token"] for key, value in config.items() if key.endswith("_token") and value is None}
    file.write_text(json.dumps({**config, **unnamed}, indent=2), encoding="utf-8")


def _as_it_reads(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model with its config as the converter expects it, for transformers 4: https://github.com/OpenNMT/CTranslate2."""
    config = model.config
    if config.model_type in ("t5", "mt5", "umt5") and hasattr(config, "scale_decoder_outputs"):
        config.tie_word_embeddings = config.scale_decoder_outputs  # by which it scales logits
    if config.model_type in ("bart", "mbart") and not hasattr(config, "normalize_before"):
        config.normalize_before = config.model_type == "mbart"
    return model


def _grid(matrix: "NDArray[np.float32]") -> "tuple[NDArray[np.int8], NDArray[np.float32]] | None":
    """Integers (rows, columns) and each row's factor to them, where every row lies on a symmetric grid; else None."""
    import numpy as np

    if matrix.ndim != 2:
        return None
    largest = np.abs(matrix).max(axis=1)
    scale = np.where(largest == 0, 1.0, 0.0).astype(np.float32)
    for steps in range(LARGEST, 0, -1):  # from zero to the largest of a row
        waiting = np.flatnonzero(scale == 0)
        if not len(waiting):
            break
        tried = steps / largest[waiting]
        wide = matrix[waiting] * tried[:, None]
        turned = np.rint(wide).max(axis=1) == LARGEST  # int8 has -128 but not 128: such a row's step is negative
        fits = np.abs(wide - np.rint(wide)).max(axis=1) < ON_GRID
        fits &= ~(turned & (np.rint(wide).min(axis=1) == -LARGEST))
        scale[waiting[fits]] = np.where(turned, -tried, tried)[fits]
        if steps == LARGEST - 8 and not scale.any():
            return None  # weights that were never rounded fit no grid
    if (scale == 0).any():
        return None
    return np.rint(matrix * scale[:, None]).astype(np.int8), scale


def _nearest(matrix: "NDArray[np.float32]") -> "tuple[NDArray[np.int8], NDArray[np.float32]]":
    """As `_grid`, for any matrix (rows, ...): rounded to nearest, the largest of a row becoming 127."""
    import numpy as np

    flat = matrix.reshape(len(matrix), -1)
    largest = np.abs(flat).max(axis=1)
    largest[largest == 0] = LARGEST - 1
    scale = ((LARGEST - 1) / largest).astype(np.float32)
    return np.rint(flat * scale[:, None]).astype(np.int8).reshape(matrix.shape), scale
