"""A few examples show whether a recipe clearly breaks a gate on quality, before all is measured.

A recipe is given up where the whole interval, at the recipe's confidence, lies beyond the gate. Among recipes that would pass on all
examples at 95 %, fewer than one in a hundred is given up. Its estimate would have to be off by 2.6 standard errors on a ninth of the
examples, or by 3.1 on a third.
"""

import itertools
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.benchmark import figures
from compress.benchmark.statistics import FEWEST
from compress.benchmark.subject import Subject
from compress.execution import Execution
from compress.judgement import Prepared
from compress.methods import Example
from compress.metrics import GROUPS, METRICS, TASK
from compress.nursery import nursery
from compress.pipeline import OUTPUTS
from compress.report import verdict
from compress.results.record import Role
from compress.results.sides import Side
from compress.scores import Samples

SHARES = (1 / 9, 1 / 3)  # of the examples, after which a recipe may be given up; each is three times the last (Hyperband, Li et al. 2018)


def hopeless(prepared: Prepared, out: Path, execution: Execution) -> str | None:
    """After how many examples a gate on quality was broken beyond doubt, and which gate; None where there is doubt.

    The baseline's outputs are kept for the recipes that follow. Raises RunError.
    """
    recipe = prepared.recipe
    limits = {name: limit for name, limit in recipe.check.items() if METRICS[name].kind == "quality" and not name.startswith(TASK)}
    groups = [group for group in recipe.groups if limits.keys() & set(GROUPS.get(group, ()))]
    order = random.Random(0).sample(prepared.examples, len(prepared.examples))
    ends = sorted({max(FEWEST, math.ceil(share * len(order))) for share in SHARES})
    looks = [order[start:end] for start, end in itertools.pairwise([0, *ends]) if end < len(order)]
    if not looks or not groups:
        return None
    asked = recipe.model_copy(update={"metrics": groups})
    assert prepared.baseline is not None
    with tempfile.TemporaryDirectory() as folder, nursery():
        how = (asked, replace(execution, log=Path(folder) / "log"), out / OUTPUTS)
        theirs = list(_looks(Subject("baseline", prepared.baseline, *how, prepared.baseline), looks))
        for number, ours in enumerate(_looks(Subject("candidate", prepared.candidate, *how, prepared.baseline), looks)):
            baseline, candidate = _side("baseline", theirs[number]), _side("candidate", ours)
            results = verdict.gates(
                limits, verdict.pairs(baseline, candidate, same_run=True), baseline, candidate, recipe.benchmark.confidence
            )
            if broken := next((result for result in results if result.verdict == "fail"), None):
                return f"after {ends[number]} examples: {broken.sentence}"
    return None


def _looks(subject: Subject, looks: Sequence[list[Example]]) -> Iterator[Samples]:
    """The statistics of all examples so far after each look."""
    sofar: Samples = {}
    try:
        subject.start(warm=False)
        for examples in looks:
            subject.answer(examples)
            assert subject.outputs is not None
            sofar = {metric: [*sofar.get(metric, []), *rows] for metric, rows in subject.outputs.samples.items()}
            yield sofar
    finally:
        subject.stop()


def _side(role: Role, samples: Samples) -> Side:
    return Side(role=role, model="", measurements=[figures.quality(metric, rows) for metric, rows in samples.items()])
