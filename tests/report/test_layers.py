"""What a report says of each layer."""

import json
from pathlib import Path

import pandas
import pytest

from compress import methods, terminal
from compress.report import layers, markdown, why, write
from compress.report.numbers import share
from compress.results.report import read_report
from compress.results.stages import NOTES, Layer, StageRecord
from tests.report.test_files import made

REFERENCE = Path(__file__).parents[2] / "reports" / "reference"
ODD = "group_size 32 does not divide its 172 columns; it has a scale a row"
NAN = "left out: its inputs hold inf or NaN on the calibration data"


def stage(*entries, method="gptq"):
    return StageRecord(stage={"quantize": method, "bits": 4}, artifact="a", seconds=1, reused=False, layers=list(entries))


def llama(blocks=6):
    """Every block's q in 4 bits, its down_proj with a remark, the last block's up_proj in 8; the head left out, and two layers that saw NaN."""
    entries = [Layer(name=f"model.layers.{n}.self_attn.q_proj", bits=4, error=0.001 * (n + 1)) for n in range(blocks)]
    entries += [Layer(name=f"model.layers.{n}.mlp.down_proj", bits=4, error=0.1 + 0.01 * n, remark=ODD) for n in range(blocks)]
    entries += [Layer(name=f"model.layers.{n}.mlp.gate_proj", remark=NAN) for n in range(2)]
    return [*entries, Layer(name="model.layers.5.mlp.up_proj", bits=8, error=1e-5), Layer(name="lm_head", remark="left out: a head")]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (llama(), "16 layers: 12 in 4 bits, 1 in 8 bits (4.3 a layer on average); 3 left out"),
        ([Layer(name="a", bits=4)], "1 layer: 1 in 4 bits"),
        ([Layer(name="a", bits=32, sparsity=0.5), Layer(name="b", bits=32, sparsity=0.5)], "2 layers: 2 with 50 % zeros"),
        (
            [Layer(name="a", bits=32, sparsity=0.25), Layer(name="b", bits=32, sparsity=0.743), Layer(name="c")],
            "3 layers: 2 with 25 % to 74.3 % zeros; 1 left out",
        ),
        ([Layer(name="a"), Layer(name="b")], "2 layers: 2 left out"),
    ],
)
def test_the_summary_counts_each_layer_once(found, expected):
    assert layers.summary(found) == expected


def test_names_that_differ_in_numbers_stand_together_and_left_out_ones_first():
    assert layers.remarkable(llama()) == [
        ("model.layers.*.mlp.gate_proj (2 layers)", None, NAN),
        ("lm_head", None, "left out: a head"),
        ("model.layers.*.mlp.down_proj (6 layers)", 4, ODD),
    ]


def test_names_together_keep_the_numbers_that_they_share():
    t5 = [Layer(name=f"encoder.block.{n}.layer.1.wo2", remark="left out: x") for n in (0, 11)]
    other = [
        Layer(name="encoder.block.3.layer.1.wo2", remark="left out: y"),
        Layer(name="encoder.block.3.layer.1.wo3", remark="left out: y"),
    ]
    assert [name for name, _, _ in layers.remarkable([*t5, *other])] == [
        "encoder.block.*.layer.1.wo2 (2 layers)", "encoder.block.3.layer.1.wo2", "encoder.block.3.layer.1.wo3",
    ]  # fmt: skip


def test_the_largest_errors_come_first_and_missing_ones_never():
    assert [layer.name for layer in layers.lost_most(llama(), 2)] == ["model.layers.5.mlp.down_proj", "model.layers.4.mlp.down_proj"]
    assert len(layers.lost_most(llama(), 99)) == 13


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.0, "0 %"), (0.00226, "0.226 %"), (1.23e-7, "1.23e-05 %"), (0.15, "15 %"), (0.9999, "100 %"), (1234.5, "123,450 %")],
)
def test_shares_are_percentages(value, expected):
    assert share(value) == expected


def test_the_text_report_lists_the_odd_layers_and_the_ten_worst():
    text = markdown.whole(made(stages=[stage(*llama())]))
    section = text.split("## Layers: quantize: gptq\n\n")[1].split("\n## ")[0]
    assert section.startswith("16 layers: 12 in 4 bits, 1 in 8 bits (4.3 a layer on average); 3 left out. ")
    assert r"| lm\_head | full | left out: a head |" in section
    assert r"| model.layers.\*.mlp.down\_proj (6 layers) | 4 | group\_size 32 does not divide its 172 columns;" in section
    worst = section.split("| error |\n")[1].splitlines()[1:]
    assert len(worst) == 10
    assert worst[0] == r"| model.layers.5.mlp.down\_proj | 4 | 15 % |"
    assert worst[-1] == r"| model.layers.2.self\_attn.q\_proj | 4 | 0.3 % |"


def test_pruned_layers_are_shown_with_their_zeros():
    text = markdown.whole(made(stages=[stage(Layer(name="a", bits=32, sparsity=0.5, error=0.03))]))
    assert "| layer | zeros | error |" in text and "| a | 50 % | 3 % |" in text


def test_a_name_or_remark_is_shown_as_text():
    evil = Layer(name="a|<b>\x1b[31m", remark="left out: ![x](http://y)")
    text = markdown.whole(made(stages=[stage(evil)]))
    assert r"| a\|&lt;b&gt;" in text and r"\!\[x\](http://y)" in text
    assert "\x1b" not in text


def test_errors_that_nobody_measured_are_not_shown_as_none():
    text = markdown.whole(made(stages=[stage(Layer(name="a", bits=8), method="bnb_int8")]))
    assert "What each layer lost was not measured." in text
    assert "lost most;" not in text


def test_a_stage_without_layers_has_no_section():
    assert "## Layers" not in markdown.whole(made())


def test_the_text_report_says_what_is_unpacked_and_when():
    text = markdown.whole(made(stages=[stage(method="bnb_nf4"), stage(method="no_longer_there")]))
    row, gone = (
        next(line for line in text.splitlines() if line.startswith(f"| quantize: {name}")) for name in (r"bnb\_nf4", r"no\_longer")
    )
    assert row.endswith(f"| {methods.find('quantize', 'bnb_nf4').ABOUT.at_run_time} |")
    assert gone.endswith("| - |")


def test_layers_have_a_frame_of_their_own(tmp_path):
    written = write.write(made(stages=[stage(method="cast"), stage(*llama())]), tmp_path / "r1")
    assert read_report(tmp_path / "r1") == written
    frame = pandas.read_parquet(tmp_path / "r1" / "layers.parquet")
    assert list(frame.columns) == ["stage", "name", "bits", "error", "sparsity", "remark"]
    assert len(frame) == 16
    assert set(frame.stage) == {"quantize: gptq"}
    head = frame.set_index("name").loc["lm_head"]
    assert (head.bits, head.error, head.remark) == (pandas.NA, pandas.NA, "left out: a head")
    assert frame.set_index("name").loc["model.layers.5.mlp.up_proj", "bits"] == 8


def test_a_terminal_gets_one_line_a_stage(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    terminal.show_report(made(stages=[stage(method="cast"), stage(*llama())]))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines() if "layers" in line] == [
        "quantize: gptq: 16 layers: 12 in 4 bits, 1 in 8 bits (4.3 a layer on average); 3 left out; model.layers.5.mlp.down_proj lost most, 15 % of its output"
    ]


def test_a_terminal_says_how_a_missing_method_is_installed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    missing = {"family": "quantize", "method": "m", "about": "A.", "at_run_time": "b", "devices": ["cuda"], "installed": False}
    terminal.show_methods([{**missing, "extra": "x", "install": "pip install 'one>=2' two"}])
    output = " ".join(capsys.readouterr().out.split())
    assert "cuda; not installed In use: b." in output
    assert output.endswith("Install with: pip install 'one>=2' two")


def test_layers_left_out_unasked_are_told():
    entries = llama() + [Layer(name=f"experts.{n}", remark="left out: no calibration example reached it") for n in range(5)]
    entries += [
        Layer(name="b", remark="left out: named under ignore"),
        Layer(name="c", remark="left out: its inputs are all zero on the calibration data"),
    ]
    assert why.notes([stage(*entries)], [], {}, []) == [
        "quantize: gptq left 2 layers in full precision (model.layers.0.mlp.gate_proj, model.layers.1.mlp.gate_proj), each because its inputs hold"
        " inf or NaN on the calibration data.",
        "quantize: gptq left 5 layers in full precision (experts.0, experts.1, experts.2 and 2 more), each because no calibration example reached it.",
        "quantize: gptq left 1 layer in full precision (c) because its inputs are all zero on the calibration data.",
    ]


def test_layers_left_out_as_asked_are_no_news():
    reasons = ("a head", "named under ignore", "stands outside the blocks", "no pattern of bits names it")
    asked = [Layer(name=reason, remark=f"left out: {reason}") for reason in reasons]
    assert why.notes([stage(*asked, Layer(name="d", bits=4, remark=ODD), Layer(name="old"))], [], {}, []) == []


def test_what_a_method_notes_is_what_a_report_reads(tmp_path):
    context = methods.Context("cpu", methods.quiet)
    context.remarks["b"] = ODD
    context.note("a", 4, 0.5)
    context.note("b", 4, float("inf"))
    context.leave_out("c", "a head")
    (tmp_path / NOTES).write_text(json.dumps({"layers": context.layers, "said": []}))
    assert write.read_notes(tmp_path)["layers"] == [
        Layer(name="a", bits=4, error=0.5),
        Layer(name="b", bits=4, remark=f"{ODD}; its error overflowed and could not be measured"),
        Layer(name="c", remark="left out: a head"),
    ]
    assert write.read_notes(tmp_path / "nowhere") == {"layers": [], "account": None, "said": [], "curve": []}


def test_reports_of_earlier_versions_are_read(tmp_path):
    write.write(made(stages=[stage(Layer(name="a", bits=4))]), tmp_path / "r1")
    file = tmp_path / "r1" / "report.json"
    data = json.loads(file.read_text())
    data["stages"][0]["layers"] = [
        {"name": "a", "bits": 4, "error": 0.1},
        {"name": "b", "bits": None, "left_out": "stands outside the blocks"},
    ]
    file.write_text(json.dumps(data))
    assert read_report(file).stages[0].layers == [Layer(name="a", bits=4, error=0.1), Layer(name="b")]
    del data["stages"][0]["layers"]
    file.write_text(json.dumps(data))
    assert read_report(file).stages[0].layers == []


@pytest.mark.parametrize("folder", sorted(REFERENCE.iterdir()), ids=lambda folder: folder.name)
def test_reference_reports_are_read_and_shown(folder, capsys):
    report = read_report(folder)
    assert markdown.whole(report).startswith(f"# {report.recipe}{report.inside}: ")
    terminal.show_report(report)
    assert "artifact" in capsys.readouterr().out
