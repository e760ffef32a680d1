"""A folder of reports as a time line: what is on one line, and where it changes."""

import json

import pytest

from compress.errors import InputError, ReportError
from compress.report import history
from compress.results.sides import Measurement, Side
from tests.report.test_files import made
from tests.test_cli import program


def at(day, value, commit=None, reason=None, verdict="pass", **changes):
    """A report of one day of November whose candidate has this ROUGE-L."""
    figures = [
        Measurement(metric="rougeL", value=value, samples=[] if value is None else [[value]], reason=reason),
        Measurement(metric="weight_bytes", value=1e6 + day),
        *(Measurement(metric="ttft", value=day, batch_size=batch, prompt_tokens=8, samples=[[day]]) for batch in (1, 16)),
    ]
    changes = {"run": f"r{day:02}", "environment": {"device": "cpu", "cpu": "Epyc", "commit": commit}, **changes}
    return made(
        created=f"2026-11-{day:02}T10:15:00+00:00", sides=[Side(role="candidate", model="m", measurements=figures)],
        verdict=verdict, predictions=[], **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([70.1, 70.0, 70.2, 70.1, 68.0, 68.1], [4]),
        ([4e6] * 5 + [5e6] * 2, [5]),
        ([1.0] * 5 + [2.0] * 5 + [1.0] * 5, [5, 10]),
        ([70.1, 70.0, 70.2, 60.0, 70.1, 70.0, 70.2, 70.1], []),
        ([70.1, 70.0, 70.2, 70.1] * 5 + [60.0], []),
        ([0.1] * 9, []),
        ([0.0] * 9, []),
        ([12.3456] * 5 + [12.3456001] * 5, []),
    ],
)
def test_a_change_is_a_level_that_lasts(values, expected):
    assert history.changes(values) == expected


def test_what_only_varies_seldom_shows_a_change():
    import numpy as np

    rng = np.random.default_rng(0)
    for runs in (6, 20):
        count = sum(bool(history.changes(rng.normal(70, 1, runs).tolist())) for _ in range(200))
        assert count <= 16, f"of 200 lines of {runs} runs; 10 are meant"


def test_a_line_holds_runs_that_were_measured_alike():
    """In time order whatever order they are read in; what was measured otherwise is a line of its own, and said to be."""
    otherwise = {"check": {}, "model": {}, "data": {}, "generation": {}, "benchmark": {"new_tokens": 9}}
    reports = [
        at(3, 71.0, "c3", run="a"), at(1, 70.0, "c1"), at(2, None, "c2", reason="out of memory", verdict="fail"), at(5, 60.0, settings=otherwise),
        at(4, 80.0, name="another"), at(6, 50.0, environment={"device": "cpu", "cpu": "Xeon"}),
    ]  # fmt: skip
    lines = history.lines(reports, "rougeL", "toy")
    assert [(line.machine, len(line.runs)) for line in lines] == [("Epyc", 3), ("Epyc", 1), ("Xeon", 1)]
    assert [bool(line.apart) for line in lines] == [False, True, True]
    assert lines[1].apart[0].startswith("benchmark") and lines[2].apart == ["cpu"]
    runs = lines[0].runs
    assert [(run.created[8:10], run.commit, run.value, run.reason, run.verdict) for run in runs] == [
        ("01", "c1", 70.0, None, "pass"), ("02", "c2", None, "out of memory", "fail"), ("03", "c3", 71.0, None, "pass"),
    ]  # fmt: skip
    assert lines[0].changes is None, "too few runs"
    assert {line.recipe for line in history.lines(reports, "rougeL")} == {"toy", "another"}


def test_a_change_is_told_by_the_medians_before_and_since():
    """A missing value is no zero: it takes no part, and the numbers are those of the runs."""
    values = [70.0, 70.2, None, 70.1, 70.2, 68.0, 68.2]
    (line,) = history.lines([at(day + 1, value) for day, value in enumerate(values)], "rougeL")
    (change,) = line.changes
    assert change.first == 5
    assert (change.before, change.since) == (pytest.approx(70.15), pytest.approx(68.1))


def test_every_grid_point_is_a_line():
    reports = [at(1, 70.0), at(2, 70.0)]
    assert [line.figure for line in history.lines(reports, "ttft")] == ["ttft [batch 1, prompt 8]", "ttft [batch 16, prompt 8]"]
    assert [line.figure for line in history.lines(reports, "ttft [batch 16, prompt 8]")] == ["ttft [batch 16, prompt 8]"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["rougel"], InputError, "'rougel' is not a metric; did you mean 'rougeL'"),
        (["bleu"], ReportError, "none of 2 reports has bleu"),
        (["rougeL", "tot"], InputError, "--recipe tot: there is no report of it; did you mean 'toy'"),
    ],
)
def test_what_no_line_can_be_drawn_of_is_said(arguments, error, message):
    with pytest.raises(error, match=message):
        history.lines([at(1, 70.0), at(2, 70.0)], *arguments)


def test_the_best_is_the_one_that_better_says():
    ours, others = at(9, 70.0), [at(1, 71.0), at(2, 72.0), at(3, 73.0, verdict="fail"), at(4, 74.0, examples_digest="x"), at(9, 75.0)]
    assert history.best(ours, others, "rougeL").run == "r02"
    assert history.best(ours, others, "weight_bytes").run == "r01", "better lower"
    assert history.best(ours, others, "ttft [batch 1, prompt 8]").run == "r01"
    with pytest.raises(
        InputError, match=r"it is measured at 2 points; name one of ttft \[batch 1, prompt 8\], ttft \[batch 16, prompt 8\]"
    ):
        history.best(ours, others, "ttft")
    with pytest.raises(InputError, match="neither more nor less of it is better"):
        history.best(ours, others, "generated_tokens")
    with pytest.raises(ReportError, match="no other report there passed"):
        history.best(ours, others[2:], "rougeL")


def test_history_from_the_command_line(tmp_path, monkeypatch):
    """A path with a blank, a report of another version, a half-copied one, names that are markup and escape sequences."""
    folder = tmp_path / "my reports"
    for day in range(1, 9):
        report = at(day, 70.0 + day % 2 / 5 - 3 * (day > 6), f"{day}" * 40 + "-dirty" * (day == 7), name="[red]x\x1b[31m")
        (folder / report.run).mkdir(parents=True)
        (folder / report.run / "report.json").write_text(report.model_dump_json())
    for name, text in (("old", '{"format": 0}'), ("half", (folder / "r01" / "report.json").read_text()[:700])):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(text)
    monkeypatch.setenv("COLUMNS", "80")
    shown = program("history", folder, "--metric", "rougeL")
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "[red]x\N{REPLACEMENT CHARACTER}[31m: rougeL, better higher; on Epyc" in shown.stdout and "\x1b" not in shown.stdout
    assert "a change at 2026-11-07 10:15, commit 7777777-dirty: from 70.10 to 67.10" in shown.stdout
    assert f"{folder}/old/report.json: report format 0; this version reads format 1" in shown.stderr
    assert f"{folder}/half/report.json: damaged" in shown.stderr
    answer = json.loads(program("history", folder, "--metric", "rougeL", "--json").stdout)
    (line,) = answer["lines"]
    assert [run["commit"][0] for run in line["runs"]] == list("12345678")
    assert (line["changes"][0]["first"], len(answer["damaged"])) == (6, 2)
