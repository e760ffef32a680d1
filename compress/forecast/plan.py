"""A forecast before anything is run: memory at each grid point and dtype, whether it fits, time and disk.

Sizes are exact or nearly so. Times are rough: they follow from how much is computed and read, and how fast.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import architectures, methods
from compress.architectures import read
from compress.errors import ModelError
from compress.forecast.footprint import DTYPES, Footprint, footprint, weight_bytes
from compress.forecast.machine import Machine
from compress.methods import TUNE_BATCH, TuneSettings
from compress.model.folder import stored_dtypes, tensor_headers, weight_files
from compress.model.source import BUILTIN, Source, locate, pinned, user_path
from compress.recipe import Recipe, Stage
from compress.shape import Shape

STORED = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
ROWS = 1000  # assumed of a train split whose rows weren't counted
START_S = 10  # for a process to start: imports and loading
COPY_S = 2  # the same for a copy, which has its imports
INPUT_TOKENS = 256  # of an evaluation example's prompt, where no setting bounds it
BATCH_TOKENS = 16384  # of the evaluation that are read together, where no setting bounds them


@dataclass(frozen=True)
class Forecast:
    """The memory of one dtype at one grid point; INT8 and INT4 stand for weights that the stages pack.

    `held` is None where the architecture isn't known; `weights` are known even then.
    """

    dtype: str
    batch_size: int
    prompt_tokens: int
    weights: int
    held: Footprint | None
    fits: bool

    @property
    def peak(self) -> int | None:
        return None if self.held is None else self.held.peak


@dataclass(frozen=True)
class Plan:
    """The whole forecast, in bytes and seconds."""

    model: str
    architecture: str
    parameters: int
    dtype: str
    machine: Machine
    rows: list[Forecast]
    seconds: dict[str, float]
    disk_bytes: int
    said: list[str]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        rows = [{**asdict(row), "peak": row.peak} for row in self.rows]
        return {**asdict(self), "rows": rows, "total_seconds": sum(self.seconds.values())}


def plan(recipe: Recipe, machine: Machine) -> Plan:
    """Forecast a recipe from its model's config.json.

    Raises ModelError where there is no config, or where its architecture isn't known and the weights aren't here to look at.
    """
    folder = _folder(recipe)
    config = read_config(folder)
    notes, benchmark = [], recipe.benchmark
    is_known = architectures.of(str(config.get("model_type"))).shape is not None
    if is_known:
        shape = read(config, recipe.model.task)
    else:
        shape = _from_headers(folder, config)
        notes.append(
            f"{shape.architecture!r} isn't known here: its weights are counted from its files' headers, and its other memory can't be told"
        )
    notes += remarks(recipe)
    if others := [engine.name for engine in recipe.engines if not engine.is_plain]:
        notes.append(f"memory and time are those of plain transformers; {' and '.join(others)} mostly takes less of both")
    dtype = stored_dtype(folder, config, recipe.model.dtype)
    rows = []
    left = _left(recipe, dtype)
    sizes = {name: (weight_bytes(shape, name), name) for name in DTYPES}
    if left.bits:
        padded = benchmark.runtime.cpu_int8 and machine.device == "cpu" and left.pads
        sizes[f"INT{left.bits}"] = weight_bytes(shape, left.dtype, left.bits, padded), left.dtype
        notes.append(f"{left.stage} leaves INT{left.bits} in memory; what it doesn't pack stays {left.dtype}")
    elif left.stage and any(engine.is_plain for engine in recipe.engines):
        notes.append(
            f"{left.stage}: plain transformers unpacks the weights, which then take as much as {left.dtype}; only files are smaller"
        )
    for name, (weights, stored) in sizes.items():
        for batch, prompt in benchmark.points:
            width = 4 if stored == "FP32" else 2
            held = footprint(weights, shape, width, batch, prompt, benchmark.new_tokens, machine.device) if is_known else None
            rows.append(Forecast(name, batch, prompt, weights, held, (held.peak if held else weights) <= machine.memory_bytes))
    seconds = {str(stage): _stage_seconds(stage, recipe, shape, machine) for stage in recipe.stages}
    if any(isinstance(stage.settings, TuneSettings) and stage.settings.samples is None for stage in recipe.stages):
        notes.append(f"the rows of the train split weren't counted; {ROWS:,} are assumed")
    for side, name in (("baseline", dtype), ("candidate", f"INT{left.bits}" if left.bits else left.dtype)):
        seconds[f"measuring the {side}"] = _benchmark_seconds(recipe, shape, sizes[name][0], machine)
    disk = sum(_artifacts(recipe, shape, dtype))
    return Plan(recipe.model.id, shape.architecture, shape.parameters, dtype, machine, rows, seconds, disk, notes)


@dataclass(frozen=True)
class Left:
    """How the stages leave the weights in memory.

    dtype   of what isn't packed
    bits    of the linear layers' weights where they are packed
    stage   the one that packs them, or whose packed weights are unpacked again
    pads    whether `cpu_int8` applies to them
    """

    dtype: str
    bits: int | None = None
    stage: str = ""
    pads: bool = False


def _left(recipe: Recipe, dtype: str) -> Left:
    left = Left(dtype)
    for stage in recipe.stages:
        about = methods.find(stage.family, stage.method).ABOUT
        if stage.method == "cast":
            left = Left(STORED[getattr(stage.settings, "dtype", "bfloat16")])
        elif about.packs:
            bits = getattr(stage.settings, "bits", None) if getattr(stage.settings, "format", None) == "gptq" else about.holds
            left = Left(left.dtype, bits, str(stage), "torchao" in about.packages)
    return left


def remarks(recipe: Recipe) -> list[str]:
    """Remarks on what the stages' settings do to layers of the model's shapes; none unless its config is on disk and of a known kind."""
    columns, sentences = widths(recipe), list[str]()
    for stage in recipe.stages:
        if stage.method == "structured" or not columns:  # the shapes are others then, or not known
            break
        sentences += [f"{stage}: {sentence}" for sentence in stage.settings.about_shapes(columns)]
    return sentences


def widths(recipe: Recipe) -> Mapping[int, int]:
    """Columns of a layer -> weights in such layers; empty where the config isn't on disk or is of no known kind."""
    place = BUILTIN if recipe.model.id == "builtin" else recipe.folder / user_path(recipe.model.id)
    try:
        return read(read_config(place), recipe.model.task).columns
    except ModelError:
        return {}


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises ModelError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'}: can't be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'}: holds no config")
    return config


def stored_dtype(folder: Path, config: dict[str, Any], requested: str) -> str:
    """The dtype that a model is loaded in, by its name in a plan; where the config names none, that of its files."""
    dtype = requested if requested != "auto" else config.get("dtype") or config.get("torch_dtype")
    return STORED.get(str(dtype or next(iter(stored_dtypes(folder)), "float32")), "FP32")


def _folder(recipe: Recipe) -> Path:
    """The folder with the config of the recipe's model. From the hub only the config is fetched, once."""
    place = recipe.folder / user_path(recipe.model.id)
    if (place / "config.json").is_file():
        return place
    model = recipe.model
    source = pinned(Source(locate(model.id, recipe.folder), model.task, model.dtype, model.revision))
    if source.is_folder:
        return Path(source.id)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(source.id, "config.json", revision=source.revision)).parent
    except Exception as error:  # the hub's client has an error class for each of its troubles
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{source.id}: its config.json can't be had from the hub: {first}") from None


def _from_headers(folder: Path, config: dict[str, Any]) -> Shape:
    """The sizes of an unknown architecture, from the headers of its weight files: tensors of two dimensions count as linear.

    Raises ModelError where there are none here.
    """
    kind = str(config.get("model_type"))
    files = weight_files(folder)
    if not files:
        raise ModelError(
            f"model_type {kind!r}: its sizes can't be told from its config; supported: {', '.join(architectures.shaped())}."
            " With its safetensors in the folder their headers would be read"
        )
    linear = other = 0
    for file in files:
        for name, header in tensor_headers(file):
            size = 1
            for length in header["shape"]:
                size *= length
            is_linear = len(header["shape"]) == 2 and not any(part in name for part in ("embed", "lm_head", "shared", "wte", "wpe"))
            linear, other = (linear + size, other) if is_linear else (linear, other + size)
    return Shape(kind, None, None, linear, other, 0, None)


def _benchmark_seconds(recipe: Recipe, shape: Shape, weights: int, machine: Machine) -> float:
    """Seconds to measure one side: process starts, every generation at every point, and the evaluation examples."""
    benchmark = recipe.benchmark
    start = COPY_S if machine.device == "cpu" else START_S
    grid = sum(_generation_seconds(shape, weights, machine, batch, prompt, benchmark.new_tokens) for batch, prompt in benchmark.points)
    length = recipe.data.max_tokens or INPUT_TOKENS
    together = max(1, (benchmark.quality_batch_tokens or BATCH_TOKENS) // length)
    batches = -(-(recipe.data.samples or ROWS) // together)
    quality = batches * _generation_seconds(shape, weights, machine, together, length, recipe.generation.max_new_tokens)
    turns = benchmark.turns * benchmark.iterations * grid
    timed = turns if benchmark.precision is None else max(turns, start)
    return START_S + benchmark.rounds * (start + max(2, 1 + benchmark.warmup) * grid + timed) + quality


def _generation_seconds(shape: Shape, weights: int, machine: Machine, batch: int, prompt: int, new: int) -> float:
    """Seconds of a generation. Prefill is bound by arithmetic, two operations a weight and token; each further token by the weights
    that it reads, or by arithmetic where that takes longer."""
    flops = 2 * shape.linear / machine.flops
    written = 0 if shape.vocabulary is None else new
    return flops * batch * prompt + written * max(weights / machine.bytes_per_s, flops * batch)


def _stage_seconds(stage: Stage, recipe: Recipe, shape: Shape, machine: Machine) -> float:
    """Seconds of a stage. A training step counts as three forward passes, and as four where a teacher is asked; a calibrated method
    counts as two over its examples, others as none."""
    settings = stage.settings
    forward = 2 * shape.linear / machine.flops
    if isinstance(settings, TuneSettings):
        rows = settings.samples or ROWS
        examples = (settings.steps or 0) * settings.batch_size * settings.accumulate or (settings.epochs or 1) * rows
        passes = 4 if stage.family == "distill" else 3
        return START_S + passes * forward * examples * min(settings.max_tokens, recipe.data.max_tokens or INPUT_TOKENS)
    if not stage.needs_examples:
        return START_S
    steps, batch = getattr(settings, "steps", 0), getattr(settings, "batch_size", 1)
    examples = max(recipe.calibration.samples, 3 * steps * batch) + 2 * TUNE_BATCH * getattr(settings, "tune", 0)
    tokens = examples * min(recipe.calibration.max_tokens, INPUT_TOKENS)
    return START_S + 2 * forward * tokens


def _artifacts(recipe: Recipe, shape: Shape, dtype: str) -> list[int]:
    """Bytes of every stage's artifact. One that trains has a checkpoint, too: weights and two states of Adam, in float32."""
    sizes, now = [], weight_bytes(shape, dtype)
    for stage in recipe.stages:
        if stage.family == "quantize":
            bits = {"cast": 16, "bnb_nf4": 4}.get(stage.method) or getattr(stage.settings, "bits", 8)
            now = min(now, weight_bytes(shape, "BF16", None if bits == 16 else 8 if bits == 8 else 4))
        elif stage.method == "structured":
            now = round(now * float(getattr(stage.settings, "keep", 1)))
        sizes.append(now + (12 * shape.parameters if isinstance(stage.settings, TuneSettings) else 0))
    return sizes
