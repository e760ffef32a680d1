"""A recipe: which model, which data, which stages, how it is measured and what it must still be able to do.

Reading one is pure: no network, no torch, no environment variables. All mistakes are reported at once, by file,
line and key. `Recipe.digest` names a run, since what a run depends on is all in the recipe.

    blocks.py      the blocks and their keys
    scoring.py     the settings of a metric
    agreement.py   checks across several blocks
    reading.py     a file, overrides, named blocks, stages; the JSON schema
"""

from compress.recipe.blocks import (
    PLAIN,
    Benchmark,
    Calibration,
    ChosenEngine,
    Data,
    Gate,
    Generation,
    Model,
    Recipe,
    Runtime,
    Stage,
    digest,
    fields,
)
from compress.recipe.reading import load, load_gates, schema, shipped

__all__ = [
    "PLAIN", "Benchmark", "Calibration", "ChosenEngine", "Data", "Gate", "Generation", "Model", "Recipe", "Runtime", "Stage",
    "digest", "fields", "load", "load_gates", "schema", "shipped",
]  # fmt: skip
