"""Examples without a figure: what is left out, what counts as lost, what can't pass, and how it is said."""

import json

import pytest

from compress.benchmark.figures import quality
from compress.metrics import Missing
from compress.recipe import Gate
from compress.report import html, missing, verdict, write
from compress.report.frame import frame
from compress.results.report import Prediction, read_report
from compress.results.sides import Side
from tests.report.test_files import made
from tests.report.test_verdict import BASE, NOISE

OURS = [b + n for b, n in zip(BASE, NOISE, strict=True)]


def rows(values, **gone):
    """Samples with reasons in the place of the first ones: UNSEEN=3 for three."""
    reasons = [Missing[name] for name, number in gone.items() for _ in range(number)]
    return [*reasons, *([value] for value in values[len(reasons) :])]


def judge(theirs, ours, metric="rougeL", **limits):
    sides = [Side(role=role, model=role, measurements=[quality(metric, r)]) for role, r in (("baseline", theirs), ("candidate", ours))]
    return verdict.gates({metric: Gate(**limits)}, verdict.pairs(*sides, True), *sides, 0.95)[0]


def test_few_are_left_out_and_said():
    gate = judge(rows(BASE, UNSEEN=10), rows(OURS, UNSEEN=10), max_drop=1.0)
    assert (gate.verdict, gate.left_out) == ("pass", 10)
    assert gate.sentence.endswith("; at most 1 points is allowed; 10 of 200 examples are left out")
    drop = (sum(BASE[10:]) - sum(OURS[10:])) / 190
    assert gate.estimate == pytest.approx(drop)


def test_more_than_a_twentieth_left_out_can_not_pass_but_fail():
    gate = judge(rows(BASE, UNSEEN=11), rows(OURS, UNSEEN=11), max_drop=1.0)
    assert gate.verdict == "cannot_tell"
    assert gate.sentence.endswith("11 of 200 examples are left out, and with more than 5 % left out it can't pass")
    worse = [value - 5 for value in OURS]
    assert judge(rows(BASE, UNSEEN=11), rows(worse, UNSEEN=11), max_drop=1.0).verdict == "fail"


def test_nothing_seen_on_either_side_is_no_pass():
    gate = judge([Missing.UNSEEN] * 40, [Missing.UNSEEN] * 40, max_drop=1.0)
    assert gate.verdict == "cannot_tell"
    assert gate.sentence == "rougeL: max_drop 1 can't be checked: none: no token in the references in 40 of 40 examples"
    nought = [[0.0]] * 40
    gate = judge(nought, nought, max_drop=1.0)
    assert (gate.verdict, gate.sentence) == (
        "cannot_tell",
        "rougeL: max_drop 1 can't be checked: the baseline has 0, so nothing could be lost",
    )


@pytest.mark.parametrize(("reason", "word"), [("INFINITE", "infinite"), ("NAN", "not a number")])
def test_what_the_candidate_alone_has_no_number_for_fails(reason, word):
    likely = [[value, 10.0] for value in BASE]
    gate = judge(likely, [Missing[reason], *likely[1:]], "perplexity", max_ratio=1.1)
    assert gate.verdict == "fail"
    assert gate.sentence == f"perplexity of the candidate is broken: {word} in 1 of 200 examples in which the baseline's is a number"
    both = judge([Missing[reason], *likely[1:]], [Missing[reason], *likely[1:]], "perplexity", max_ratio=1.1)
    assert (both.verdict, both.left_out) == ("pass", 1)
    baseline_only = judge([Missing[reason], *likely[1:]], likely, "perplexity", max_ratio=1.1)
    assert (baseline_only.verdict, baseline_only.left_out) == ("pass", 1)
    everywhere = judge([Missing[reason]] * 200, [Missing[reason]] * 200, "perplexity", max_ratio=1.1)
    assert everywhere.verdict == "cannot_tell"


def test_a_limit_on_the_candidate_alone():
    likely = [[value, 10.0] for value in BASE]
    candidate = Side(role="candidate", model="m", measurements=[quality("perplexity", [Missing.INFINITE, *likely[1:]])])
    (gate,) = verdict.gates({"perplexity": Gate(max=1e9)}, [], None, candidate, 0.95)
    assert (gate.verdict, gate.sentence) == ("fail", "perplexity of the candidate is broken: infinite in 1 of 200 examples")
    candidate = Side(role="candidate", model="m", measurements=[quality("perplexity", [Missing.UNPREDICTED, *likely[1:]])])
    (gate,) = verdict.gates({"perplexity": Gate(max=1e9)}, [], None, candidate, 0.95)
    assert (gate.verdict, gate.left_out) == ("pass", 1)


def side(role, samples):
    return Side(role=role, model=role, measurements=[quality("rougeL", samples), quality("rouge1", samples)])


def test_each_reason_is_said_once_with_its_examples():
    shared = rows(BASE[:40], UNSEEN=7)
    sentences = missing.notes([side("baseline", shared), side("candidate", shared)], [f"row-{n}" for n in range(40)])
    assert sentences == [
        "Baseline and candidate: 7 of 40 examples (17.5 %) have no rouge (no token in the references) and are left out of it: "
        "row-0, row-1, row-2, row-3, row-4 and 2 more."
    ]
    sentences = missing.notes([side("baseline", rows(BASE[:40])), side("candidate", rows(BASE[:40], NAN=1))], [])
    assert sentences == ["Candidate: 1 of 40 examples (2.5 %) have no rouge (not a number) and are left out of it: number 1."]


def test_a_report_with_missing_examples_is_written_read_and_shown(tmp_path):
    sides = [side("baseline", rows(BASE[:40])), side("candidate", rows(OURS[:40], NAN=2))]
    predictions = [
        Prediction(
            id=str(n),
            prompt="p",
            references=["r"],
            baseline="b",
            candidate="c",
            baseline_score=BASE[n],
            candidate_score=OURS[n] if n > 1 else None,
        )
        for n in range(40)
    ]
    compared = [verdict.compare(pair, 0.95) for pair in verdict.pairs(*sides, True)]
    written = write.write(made(sides=sides, predictions=predictions, comparisons=compared), tmp_path / "r1")
    assert read_report(tmp_path / "r1") == written
    few = read_report(tmp_path / "r1", figures_only=True).candidate.measurements[0]
    assert (few.rows, few.missing) == (38, 2)
    assert written.comparisons[0].left_out == 2
    kept = json.loads((tmp_path / "r1/report.json").read_text())["sides"][1]["measurements"][0]["samples"]
    assert kept[:3] == ["not a number", "not a number", [OURS[2]]]
    assert ", 2 missing |" in (tmp_path / "r1/report.md").read_text()
    row = frame([written]).query("role == 'candidate' and metric == 'rougeL'").iloc[0]
    assert (row.samples, row.missing) == (38, 2)
    assert written.as_json()["missing"] == {"candidate": {"rougeL": 2, "rouge1": 2}}
    assert ", 2 missing" in html.render([written])
