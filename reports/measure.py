"""Run one chain of stages after another on the models of a folder's recipes, and print what each of them lost.

    python reports/measure.py RECIPE.yaml... --models FOLDER --data FOLDER [--out FOLDER] [--stages 'prune: wanda; quantize: rtn' ...]

The recipes of `quantisation/`, `pruning/` and `distillation/` have no stages of their own; without --stages each runs those of its folder.
A recipe with stages, as those of `smollm2/`, runs as it is.
A run leaves its report in a folder beside the recipe (texts and predictions left out: the data are not ours to publish). Printed is one
table over all of a folder's reports; without a recipe, over every folder's.
"""

import argparse
import re
import tempfile
from pathlib import Path

import compress
from compress.report.write import write
from compress.results.report import Report, read_report

HERE = Path(__file__).parent
INT8 = ["quantize: smoothquant", "quantize: int8_dynamic", "quantize: bnb_int8", "quantize: bnb_nf4"]
FOLDERS = {
    "quantisation": [
        "rtn, bits: 8", "rtn, bits: 4", "awq, bits: 4", "gptq, bits: 4", "autoround, bits: 4", "gptq, bits: auto",
        "rtn, bits: 3", "awq, bits: 3", "gptq, bits: 3", "autoround, bits: 3",
    ],
    "pruning": [
        "prune: magnitude", "prune: wanda", "prune: sparsegpt", 'prune: magnitude, pattern: "2:4"', 'prune: wanda, pattern: "2:4"',
        "prune: wanda; quantize: gptq, group_size: 32",
    ],
    "smollm2": [
        *(f"quantize: {stage}, group_size: 64, symmetric: {symmetric}"
          for stage in ("rtn, bits: 8", "rtn, bits: 4", "awq, bits: 4", "gptq, bits: 4", "autoround, bits: 4, steps: 25",
                        "rtn, bits: 3", "gptq, bits: 3", "autoround, bits: 3, steps: 25", "gptq, bits: 2", "autoround, bits: 2, steps: 25")
          for symmetric in ("true", "false")),
        *INT8,
        "prune: magnitude", "prune: wanda", "prune: sparsegpt", 'prune: wanda, pattern: "2:4"', 'prune: sparsegpt, pattern: "2:4"',
    ],
}  # fmt: skip
HALF_BART = "prune: depth, by: spacing, drop: {decoder: 2}; distill: logits, epochs: 1, batch_size: 32, learning_rate: 7e-4"
HALF_BERT = "prune: depth, by: spacing, drop: 3"
DISTILLED = {
    "t5": [
        f"prune: structured, keep: 0.5, importance: taylor; {how}, {budget}, batch_size: 16, learning_rate: 7e-4, seed: {seed}"
        for budget, seeds in (("samples: 1000, steps: 600", (0, 1, 2)), ("steps: 1200", (0,)))
        for seed in seeds for how in ("distill: hidden, hidden_weight: 0.5", "finetune: full")
    ],
    "bart": [HALF_BART, HALF_BART.replace("decoder: 2", "decoder: 1")],
    "sst2": [f"{HALF_BERT}; distill: hidden, epochs: 1, batch_size: 32, learning_rate: 2e-4, max_tokens: 128, attention_weight: 1"],
}  # fmt: skip


def chains(recipe: Path) -> list[str] | list[None]:
    """The stages run on a model without --stages: a recipe's own, if any; a scale a row on the real Llama, groups of 32 elsewhere."""
    if compress.load_recipe(recipe).stages:
        return [None]
    if recipe.parent.name == "distillation":
        return DISTILLED[recipe.stem]
    stages = FOLDERS[recipe.parent.name]
    if recipe.parent.name != "quantisation":
        return stages
    size = -1 if recipe.stem == "llama-real" else 32
    static = ["quantize: int8_static"] if recipe.stem.startswith("llama") else []
    return [f"quantize: {stage}, group_size: {size}" for stage in stages] + INT8 + static


def measure(recipe: Path, chain: str | None, models: Path, data: Path, out: Path | None) -> Report:
    """One chain of stages on one model, or the recipe's own stages; its report is kept without texts."""
    loaded = compress.load_recipe(recipe)
    places = {"model.id": (models, loaded.model.id), "data.source": (data, loaded.data.source)}
    changes = [f"{key}={folder / Path(name).name}" for key, (folder, name) in places.items() if name != "builtin"]
    if chain is not None:
        stages = ", ".join(f"{{{stage}}}" for stage in chain.split("; "))
        changes += [f"stages=[{stages}]", "benchmark.precision=null"]
    with tempfile.TemporaryDirectory() as folder:
        report = compress.run(compress.load_recipe(recipe, changes), out=out or folder)
    settings_left_out = r", (keep|importance|samples|epochs|learning_rate|batch_size|max_tokens|\w+_weight|by): [^,;]+"
    name = re.sub(rf"(quantize|prune|finetune|distill): |{settings_left_out}", "", chain or "").lower()
    return keep(report, recipe, recipe.parent / recipe.stem / re.sub(r"[^a-z0-9_]+", "-", name).strip("-"))


def keep(report: Report, recipe: Path, place: Path) -> Report:
    """Write a report of a recipe to a place, without texts, and with model and data as the recipe names them."""
    loaded = compress.load_recipe(recipe)
    settings = report.settings | {"model": report.settings["model"] | {"id": loaded.model.id}}
    settings |= {"data": settings["data"] | {"source": loaded.data.source}}
    sides = [side.model_copy(update={"model": side.role}) for side in report.sides]
    records = [record.model_copy(update={"artifact": Path(record.artifact).name}) for record in report.stages]
    report = report.model_copy(update={"predictions": [], "settings": settings, "sides": sides, "stages": records})
    if place.exists():
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    return write(report, place)


def table(folder: Path) -> str:
    """All reports of a folder as one Markdown table."""
    heads = [
        "model",
        "stages",
        "divergence (95 %)",
        "perplexity",
        "ratio (95 %)",
        "ROUGE-L",
        "BLEU",
        "accuracy",
        "F1",
        "parameters",
        "files",
        "latency",
        "took",
    ]
    rows = []
    for recipe in sorted(folder.glob("*.yaml")):
        for file in sorted((folder / recipe.stem).rglob("report.json")):
            report = read_report(file)
            compared = {c.metric: c for c in report.comparisons}  # of latencies the last, which is the largest batch's
            row = dict.fromkeys(heads, "") | {"model": recipe.stem, "stages": ", then ".join(title(r.stage) for r in report.stages)}
            if comparison := compared.get("divergence"):
                row["divergence (95 %)"] = f"{comparison.candidate:.4f} ({comparison.low:.4f} to {comparison.high:.4f})"
            if comparison := compared.get("perplexity"):
                row["perplexity"] = f"{comparison.baseline:.4f} to {comparison.candidate:.4f}"
                ratios = (1 + change / comparison.baseline for change in (comparison.estimate, comparison.low, comparison.high))
                row["ratio (95 %)"] = "x{:.4f} ({:.4f} to {:.4f})".format(*ratios)
            for head, metric in (("ROUGE-L", "rougeL"), ("BLEU", "bleu"), ("accuracy", "accuracy"), ("F1", "f1")):
                if comparison := compared.get(metric):
                    row[head] = f"{comparison.baseline:.2f} to {comparison.candidate:.2f}"
            for head, metric in (("parameters", "parameters"), ("files", "file_bytes"), ("latency", "latency_p50")):
                row[head] = f"x{compared[metric].estimate:.3f}"
            row["took"] = f"{sum(record.seconds for record in report.stages):.0f} s"
            rows.append(row)
    shown = [head for head in heads if any(row[head] for row in rows)]
    if folder.name == "quantisation":
        shown = [head for head in shown if head not in ("parameters", "latency")]  # these keep all, and were not run for speed
    lines = [shown, ["---"] * len(shown), *([row[head] for head in shown] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(stage: dict[str, object]) -> str:
    """A stage's method and the most important of its settings."""
    keys = [
        "bits",
        "symmetric",
        "group_size",
        "average_bits",
        "pattern",
        "keep",
        "importance",
        "drop",
        "samples",
        "epochs",
        "steps",
        "rank",
        "top_k",
        "seed",
    ]
    keys += [] if stage.get("pattern") else ["sparsity"]
    return ", ".join([str(next(iter(stage.values()))), *(f"{key} {stage[key]}" for key in keys if stage.get(key))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="*")
    parser.add_argument("--models", type=Path, default=Path())
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--out", type=Path, help="where artifacts stay, to be used again")
    parser.add_argument("--stages", nargs="*")
    arguments = parser.parse_args()
    for recipe in (path.resolve() for path in arguments.recipes):
        for chain in arguments.stages or chains(recipe):
            try:
                report = measure(recipe, chain, arguments.models.resolve(), arguments.data.resolve(), arguments.out)
            except compress.CompressError as error:
                print(f"{recipe.stem}: {chain or 'its own stages'}: {error}", flush=True)
                continue
            shown = [c for c in report.comparisons if c.metric in ("divergence", "perplexity", "rougeL", "bleu", "accuracy")]
            quality = ", ".join(f"{c.metric} {c.baseline:.4f} to {c.candidate:.4f}" for c in shown)
            took = sum(record.seconds for record in report.stages)
            print(f"{recipe.stem}: {chain or 'its own stages'}: {report.verdict}: {quality}, {took:.0f} s", flush=True)
    for folder in sorted({recipe.parent.name for recipe in arguments.recipes} or {*FOLDERS, "distillation"}):
        print(table(HERE / folder))


if __name__ == "__main__":
    main()
