"""What holds a side's memory at its peak, part by part, and what checks that: another reading, and the forecast."""

from collections.abc import Callable, Sequence

from compress.report.numbers import scaled, share
from compress.results.sides import Side

Values = dict[str, float]


def parts(side: Side | None) -> dict[str, float]:
    """Bytes by what they hold, and all of them under `ALL`; empty without a peak."""
    values = _values(side)
    return {name: size for name, of in PARTS.items() if (size := of(values)) is not None}


def held(sides: Sequence[Side | None]) -> list[list[str]]:
    """Rows of a name and a cell a side: bytes of each part with their share of the whole. None without a peak."""
    by_side = [parts(side) for side in sides]
    return [[name, *(_part(of, name) for of in by_side)] for name in PARTS if any(name in of for of in by_side)]


def checked(sides: Sequence[Side | None]) -> list[list[str]]:
    """Rows of a name and a cell a side: the high-water marks with what was sampled from outside, and with what was foretold."""
    rows = []
    for name, metric, unit in CHECKS:
        cells = [_values(side).get(metric) for side in sides]
        if any(cell is not None for cell in cells):
            rows.append([name, *("-" if cell is None else f"{cell:+.1f} %" if unit == "%" else scaled(cell, unit) for cell in cells)])
    return rows


def _values(side: Side | None) -> Values:
    """metric -> value of a side's figures that belong to no grid point, where it has a peak."""
    figures = {m.metric: m.value for m in (side.measurements if side else []) if m.batch_size is None and m.value is not None}
    return figures if "peak_run_bytes" in figures else {}


def _part(of: dict[str, float], name: str) -> str:
    if name not in of:
        return "-"
    return f"{scaled(of[name], 'bytes')} ({share(of[name] / of[ALL]) if of[ALL] else '-'})"


def _whole(values: Values) -> float:
    """All that is held: on a GPU by NVML's account of the process, or else by the allocator's."""
    allocated = values["peak_run_bytes"] + values.get("allocator_slack_bytes", 0)
    return values.get("process_gpu_bytes") or values.get("peak_reserved_bytes") or allocated


def _less(values: Values) -> float | None:
    """Weights without the buffers."""
    return values["weight_bytes"] - values["buffer_bytes"] if "weight_bytes" in values and "buffer_bytes" in values else None


ALL = "all"
PARTS: dict[str, Callable[[Values], float | None]] = {
    "weights": _less,
    "buffers": lambda values: values.get("buffer_bytes"),
    "keys and values": lambda values: values.get("kv_cache_bytes"),
    "beside the weights": lambda values: values.get("other_bytes"),
    "activations": lambda values: values.get("activation_bytes"),
    "allocator's slack": lambda values: values.get("allocator_slack_bytes"),
    "CUDA context": lambda values: values.get("cuda_context_bytes"),
    ALL: lambda values: _whole(values) if values else None,
}
CHECKS = [
    ("peak while running", "peak_run_bytes", "bytes"),
    ("sampled every 10 ms, slack included", "sampled_run_bytes", "bytes"),
    ("foretold from config.json", "forecast_run_bytes", "bytes"),
    ("the forecast's error", "forecast_error", "%"),
    ("peak while loading", "peak_load_bytes", "bytes"),
    ("the same, sampled every 10 ms", "sampled_load_bytes", "bytes"),
]
