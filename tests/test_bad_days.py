"""Kills, interrupts, full disks and missing devices: a clear word, the right status, nothing half-written."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
import yaml

from compress import methods
from compress.errors import NoSpace
from compress.model.loading import Bundle
from compress.model.source import Source
from tests.blocks import made
from tests.conftest import recipe_for
from tests.test_cli import program

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(toys, rows, tmp_path):
    def write(**changes):
        changes = {"stages": [{"quantize": "cast"}], "check": {"weight_bytes": {"max_ratio": 0.6}}, **changes}
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe_for("llama", toys["llama"], rows, **changes)))
        return tmp_path

    return write


def start(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would their children
    return subprocess.Popen(
        [sys.executable, "-m", "compress", "run", "toy.yaml", "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, text):
    """Read the progress lines until one has the text."""
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"ended before {text!r}")


def workers(process):
    return [child for child in psutil.Process(process.pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def leftovers(folder):
    return [f for f in folder.rglob("*") if f.name.endswith(".partial") or f.name == "report.json"]


@pytest.mark.parametrize(
    ("when", "number"), [("quantize: cast", signal.SIGINT), ("candidate: loading", signal.SIGINT), ("candidate: loading", signal.SIGTERM)]
)
def test_an_interrupt_ends_everything_with_130(recipe, when, number):
    folder = recipe()
    process = start(folder)
    wait_for(process, when)
    children = workers(process)
    assert children
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert "interrupted" in stderr
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() for child in children)
    assert leftovers(folder) == []


def test_a_killed_stage_is_status_3_and_the_next_run_goes_on(recipe):
    folder = recipe()
    process = start(folder)
    wait_for(process, "quantize: cast")
    for child in workers(process):
        child.kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "the working process was killed (signal 9)" in stderr
    assert not list(folder.glob("reports/artifacts/toy*"))
    assert program("run", "toy.yaml", "--json", cwd=folder).returncode == 0


def test_a_killed_measurement_is_a_row_in_the_report(recipe):
    folder = recipe(
        benchmark={"batch_sizes": [1], "prompt_tokens": [8], "new_tokens": 4, "rounds": 2, "precision": None, "turns": 2, "iterations": 1}
    )
    process = start(folder)
    wait_for(process, "timing in turns")
    workers(process)[0].kill()
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    answer = json.loads(stdout)
    assert answer["verdict"] == "cannot_tell"
    assert "was killed (signal 9)" in answer["failures"][0]
    report = (folder / answer["report"] / "report.md").read_text()
    assert "was killed (signal 9)" in report
    assert answer["candidate"]["parameters"] == answer["baseline"]["parameters"], "what was measured stays"


def test_memory_that_runs_out_at_a_grid_point_is_a_row(recipe):
    folder = recipe(
        benchmark={
            "batch_sizes": [1, 10**12],
            "prompt_tokens": [8],
            "new_tokens": 4,
            "rounds": 1,
            "precision": None,
            "turns": 2,
            "iterations": 1,
        }
    )
    done = program("run", "toy.yaml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["candidate"]["latency_p50 [batch 1, prompt 8]"] > 0
    assert answer["candidate"][f"latency_p50 [batch {10**12}, prompt 8]"] is None
    assert "out of memory" in (folder / answer["report"] / "report.md").read_text()


def test_prompts_longer_than_the_context_are_a_row(recipe):
    folder = recipe(
        benchmark={
            "batch_sizes": [1],
            "prompt_tokens": [8, 500],
            "new_tokens": 4,
            "rounds": 1,
            "precision": None,
            "turns": 1,
            "iterations": 1,
        }
    )
    answer = json.loads(program("run", "toy.yaml", "--json", cwd=folder).stdout)
    assert "504 tokens don't fit the model's context of 64" in (folder / answer["report"] / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none_is_bad_input(recipe):
    folder = recipe()
    done = program("run", "toy.yaml", "--device", "cuda", cwd=folder)
    assert done.returncode == 2
    assert "--device cuda: " in done.stderr and "use --device cpu or auto" in done.stderr
    assert leftovers(folder) == []


def test_an_unwritable_folder_is_said(recipe, tmp_path):
    folder = recipe()
    (folder / "taken").write_text("a file")
    done = program("run", "toy.yaml", "--out", "taken", cwd=folder)
    assert done.returncode in (2, 3)
    assert "taken" in done.stderr and "Traceback" not in done.stderr


def test_a_disk_that_fills_while_the_artifact_is_written(toys, tmp_path, monkeypatch):
    def full(bundle, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Bundle, "save", full)
    with pytest.raises(NoSpace, match="nothing of it is left"):
        made(Source(str(toys["llama"]), "causal-lm", "float32"), "quantize", "cast", {}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_method_whose_package_is_absent_says_what_to_install(monkeypatch):
    from compress.errors import MissingPackage

    monkeypatch.setattr(methods, "lacking", list)
    with pytest.raises(
        MissingPackage, match=r"quantize: bnb_nf4 needs bitsandbytes, not installed here\. Install with: pip install 'bitsandbytes>="
    ):
        methods.require("quantize", "bnb_nf4", methods.Settings())
