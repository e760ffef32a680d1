"""Measurements become a report: compared, judged by the gates, explained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from compress import data
from compress.benchmark import figures, isolate
from compress.benchmark.messages import Outputs
from compress.benchmark.statistics import corpus_value
from compress.forecast.beside import foretold
from compress.methods import Example
from compress.metrics import COMPARED
from compress.model.source import Source
from compress.phases import Phase
from compress.recipe import Gate, Recipe
from compress.report import original as beside
from compress.report import quality, verdict, why
from compress.report.turns import disturbances
from compress.results.record import Role
from compress.results.report import Agreement, Prediction, Report, Split
from compress.results.sides import Measurement, Side
from compress.results.stages import Cut, StageRecord
from compress.scripts import shares

HEADLINE = ("rougeL", "divergence", "perplexity", "accuracy", "chrf", "cer", "exact_match")  # single examples are ranked by


@dataclass(frozen=True)
class Prepared:
    """What is to be measured: a recipe's smaller model with its baseline, or a single model, and the examples.

    name     what the report calls the candidate
    commit   git's, of the recipe
    splits   what was read of the data set
    phases   where the time for it went
    original the recipe's model, where baseline and candidate are in an engine's own format
    """

    recipe: Recipe
    baseline: Source | None
    candidate: Source
    name: str
    examples: list[Example]
    stages: list[StageRecord]
    commit: str | None = None
    splits: list[Split] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    original: Source | None = None


def reported(prepared: Prepared, measured: isolate.Measured, environment: dict[str, Any]) -> Report:
    """The report of one candidate, with its verdict."""
    recipe = prepared.recipe
    names = {"baseline": recipe.model.id, "candidate": prepared.name}
    sources = {"baseline": prepared.baseline or prepared.candidate, "candidate": prepared.candidate}
    sides = {
        side.role: side.model_copy(
            update={
                "model": names[side.role],
                "measurements": [*side.measurements, *_foretold(side, sources[side.role], recipe, environment)],
            }
        )
        for side in measured.sides
    }
    if COMPARED & set(recipe.groups):
        tokenizers, scripts = recipe.tokenizers, shares([example.references for example in prepared.examples])
        environment = {
            **environment, "rouge_tokenizer": tokenizers.rouge, "bleu_tokenizer": tokenizers.bleu, "reference_scripts": scripts,
        }  # fmt: skip
    original = measured.original and measured.original.model_copy(update={"model": recipe.model.id})
    score = next((name for name in HEADLINE if any(name in o.samples for o in measured.outputs.values())), None)
    report = Report(
        recipe=recipe.name, run="", created=datetime.now(UTC).isoformat(timespec="seconds"),
        digest=recipe.digest,
        examples_digest=data.examples_digest(prepared.examples), settings=recipe.as_written(), environment=environment,
        stages=prepared.stages, engine=recipe.engine.name, sides=list(sides.values()), original=original,
        agreement=_agreement(recipe.engine.name, measured), splits=data.compared(prepared.splits), turns=measured.turns,
        verdict="cannot_tell", decided_by="", cut=_cut(measured, recipe, len(prepared.examples)), score=score,
        predictions=_predictions(prepared.examples, measured.outputs, score),
    )  # fmt: skip
    return judged(report, sides.get("baseline"), sides["candidate"], same_run=True)


def judged(report: Report, baseline: Side | None, candidate: Side, same_run: bool) -> Report:
    """The report with comparisons, gates, verdict and explanations for these two sides."""
    limits = {metric: Gate.model_validate(gate) for metric, gate in report.settings["check"].items()}
    compared = verdict.pairs(baseline, candidate, same_run) if baseline else []
    level = report.confidence
    gates = verdict.gates(limits, compared, baseline, candidate, level)
    sides = [side for side in (baseline, candidate) if side]
    decision, reason = verdict.decide(gates, [failure for side in sides for failure in side.failures])
    comparisons = [verdict.compare(pair, level) for pair in compared]
    theirs = verdict.pairs(report.original, candidate, same_run) if report.original and same_run else []
    report = report.model_copy(update={"sides": sides, "against_original": [verdict.compare(pair, level) for pair in theirs]})
    return report.model_copy(
        update={
            "comparisons": comparisons,
            "gates": gates, "verdict": decision, "decided_by": reason,
            "notes": [
                *beside.sentences(report),
                *why.notes(report.stages, comparisons, report.environment, sides, gates),
                *quality.notes(sides, compared, [example.id for example in report.predictions], report.environment),
                *quality.left_out(report.splits),
                *disturbances(report.turns),
            ],
        }
    )  # fmt: skip


def _agreement(engine: str, measured: isolate.Measured) -> Agreement | None:
    """How well the engine agrees with transformers on the original's weights; None where that can't be seen."""
    theirs, ours = measured.original_outputs, measured.outputs.get("baseline")
    if theirs is None or ours is None:
        return None
    equal = None
    if theirs.texts is not None and ours.texts is not None:
        equal = sum(mine == other for mine, other in zip(ours.texts, theirs.texts, strict=True))
    likelihood = None
    if "perplexity" in theirs.samples and "perplexity" in ours.samples:
        mine, other = (figures.quality("perplexity", outputs.samples["perplexity"]).value for outputs in (ours, theirs))
        likelihood = mine / other if mine and other else None
    if equal is None and likelihood is None:
        return None
    baseline = measured.sides[0]
    dtype = measured.original.dtype if measured.original and measured.original.dtype != baseline.dtype else None
    return Agreement(
        engine=engine, dtype=dtype, half=dtype is None and (baseline.dtype or "").endswith("float16"),
        examples=len(theirs.texts or ours.samples["perplexity"]), equal=equal, likelihood=likelihood,
    )  # fmt: skip


def _foretold(side: Side, source: Source, recipe: Recipe, environment: dict[str, Any]) -> list[Measurement]:
    """The forecast of memory, which is for transformers only."""
    return foretold(side, source, recipe, environment.get("device", "cpu")) if recipe.engine.is_plain else []


def _predictions(examples: Sequence[Example], outputs: dict[Role, Outputs], score: str | None) -> list[Prediction]:
    windows = next((output.windows for output in outputs.values() if output.windows is not None), None)
    if windows is not None:  # what counts as an example where texts are joined
        examples = [Example(f"window {number}", text, []) for number, text in enumerate(windows, 1)]
    predictions = []
    for index, example in enumerate(examples):
        row: dict[str, Any] = {"id": example.id, "prompt": example.prompt, "references": example.references}
        for role, output in outputs.items():
            row[role] = output.texts[index] if output.texts is not None else None
            if score is not None and isinstance(sample := output.samples[score][index], list):
                row[f"{role}_score"] = corpus_value(score, [sample])
        predictions.append(Prediction(**row))
    return predictions


def _cut(measured: isolate.Measured, recipe: Recipe, examples: int) -> Cut | None:
    """How many prompts of the evaluation were cut, on the side that cut the most; None where nothing limits them."""
    most = max(measured.outputs.values(), key=lambda output: int(output.cut), default=None)
    if most is None or most.limit is None:
        return None
    key = "data.max_tokens" if most.limit == recipe.data.max_tokens else None
    return Cut(where="the evaluation", cut=most.cut, all=examples, limit=most.limit, key=key)
