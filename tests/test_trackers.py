"""Reports in trackers, read back from what each really keeps; nothing goes over a network."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

import compress
from compress import cli, pipeline, trackers
from compress.errors import InputError, MissingPackage, RunError
from compress.report import write
from compress.results.report import read_report
from compress.results.sides import GateResult
from compress.results.stages import Point, StageRecord
from compress.verbs import bench
from tests.report.test_files import made

SETTINGS = {
    "model": {"id": "toy", "revision": None}, "data": {"samples": 20}, "generation": {}, "benchmark": {"batch_sizes": [1, 8]},
    "check": {"rougeL": {"max_drop": 1.0, "max": None}}, "stages": [{"distill": "logits", "temperature": 2.0}],
}  # fmt: skip
GATE = GateResult(
    metric="latency_p50", batch_size=1, prompt_tokens=64, limit_kind="max_ratio", limit=1.0, estimate=1.2, interval=(1.1, 1.3),
    verdict="fail", sentence="latency_p50 ratio is 1.2 (95 % 1.1 to 1.3); at most 1 is allowed",
)  # fmt: skip


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for key, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    curve = [Point(step=step, tokens=10 * step, loss=5.0 - step) for step in (1, 2)] + [Point(step=2, validation=31.5)]
    stage = StageRecord(stage={"distill": "logits", "temperature": 2.0}, artifact="a", seconds=1, reused=False, curve=curve)
    return write.write(
        made(settings=SETTINGS, stages=[stage], gates=[GATE], verdict="fail", decided_by=GATE.sentence), tmp_path / "reports" / "toy" / "r1"
    )


def test_mlflow_keeps_settings_figures_gates_curves_and_files(report):
    import mlflow

    with mlflow.start_run() as outer:  # as a notebook may have begun one
        compress.log(report, "mlflow")
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs(["0"], "attributes.run_name = 'toy/r1'")
    assert kept.info.status == "FINISHED" and kept.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert kept.data.params == {
        "model.id": "toy", "data.samples": "20", "benchmark.batch_sizes": "[1, 8]", "check.rougeL": '{"max_drop": 1.0}',
        "stages.0.distill": "logits", "stages.0.temperature": "2.0",
    }  # fmt: skip
    assert kept.data.metrics["baseline/rougeL in points"] == 71.5 and kept.data.metrics["candidate/weight_bytes in bytes"] == 1e6
    assert kept.data.metrics["candidate/latency_p50 batch 1 prompt 64 in s"] == 0.02
    assert not any("batch 8" in name for name in kept.data.metrics), "what is missing is no zero"
    assert (
        kept.data.tags["verdict"] == "fail" and kept.data.tags["gate latency_p50 batch 1 prompt 64 max_ratio"] == f"FAIL: {GATE.sentence}"
    )
    assert [(m.step, m.value) for m in client.get_metric_history(kept.info.run_id, "stages.0/loss")] == [(1, 4.0), (2, 3.0)]
    assert {file.path for file in client.list_artifacts(kept.info.run_id)} == {file.name for file in report.folder.iterdir()}


def test_tensorboard_reads_a_run_a_side(report):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compress.log(report, "tensorboard")
    kept = {side: EventAccumulator(str(report.folder / "tensorboard" / side)).Reload() for side in ("baseline", "candidate")}
    tensors = {
        side: {tag: [(e.step, e.tensor_proto) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
        for side, events in kept.items()
    }

    def value(side, tag):
        return [(step, proto.float_val[0] if proto.float_val else None) for step, proto in tensors[side][tag]]

    assert value("baseline", "rougeL in points") == [(0, 71.5)]
    assert value("candidate", "weight_bytes in bytes") == [(0, 1e6)]
    assert value("candidate", "stages.0/loss") == [(1, 4.0), (2, 3.0)]
    assert not any("batch 8" in tag for tag in tensors["candidate"])
    assert tensors["candidate"]["verdict"][0][1].string_val == [b"fail"]
    assert read_report(report.folder) == report and len(compress.load_reports(report.folder.parent).run.unique()) == 1


def test_wandb_keeps_it_offline(report, tmp_path):
    import wandb

    compress.log(report, "wandb")
    wandb.teardown()  # its service writes in the background, until the program ends
    (file,) = tmp_path.rglob("*.wandb")
    kept = file.read_bytes()  # protocol buffers, in which strings and JSON stand as they are
    texts = ["toy/r1", "stages.0.temperature", GATE.sentence, "candidate/rougeL in points", "70.9", "baseline/rougeL in points", "71.5"]
    assert [text for text in [*texts, "stages.0/loss", "stages.0/step", "report.json"] if text.encode() not in kept] == []
    assert b"batch 8" not in kept


@pytest.mark.parametrize("line", ["run no-such-recipe", "bench m --recipe no-such-recipe", "sweep no-such-recipe"])
def test_a_missing_package_is_said_before_anything_begins(line, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'mlflow-skinny>="):
        arguments = cli.parser().parse_args([*line.split(), "--log", "mlflow"])
        arguments.call(arguments)
    with pytest.raises(InputError, match=r"no tracker 'excel'; allowed are mlflow, tensorboard, wandb"):
        compress.log(made(), "excel")


def test_a_tracker_that_fails_changes_nothing_else(report, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "bench", lambda *_: report)
    (report.folder / "tensorboard").write_text("in the way")
    before = {file.name: file.read_bytes() for file in report.folder.iterdir()}

    def loud(arguments):
        print("View run at http://example")
        raise ValueError("no\nsuch\x1b[31m server")

    monkeypatch.setattr("compress.trackers.mlflow.log", loud)
    arguments = Namespace(
        model="m", recipe="quickstart", set=[], out=Path(), device="cpu", strict=False, json=True, log=["tensorboard", "mlflow"]
    )
    assert bench.call(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["report"] == str(report.folder)
    assert f"--log tensorboard: tensorboard did not take the report, which stands in {report.folder}" in err
    assert "--log mlflow: mlflow did not take the report" in err and "no such\N{REPLACEMENT CHARACTER}[31m server" in err
    assert {file.name: file.read_bytes() for file in report.folder.iterdir()} == before
    with pytest.raises(RunError):
        compress.log(report, "mlflow")
