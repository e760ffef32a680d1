"""Reports in pandas: types, what is missing, the Pareto front, what a notebook shows."""

import subprocess
import sys
from pathlib import Path

import nbformat
import numpy
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as some
from nbclient import NotebookClient

import compress
from compress.errors import ReportError
from compress.recipe import Gate
from compress.report import verdict
from compress.report.frame import COLUMNS, frame
from compress.report.tradeoff import pareto
from tests.report.test_compare import HOSTILE, one
from tests.report.test_files import made

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def loaded(tmp_path):
    check = {"weight_bytes": Gate(max_ratio=0.5, max=2.5e6)}
    for name, rouge, size in (("good", 71.9, 2e6), ("small", 68.0, 1e6), ("worse", 70.0, 3e6)):
        report = one(name, tmp_path / "draft" / name, rouge=rouge, size=size, speed=None if name == "worse" else 0.01)
        results = verdict.gates(check, verdict.pairs(*report.sides, True), *report.sides, 0.95)
        one(name, tmp_path / "in" / name, rouge=rouge, size=size, speed=None if name == "worse" else 0.01, gates=results)
    return compress.load_reports(tmp_path / "in")


def test_columns_are_typed_and_parquet_keeps_them(loaded, tmp_path):
    assert loaded.dtypes.astype(str).to_dict() == COLUMNS
    loaded.to_parquet(tmp_path / "all.parquet", index=False)
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "all.parquet"), loaded)
    beside = pandas.read_parquet(tmp_path / "in" / "small" / "measurements.parquet")
    pandas.testing.assert_frame_equal(beside, loaded[loaded.recipe == "small"].reset_index(drop=True))
    documented = compress.load_reports.__doc__
    assert [column for column in COLUMNS if column not in documented] == []


def test_candidates_have_their_intervals_and_gates(loaded):
    candidates = loaded[loaded.role == "candidate"].set_index(["recipe", "metric"])
    assert tuple(candidates.loc[("small", "weight_bytes"), ["kind", "estimate", "low", "high"]]) == ("ratio", 0.25, 0.25, 0.25)
    assert candidates.loc[("small", "rougeL"), "estimate"] == pytest.approx(-3.5)
    assert candidates.loc[("small", "rougeL"), "samples"] == 40
    assert candidates.loc[("worse", "latency_p50"), ["value", "estimate", "low", "gate"]].isna().all()
    assert candidates.loc[("worse", "latency_p50"), "reason"] == "out of memory"
    gates = {recipe: candidates.loc[(recipe, "weight_bytes"), "gate"] for recipe in ("good", "small", "worse")}
    assert gates == {"good": "pass", "small": "pass", "worse": "fail"}
    assert loaded[loaded.role == "baseline"][["kind", "estimate", "low", "high", "gate"]].isna().all(axis=None)
    assert loaded.created.iloc[0] == pandas.Timestamp("2026-01-01", tz="UTC")
    assert frame([made(created="yesterday")]).created.isna().all()


def test_a_row_a_model_and_a_column_a_figure(loaded):
    wide = compress.pivot(loaded)
    assert list(wide.columns) == ["rougeL", "weight_bytes", "latency_p50 [batch 1, prompt 64]"]
    rows = wide.reset_index().set_index(["recipe", "role"])
    assert rows.weight_bytes[("small", "candidate")] == 1e6
    assert rows["latency_p50 [batch 1, prompt 64]"][("worse", "candidate")] is pandas.NA
    assert len(wide) == 6


def test_a_damaged_report_is_warned_of(loaded, tmp_path):
    (tmp_path / "in" / "good" / "report.json").write_text("{")
    with pytest.warns(UserWarning, match=r"good.report\.json: damaged, not JSON"):
        assert compress.load_reports(tmp_path / "in").recipe.unique().tolist() == ["small", "worse"]


DIRECTIONS = ["higher", "lower", "neither"]
ROWS = some.integers(1, 4).flatmap(
    lambda width: some.tuples(
        some.lists(some.tuples(*[some.none() | some.integers(-3, 3).map(float)] * width), max_size=12),
        some.tuples(*[some.sampled_from(DIRECTIONS)] * width),
    )
)


@given(ROWS)
def test_the_pareto_front_is_what_its_definition_says(drawn):
    rows, better = drawn

    def beats(a, b):
        worth = {"higher": lambda v: -numpy.inf if v is None else v, "lower": lambda v: -numpy.inf if v is None else -v}
        pairs = [(worth[d](x), worth[d](y)) for x, y, d in zip(a, b, better, strict=True) if d != "neither"]
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    assert pareto(rows, better) == [not any(beats(other, row) for other in rows) for row in rows]


def values(drawn):
    return drawn["datasets"][drawn["data"]["name"]]


def test_the_trade_off_has_a_point_a_model(loaded):
    x, y = "weight_bytes (MB, lower is better)", "rougeL (points, higher is better)"
    drawn = compress.plot_tradeoff(loaded).to_dict()
    points = {point["name"]: (point[f"value of {x}"], point[f"value of {y}"]) for point in values(drawn)}
    assert points["small: quantize: bnb_nf4"] == (1.0, 68.0)
    assert points["good: baseline"] == (4.0, 71.5)
    assert {param["name"]: param.get("value") for param in drawn["params"] if param["name"] in ("across", "up")} == {"across": x, "up": y}
    fast = compress.plot_tradeoff(loaded, x="latency_p50 [batch 1, prompt 64]", y="weight_bytes").to_dict()
    timed = {point["name"] for point in values(fast) if any("latency" in key for key in point)}
    assert "small: quantize: bnb_nf4" in timed and "worse: quantize: toy" not in timed, "it has no latency"
    with pytest.raises(ReportError, match="no report has a figure 'rouge'; did you mean 'rougeL'"):
        compress.plot_tradeoff(loaded, y="rouge")
    with pytest.raises(ReportError, match="neither more nor less of generated_tokens is better"):
        compress.plot_tradeoff(loaded.assign(metric=loaded.metric.replace("rougeL", "generated_tokens")), y="generated_tokens")


def test_a_report_shows_itself_as_text_in_a_table(tmp_path):
    report = made(HOSTILE, decided_by=HOSTILE)
    shown = report._repr_html_()
    assert "<script" not in shown and "\x1b" not in shown and "\u202e" not in shown and "&lt;script&gt;" in shown
    assert "<td>weight_bytes</td><td>4.00 MB</td><td>1.00 MB</td>" in shown
    assert "<td>out of memory</td>" in shown
    assert "samples" not in repr(report)
    one("toy", tmp_path / "r")
    code = f"import compress, sys; compress.read_report({str(tmp_path / 'r')!r})._repr_html_(); assert not {{'torch', 'pandas', 'numpy'}} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("file", sorted(DOCS.glob("*.ipynb")), ids=lambda file: file.name)
def test_a_notebook_of_the_docs_runs(file):
    notebook = nbformat.read(file, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "outputs aren't kept"
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(DOCS)}}).execute()
    shown = [output["data"] for cell in cells for output in cell.outputs if output.output_type == "execute_result"]
    assert len(shown) >= 2, "others print, or prepare what comes"
    assert all("text/html" in data for data in shown)
