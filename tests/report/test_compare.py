"""Many reports in one table: what stands in it, in which order, what is refused, and how it looks."""

import csv
import io
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from compress import cli, terminal
from compress.errors import InputError, ReportError
from compress.report import compare, write
from compress.report.verdict import compare as compared
from compress.report.verdict import pairs
from compress.results.report import read_report
from compress.results.sides import Comparison, GateResult, Measurement, Side
from tests.report.test_files import made

COMMITTED = sorted((Path(__file__).parents[2] / "reports").glob("*/**/report.json"))
HOSTILE = "\x1b[31m<script>alert(1)</script> \u202eevil | `a` 数🙂 $x_1$ %"


def one(name, folder, rouge=70.9, size=1e6, speed=0.02, **changes):
    """A report with its comparisons, on disk."""
    values = {"baseline": (71.5, 4e6, 0.02), "candidate": (rouge, size, speed)}
    sides = [
        Side(role=role, model=f"/models/{role}", measurements=[
            Measurement(metric="rougeL", value=score, samples=[[score + (n % 7 - 3) * (1 + n % 2)] for n in range(40)]),
            Measurement(metric="weight_bytes", value=bytes_),
            Measurement(
                metric="latency_p50", value=latency, batch_size=1, prompt_tokens=64,
                samples=[[latency] * 2, [latency] * 2] if latency else [], reason=None if latency else "out of memory",
            ),
        ])
        for role, (score, bytes_, latency) in values.items()
    ]  # fmt: skip
    comparisons = [compared(pair, 0.95) for pair in pairs(*sides, same_run=True)]
    return write.write(made(name, run=folder.name, sides=sides, comparisons=comparisons, **changes), folder)


def verb(*arguments):
    options = cli.parser().parse_args(["compare", *map(str, arguments)])
    return options.call(options)


@pytest.fixture
def three(tmp_path, monkeypatch):
    """One that is best in quality, one in size and speed, and one that is worse than the first and ran out of memory."""
    monkeypatch.delenv("COLUMNS", raising=False)  # a width that the tests were started with
    one("good", tmp_path / "good", rouge=71.9, size=2e6, speed=0.02)
    one("small", tmp_path / "small", rouge=68.0, size=1e6, speed=0.01)
    one("lost", tmp_path / "lost", rouge=70.0, size=3e6, speed=None)
    return tmp_path


def names(output):
    return [row["name"].split(" ")[0] for row in json.loads(output)]


def test_many_candidates_share_one_baseline(three, capsys):
    assert verb(three, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["role"] for row in rows] == ["baseline", "candidate", "candidate", "candidate"]
    by_recipe = {row["recipe"]: row for row in rows if row["role"] == "candidate"}
    small = by_recipe["small"]["compared"]
    assert small["weight_bytes"] == {"kind": "ratio", "estimate": 0.25, "low": 0.25, "high": 0.25}
    assert small["rougeL"]["kind"] == "difference"
    assert small["rougeL"]["estimate"] == pytest.approx(-3.5)
    one("other", three / "other", settings={**made().settings, "model": {"id": "other"}})
    verb(three, "--json")
    assert [row["role"] for row in json.loads(capsys.readouterr().out)][:3] == ["baseline", "baseline", "candidate"]


def test_missing_is_missing_in_every_format(three, capsys):
    label = "latency_p50 [batch 1, prompt 64]"
    texts = {}
    for style in ("table", "md", "csv", "json", "latex", "html"):
        assert verb(three, "--format", style, "--columns", "latency_p50", "--sort", label) == 0
        texts[style] = capsys.readouterr().out
    last = json.loads(texts["json"])[-1]
    assert (last["recipe"], last["figures"], last["compared"]) == ("lost", {label: None}, {})
    line = list(csv.DictReader(io.StringIO(texts["csv"])))[-1]
    assert (line["recipe"], line[f"{label} (s)"], line[f"{label} estimate"]) == ("lost", "", "")
    for style in ("table", "md", "latex", "html"):
        (shown,) = [line for line in texts[style].splitlines() if "lost" in line]
        assert "out of memory" in shown
        assert "20.0 ms" in texts[style] and "10.0 ms (x0.500)" in texts[style]


@pytest.mark.parametrize(
    ("kind", "estimate", "low", "high", "shown"),
    [
        ("difference", -0.6, -1.1, -0.1, "70.90 (-0.60)"),
        ("difference", -0.6, -1.1, 0.1, "70.90 (≈ -0.60)"),
        ("ratio", 0.98, 0.96, 0.99, "70.90 (x0.980)"),
        ("ratio", 0.98, 0.96, 1.01, "70.90 (≈ x0.980)"),
        ("ratio", 1.0, 1.0, 1.0, "70.90 (x1.000)"),
        ("difference", -0.6, None, None, "70.90 (-0.60)"),
        ("difference", None, None, None, "70.90"),
    ],
)
def test_a_change_that_may_be_none_is_marked(kind, estimate, low, high, shown):
    change = Comparison(metric="rougeL", baseline=71.5, candidate=70.9, kind=kind, estimate=estimate, low=low, high=high)
    _, body = compare.cells(compare.rows([made(comparisons=[change])]), ["rougeL"])
    assert [row[-1] for row in body] == ["71.50", shown]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("rougeL", ["good", "baseline", "lost", "small"]),
        ("rougeL:reverse", ["small", "lost", "baseline", "good"]),
        ("weight_bytes", ["small", "good", "lost", "baseline"]),
        ("weight_bytes:reverse", ["baseline", "lost", "good", "small"]),
        ("latency_p50", ["small", "baseline", "good", "lost"]),
        ("latency_p50:reverse", ["baseline", "good", "small", "lost"]),
    ],
)
def test_sorted_by_what_is_better_and_missing_last(three, sort, expected, capsys):
    verb(three, "--sort", sort, "--json")
    assert names(capsys.readouterr().out) == expected


def test_only_models_that_no_other_beats(three, capsys):
    verb(three, "--pareto", "--columns", "rougeL", "weight_bytes", "--json")
    assert names(capsys.readouterr().out) == ["good", "small"]
    verb(three, "--pareto", "--columns", "rougeL", "--json")
    assert names(capsys.readouterr().out) == ["good"]


def test_unknown_figures_are_named(three):
    with pytest.raises(ReportError, match="no report has a figure 'weight_byte'; did you mean 'weight_bytes'"):
        verb(three, "--columns", "weight_byte")
    both = [m.model_copy(update={"batch_size": size}) for m in made().sides[0].measurements[2:3] for size in (1, 8)]
    grid = made(sides=[Side(role="candidate", model="m", measurements=both)])
    with pytest.raises(ReportError, match=r"name one of 'latency_p50 \[batch 1, prompt 64\]', 'latency_p50 \[batch 8, prompt 64\]'"):
        compare.ranked(compare.rows([grid]), "latency_p50")


SETTINGS = made().settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"examples_digest": "other"}, "the digest of the examples other, elsewhere e"),
        ({"environment": {"device": "cpu", "threads": 1}}, "threads 1, elsewhere not set"),
        ({"settings": {**SETTINGS, "generation": {"num_beams": 4}}}, "generation.num_beams 4, elsewhere not set"),
        ({"settings": {**SETTINGS, "benchmark": {"runtime": {"compile": True}}}}, "benchmark.runtime.compile True, elsewhere not set"),
    ],
)
def test_what_was_not_measured_alike_is_refused_unless_wanted(three, changes, said, capsys):
    odd = one("odd", three / "odd", **changes)
    with pytest.raises(ReportError) as caught:
        verb(three)
    assert str(odd.folder) in str(caught.value) and said in str(caught.value) and "--unlike" in str(caught.value)
    for style in ("table", "md", "latex", "html"):
        assert verb(three, "--unlike", "--format", style) == 0
        text = "".join(sign for sign in capsys.readouterr().out if sign not in "\\{}")
        assert f"[1] not measured as most were: {said}" in text.replace("_{}", "_")
        assert [line.split("[1]")[0].strip(" |<tr>d&") for line in text.splitlines() if "[1]" in line][:2] == [
            "baseline baseline", "odd (quantize: bnb_nf4)",
        ]  # fmt: skip
    verb(three, "--unlike", "--json")
    assert [row["unlike"] for row in json.loads(capsys.readouterr().out) if row["recipe"] in ("odd", "good")] == [[], [said], [], [said]]


def test_what_an_older_report_does_not_say_was_off(three):
    one("newer", three / "newer", settings={**SETTINGS, "benchmark": {"runtime": {"compile": False}, "threads": None}})
    assert verb(three) == 0


def test_damaged_reports_are_named_and_the_others_go_on(three, capsys):
    for name, spoil in {
        "half": lambda text: text[: len(text) // 2],
        "newer": lambda text: text.replace('"format": 1', '"format": 99'),
        "odd": lambda text: text.replace('"sides"', '"sights"'),
        "wrong": lambda text: text.replace('"measurements": [', '"measurements": 3, "were": ['),
        "empty": lambda text: "",
    }.items():
        (three / name).mkdir()
        (three / name / "report.json").write_text(spoil((three / "good" / "report.json").read_text()))
    assert verb(three, "--json") == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)) == 4
    lines = dict(zip(("empty", "half", "newer", "odd", "wrong"), told.err.splitlines(), strict=True))
    assert all(str(three / name / "report.json") in line for name, line in lines.items())
    assert "damaged, not JSON" in lines["half"] and "format 99; this version reads format 1" in lines["newer"]
    assert "sides: Field required" in lines["odd"] and "sides.0.measurements: Input should be a valid list" in lines["wrong"]
    for name in ("good", "small", "lost"):
        shutil.rmtree(three / name)
    with pytest.raises(ReportError, match="damaged"):
        verb(three)


def test_a_recipe_means_its_newest_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, size in (("20260102-000000-aa", 1e6), ("20260103-000000-aa", 2e6), ("20260101-000000-aa", 3e6)):
        one("mine", tmp_path / "my runs" / "mine" / run, size=size)
    (tmp_path / "mine.yaml").write_text("version: 1")
    for place in ("mine", "mine.yaml", tmp_path / "mine.yaml"):
        assert verb(place, "--out", "my runs", "--json") == 0
        assert json.loads(capsys.readouterr().out)[-1]["run"] == "20260103-000000-aa"
    verb("my runs/mine", "--json")
    assert len(json.loads(capsys.readouterr().out)) == 4, "a folder means all that is in it"
    with pytest.raises(ReportError, match="yours: there is no report here, and none of such a recipe in my runs/yours"):
        verb("yours", "--out", "my runs")


@pytest.mark.parametrize("width", [80, 120, 300])
def test_a_terminal_shows_every_figure_whatever_its_width(three, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    one(HOSTILE, three / "hostile")
    one("as 🙂 long " * 9, three / "long")
    assert verb(three) == 0
    *pieces, _ = (shown := capsys.readouterr().out).split("\n\n")
    assert (len(pieces) > 1) == (width == 80)
    for piece in pieces:
        lines = piece.splitlines()
        rule = next(line for line in lines if line.startswith("─"))
        assert max(map(cell_len, lines)) <= width
        ends = [number for number, sign in enumerate(rule) if sign == " "][1::2]
        for line in lines[lines.index(rule) + 1 :]:
            padded = "".join(sign + "\0" * (cell_len(sign) - 1) for sign in line)
            assert all(padded[end : end + 1] in ("", " ") for end in ends), "columns stand below each other"
    for figure in ("rougeL", "weight_bytes", "latency_p50"):
        assert figure in shown
    assert "�" in shown and "\x1b" not in shown and "\u202e" not in shown


def test_check_takes_what_compare_takes_and_the_worst_decides(three, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gates = tmp_path / "gates.yaml"
    gates.write_text("rougeL: {max_drop: 1.0}\n")

    def check(*arguments):
        options = cli.parser().parse_args(["check", *map(str, arguments), "--gates", str(gates)])
        return options.call(options)

    assert check("good", "--json") == 0 and json.loads(capsys.readouterr().out)["verdict"] == "pass"
    assert check("good", "sm*", "--json", "--junit", "all.xml") == 1
    assert [report["verdict"] for report in json.loads(capsys.readouterr().out)] == ["pass", "fail"]
    suites = ElementTree.parse("all.xml").getroot()
    assert [(suite.get("name"), suite.get("failures")) for suite in suites] == [("good", "0"), ("small", "1")]
    assert suites.get("tests") == "2"
    assert check(three) == 1, "a folder means all that is in it"
    with pytest.raises(InputError, match="3 reports lie there"):
        check("good", "--against", three)


def test_a_search_shows_every_gate_what_is_minimised_and_why_not(three, capsys):
    settings = {"check": {"latency_p50": {"max_ratio": 1}, "accuracy": {"min": 1}}, "data": {}, "generation": {}, "benchmark": {}}
    reports = [read_report(three / name).model_copy(update={"settings": settings}) for name in ("good", "small")]
    reports[1] = reports[1].model_copy(update={"verdict": "fail", "decided_by": "latency is x3"})
    assert compare.decisive(compare.rows(reports), reports, "weight_bytes")[:2] == ["latency_p50 [batch 1, prompt 64]", "weight_bytes"]
    terminal.show_comparison(reports, "weight_bytes")
    shown = capsys.readouterr().out
    assert "FAIL: latency is x3" in shown and shown.index("latency_p50") < shown.index("weight_bytes") < shown.index("rougeL")


def test_few_models_are_turned_on_their_side_where_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    one("toy", tmp_path / "toy")
    verb(tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["model", "baseline", "baseline", "toy", "(quantize:", "bnb_nf4)"]
    assert any(line.startswith("latency_p50") for line in shown)


def test_text_is_shown_as_text_in_every_format(three, capsys):
    one(HOSTILE, three / "hostile")
    for style in ("table", "md", "latex", "html"):
        verb(three, "--format", style)
        text = capsys.readouterr().out
        assert "\x1b" not in text and "\u202e" not in text and "alert(1)" in text
        if style in ("md", "html"):
            assert "<script" not in text
        if style == "latex":
            assert r"\$x\_1\$ \%" in text and r"\textless{}script\textgreater{}" in text


def test_figures_alone_are_the_same_figures():
    assert len(COMMITTED) > 50
    for file in COMMITTED[::3]:
        whole, figures = read_report(file), read_report(file, figures_only=True)
        assert figures.predictions == [] and all(record.layers == [] for record in figures.stages)
        for key in ("recipe", "digest", "settings", "environment", "comparisons", "gates", "verdict", "notes", "folder", "line"):
            assert getattr(whole, key) == getattr(figures, key)
        for ours, theirs in zip(whole.sides, figures.sides, strict=True):
            assert ours.values() == theirs.values()
            assert [len(m.samples) for m in ours.measurements] == [m.rows for m in theirs.measurements]
            assert not any(m.samples for m in theirs.measurements)  # nine tenths of the time that a table of many takes


def test_every_gate_and_why_it_fails_stand_below_the_figures(tmp_path, capsys, monkeypatch):
    """As sweeps and searches end: a row a recipe and a column a gate, then what decided against which."""
    monkeypatch.setenv("COLUMNS", "80")

    def gate(verdict, estimate, metric="rougeL", **point):
        return GateResult(
            metric=metric, limit_kind="max_drop" if metric == "rougeL" else "max_ratio", limit=1, estimate=estimate, interval=(estimate, 2),
            verdict=verdict, sentence="", **point,
        )  # fmt: skip

    slow = gate("fail", 1.5, "latency_p50", batch_size=1, prompt_tokens=64)
    reports = [
        one("toy+bits=2", tmp_path / "a", gates=[gate("cannot_tell", 0.6), slow], verdict="fail", decided_by="latency ratio is 1.5"),
        one("toy+bits=8", tmp_path / "b", gates=[gate("pass", 0.1)]),
    ]
    terminal.show_comparison(reports, "weight_bytes")
    _, below = capsys.readouterr().out.split("\nrecipe", 1)
    gates, reasons = below.split("didn't pass", 1)
    assert "cannot tell yet 0.6 (0.6 to 2)" in gates and "FAIL 1.5 (1.5 to 2)" in gates and "pass 0.1 (0.1 to 2)" in gates
    assert "max_ratio 1" in gates and "prompt 64" in gates
    assert "latency ratio is 1.5" in reasons and "toy+bits=8" not in reasons
