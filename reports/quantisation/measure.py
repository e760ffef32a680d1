"""Run one stage after another on the models of this folder's recipes, and print what each of them lost.

    python reports/quantisation/measure.py RECIPE.yaml... --models FOLDER --data FOLDER [--stages 'quantize: rtn, bits: 4' ...]

Each run leaves its report in a folder beside the recipe (texts and predictions left out: the data are not ours to publish), and README.md
has one table over all of them.
"""

import argparse
import re
import tempfile
from pathlib import Path

import compress
from compress.report.write import write
from compress.results import Report, read_report

HERE = Path(__file__).parent
BY_ROW = [
    "rtn, bits: 8", "rtn, bits: 4", "awq, bits: 4", "gptq, bits: 4", "autoround, bits: 4", "gptq, bits: auto",
    "rtn, bits: 3", "awq, bits: 3", "gptq, bits: 3", "autoround, bits: 3",
]  # fmt: skip
ALIKE = ["smoothquant", "int8_dynamic", "bnb_int8", "bnb_nf4"]


def stages(recipe: str) -> list[str]:
    """What is run on a model where nothing is said: rows as groups on the real Llama, groups of 32 elsewhere."""
    size = -1 if recipe == "llama-real" else 32
    static = ["int8_static"] if recipe.startswith("llama") else []
    return [f"quantize: {stage}, group_size: {size}" for stage in BY_ROW] + [f"quantize: {stage}" for stage in ALIKE + static]


def measure(recipe: Path, stage: str, models: Path, data: Path) -> Report:
    """One stage on one model; its report is kept without texts."""
    loaded = compress.load_recipe(recipe)
    places = [] if loaded.model.id == "builtin" else [f"model.id={models / loaded.model.id}", f"data.source={data / loaded.data.source}"]
    loaded = compress.load_recipe(recipe, [*places, f"stages=[{{{stage}}}]"])
    with tempfile.TemporaryDirectory() as out:
        report = compress.run(loaded, out=out)
    settings = report.settings | {"model": report.settings["model"] | {"id": compress.load_recipe(recipe).model.id}}
    settings |= {"data": settings["data"] | {"source": compress.load_recipe(recipe).data.source}}
    sides = [side.model_copy(update={"model": side.role}) for side in report.sides]
    records = [record.model_copy(update={"artifact": Path(record.artifact).name}) for record in report.stages]
    report = report.model_copy(update={"predictions": [], "settings": settings, "sides": sides, "stages": records})
    place = HERE / recipe.stem / re.sub(r"[^a-z0-9_]+", "-", stage.removeprefix("quantize: ").lower())
    if place.exists():
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    return write(report, place)


def table() -> str:
    """All reports of this folder as one Markdown table."""
    lines = ["| model | stage | perplexity | ratio (95 %) | ROUGE-L | BLEU | files | took |", "|---|---|---|---|---|---|---|---|"]
    for recipe in sorted(HERE.glob("*.yaml")):
        for file in sorted((HERE / recipe.stem).glob("*/report.json")):
            report = read_report(file)
            compared = {c.metric: c for c in report.comparisons}
            given = report.stages[0].stage
            stage = ", ".join([given["quantize"], *(f"{k} {given[k]}" for k in ("bits", "group_size", "average_bits") if given.get(k))])
            cells = [recipe.stem, stage]
            if one := compared.get("perplexity"):
                cells.append(f"{one.baseline:.4f} to {one.candidate:.4f}")
                cells += ["x{:.4f} ({:.4f} to {:.4f})".format(*(1 + change / one.baseline for change in (one.estimate, one.low, one.high)))]
            for metric in ("rougeL", "bleu"):
                one = compared.get(metric)
                cells.append("" if one is None else f"{one.baseline:.2f} to {one.candidate:.2f}")
            cells += [f"x{compared['file_bytes'].estimate:.3f}", f"{report.stages[0].seconds:.0f} s"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="*")
    parser.add_argument("--models", type=Path, default=Path())
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--stages", nargs="*")
    given = parser.parse_args()
    for recipe in given.recipes:
        for stage in given.stages or stages(recipe.stem):
            try:
                report = measure(recipe, stage, given.models.resolve(), given.data.resolve())
            except compress.CompressError as error:
                print(f"{recipe.stem}: {stage}: {error}", flush=True)
                continue
            shown = [c for c in report.comparisons if c.metric in ("perplexity", "rougeL", "bleu")]
            quality = ", ".join(f"{c.metric} {c.baseline:.4f} to {c.candidate:.4f}" for c in shown)
            print(f"{recipe.stem}: {stage}: {report.verdict}: {quality}, {report.stages[0].seconds:.0f} s", flush=True)
    print(table())


if __name__ == "__main__":
    main()
