"""What a report leaves on disk, and how it is read back."""

import json
from pathlib import Path

import pandas
import pytest

import compress
from compress.errors import NoSpace, ReportError
from compress.files import whole_folder, write_whole
from compress.report import markdown, write
from compress.results.report import Prediction, Report, read_report
from compress.results.sides import Measurement, Side
from compress.results.stages import Point, StageRecord


def made(name="toy", run="r1", verdict="pass", **changes):
    sides = [
        Side(role=role, model=f"/models/{role}", measurements=[
            Measurement(metric="rougeL", value=value, samples=[[value - 1], [value + 1]]),
            Measurement(metric="weight_bytes", value=size),
            Measurement(metric="latency_p50", value=0.02, batch_size=1, prompt_tokens=64, samples=[[0.02], [0.021]], raw=[[0.02], [0.021]]),
            Measurement(metric="latency_p50", value=None, batch_size=8, prompt_tokens=64, reason="out of memory"),
        ])
        for role, value, size in (("baseline", 71.5, 4e6), ("candidate", 70.9, 1e6))
    ]  # fmt: skip
    predictions = [
        Prediction(id="x|1", prompt="<script>alert(1)</script>\n\x1b[31mred | pipe", references=["a"], baseline="b", candidate="\u202eevil",
                baseline_score=80.0, candidate_score=10.0),
        Prediction(id="2", prompt="p", references=["a"], baseline="b", candidate="c", baseline_score=50.0, candidate_score=60.0),
    ]  # fmt: skip
    return Report(**{
        "recipe": name, "run": run, "created": "2026-01-01T00:00:00+00:00", "digest": "d", "examples_digest": "e",         "settings": {"check": {}, "model": {}, "data": {}, "generation": {}, "benchmark": {}}, "environment": {"device": "cpu"}, "sides": sides, "verdict": verdict, "decided_by": "every gate holds",
        "stages": [StageRecord(stage={"quantize": "bnb_nf4"}, artifact="a", seconds=1, reused=False)], "score": "rougeL", "predictions": predictions,
        **changes,
    })  # fmt: skip


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    written = write.write(made(), tmp_path / "r1")
    assert sorted(f.name for f in (tmp_path / "r1").iterdir()) == [
        "measurements.parquet",
        "predictions.parquet",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert read_report(tmp_path / "r1") == written
    assert read_report(tmp_path / "r1" / "report.json").predictions == written.predictions


def test_the_curve_of_a_training_is_shown_and_kept(tmp_path):
    losses = [Point(step=step, tokens=10 * step, loss=5 - step / 10, learning_rate=1e-3, grad_norm=None) for step in range(1, 31)]
    looks = [Point(step=10, validation=0.0), Point(step=20, validation=31.25), Point(step=30)]
    record = StageRecord(stage={"distill": "logits"}, artifact="a", seconds=1, reused=False, curve=[*losses, *looks])
    report = made(stages=[record])
    write.write(report, tmp_path / "r1")
    text = (tmp_path / "r1" / "report.md").read_text()
    assert "## Training: distill: logits\n\n| step | loss | validation |\n| --- | --- | --- |\n| 10 | 4 | 0 |\n| 20 | 3 | 31.25 |\n" in text
    kept = pandas.read_parquet(tmp_path / "r1" / "curves.parquet")
    assert kept.stage.unique().tolist() == ["distill: logits"]
    assert kept.loss[:30].tolist() == [5 - step / 10 for step in range(1, 31)]
    assert kept.validation[30:32].tolist() == [0.0, 31.25]
    assert kept.grad_norm.isna().all()
    plain = markdown.whole(made(stages=[record.model_copy(update={"curve": losses})]))
    lines = plain.split("## Training: distill: logits")[1].splitlines()[2:16]
    assert lines[0] == "| step | loss |"
    assert [line.split(" | ")[0] for line in lines[2:13]] == [
        "| 1",
        "| 4",
        "| 7",
        "| 10",
        "| 13",
        "| 16",
        "| 19",
        "| 22",
        "| 25",
        "| 28",
        "| 30",
    ]


def test_the_frame_is_tidy_and_missing_is_missing(tmp_path):
    write.write(made(), tmp_path / "a" / "r1")
    write.write(made(run="r2"), tmp_path / "a" / "r2")
    frame = compress.load_reports(tmp_path / "a")
    assert len(frame) == 16
    candidate = frame[(frame.run == "r1") & (frame.role == "candidate")].set_index(["metric", "batch_size"])
    assert candidate.loc[("latency_p50", 8), "value"] is pandas.NA
    assert candidate.loc[("latency_p50", 8), "reason"] == "out of memory"
    assert tuple(candidate.loc[("latency_p50", 1), ["value", "unit", "better"]]) == (0.02, "s", "lower")
    parquet = pandas.read_parquet(tmp_path / "a" / "r1" / "measurements.parquet")
    assert list(parquet.columns) == list(frame.columns)
    assert compress.load_reports(str(tmp_path / "a" / "*1")).run.unique().tolist() == ["r1"]


def test_predictions_keep_every_output(tmp_path):
    write.write(made(), tmp_path / "r1")
    frame = pandas.read_parquet(tmp_path / "r1" / "predictions.parquet")
    assert frame.candidate.tolist() == ["\u202eevil", "c"]
    assert frame.baseline_score.tolist() == [80.0, 50.0]


def test_the_text_report_shows_outputs_as_text(tmp_path):
    text = markdown.whole(made())
    assert "\x1b" not in text and "\u202e" not in text and "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "rougeL 80.0 to 10.0" in text
    assert "# a | b" not in text
    assert "50.0 to 60.0" not in text, "it gained"
    assert r"| latency\_p50 \[batch 8, prompt 64\] | out of memory | out of memory | - | lower |" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged, not JSON"),
        ("[]", "not a report of this program"),
        ('{"format": 99}', "report format 99; this version reads format 1"),
        ('{"format": 1}', "damaged: recipe: Field required"),
        ('{"format": true}', "report format True"),
        ("[" * 100_000, "damaged, not JSON"),
    ],
)
def test_damaged_reports_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ReportError, match=message) as caught:
        read_report(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("sides",), [], "its sides are none; allowed are a candidate, and a baseline before it"),
        (("sides", 0, "role"), "candidate", "its sides are candidate, candidate; allowed"),
        (("sides", 1, "measurements", 0, "metric"), "rougeX", "there is no metric 'rougeX'"),
        (("sides", 1, "measurements", 0, "samples"), [], "rougeL has no samples"),
        (("sides", 1, "measurements", 0, "samples"), [[1.0], [1.0, 2.0]], "rougeL has samples of unequal width"),
        (("sides", 1, "measurements", 0, "value"), float("nan"), "finite number"),
        (("settings", "check"), None, r"settings\.check is missing"),
        (("settings", "check"), {"rougeL": {"max_dorp": 1}}, "Extra inputs are not permitted"),
        (("stages", 0, "stage"), {}, "a stage without a name"),
    ],
)
def test_reports_edited_by_hand_are_refused_by_name(tmp_path, where, value, message):
    write.write(made(), tmp_path / "r1")
    file = tmp_path / "r1" / "report.json"
    spot = data = json.loads(file.read_text())
    for key in where[:-1]:
        spot = spot[key]
    spot[where[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ReportError, match=message):
        read_report(file)


def test_no_report_at_all(tmp_path):
    with pytest.raises(ReportError, match="there is no report here"):
        read_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="there is no report here"):
        compress.load_reports(tmp_path)


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "x") as partial:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(NoSpace, match="free some space and run again"), whole_folder(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all_and_a_device_stays_one(tmp_path):
    file = tmp_path / "x"
    write_whole(file, "before")
    with pytest.raises(NoSpace, match=r"the disk filled while /dev/full was written"):
        write_whole(Path("/dev/full"), "text")
    assert Path("/dev/full").is_char_device()
    write_whole(file, "after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "after")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "nothing"}, "there is no metric 'nothing'"),
        ({"settings": {"check": {}, "data": {}, "generation": {}, "benchmark": {"confidence": 2}}}, "confidence is 2, no share"),
        ({"settings": {"check": {}, "data": {}, "generation": {}, "benchmark": {"confidence": "high"}}}, "confidence is 'high', no share"),
    ],
)
def test_what_a_report_can_not_hold_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Report.model_validate({**made().model_dump(), **changes})
