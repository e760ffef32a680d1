"""The forecast of a side's memory, to be shown beside the measurement."""

from pathlib import Path

from compress.architectures import read
from compress.errors import ModelError
from compress.forecast.footprint import footprint, weight_bytes
from compress.forecast.plan import read_config, stored_dtype
from compress.model.source import Source
from compress.recipe import Recipe
from compress.results.sides import Measurement, Side


def foretold(side: Side, source: Source, recipe: Recipe, device: str) -> list[Measurement]:
    """The forecast of a side's peak while running, from config.json, and its error; empty where they can't be told.

    Packed weights count with their size on disk. There are two exceptions: compressed-tensors' count as unpacked, as plain transformers
    holds them, and torchao's in FBGEMM's layout where that is used.
    """
    values = {measured.metric: measured.value for measured in side.measurements if measured.batch_size is None}
    peak, on_disk = values.get("peak_run_bytes"), values.get("file_bytes")
    points = [(m.batch_size, m.prompt_tokens) for m in side.measurements if m.metric == "latency_p50" and m.value is not None]
    folder = _folder(source)
    if not peak or not on_disk or not points or folder is None:
        return []
    try:
        config = read_config(folder)
        shape = read(config, source.task)
    except ModelError:  # an architecture that isn't known
        return []
    dtype = stored_dtype(folder, config, source.dtype)
    method = (config.get("quantization_config") or {}).get("quant_method", "compressed-tensors")
    if method == "torchao" and recipe.benchmark.runtime.cpu_int8 and device == "cpu":
        weights = weight_bytes(shape, dtype, 8, padded=True)
    else:
        weights = weight_bytes(shape, dtype) if method == "compressed-tensors" else round(on_disk)
    width, new_tokens = 4 if dtype == "FP32" else 2, recipe.benchmark.new_tokens
    estimates = [footprint(weights, shape, width, batch or 1, prompt or 1, new_tokens, device) for batch, prompt in points]
    foretold = max(estimate.alive for estimate in estimates)
    error = Measurement(metric="forecast_error", value=100 * (foretold / peak - 1))
    return [Measurement(metric="forecast_run_bytes", value=foretold), error]


def _folder(source: Source) -> Path | None:
    """The folder of a model that was loaded."""
    if source.is_folder:
        return Path(source.id)
    import huggingface_hub

    file = huggingface_hub.try_to_load_from_cache(source.id, "config.json", revision=source.revision)
    return Path(file).parent if isinstance(file, str) else None
