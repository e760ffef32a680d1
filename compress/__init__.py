"""A model compression workbench: make a language model smaller, measure both alike, and say whether one may replace the other.

    recipe = compress.load_recipe("recipes/quickstart.yaml")
    report = compress.run(recipe)
    report.verdict, report.decided_by
    frame = compress.load_reports("reports")
    compress.pivot(frame), compress.plot_tradeoff(frame)

Names are imported when first used, so that `import compress` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CompressError", "Inspection", "Recipe", "Report", "bench", "check", "inspect", "load_recipe", "load_reports", "log", "pivot",
    "plot_tradeoff", "read_report", "run", "use_cpu_int8",
    "use_sparse_24",
]  # fmt: skip

if TYPE_CHECKING:
    from compress.errors import CompressError
    from compress.inspection.findings import Inspection
    from compress.pipeline import bench, check, inspect, run
    from compress.recipe import Recipe
    from compress.recipe import load as load_recipe
    from compress.report import Report, read_report
    from compress.report.frame import load_reports, pivot
    from compress.report.tradeoff import plot_tradeoff
    from compress.runtime import use_cpu_int8, use_sparse_24
    from compress.trackers import log

_HOMES = {
    "CompressError": ("compress.errors", "CompressError"),
    "Inspection": ("compress.inspection.findings", "Inspection"),
    "Recipe": ("compress.recipe", "Recipe"),
    "Report": ("compress.report", "Report"),
    "bench": ("compress.pipeline", "bench"),
    "check": ("compress.pipeline", "check"),
    "inspect": ("compress.pipeline", "inspect"),
    "load_recipe": ("compress.recipe", "load"),
    "load_reports": ("compress.report.frame", "load_reports"),
    "log": ("compress.trackers", "log"),
    "pivot": ("compress.report.frame", "pivot"),
    "plot_tradeoff": ("compress.report.tradeoff", "plot_tradeoff"),
    "read_report": ("compress.report", "read_report"),
    "run": ("compress.pipeline", "run"),
    "use_cpu_int8": ("compress.runtime", "use_cpu_int8"),
    "use_sparse_24": ("compress.runtime", "use_sparse_24"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
