"""What a pipeline relies on: a planted regression ends it, an equal model doesn't, too little data says how much would tell."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from compress import pipeline, recipe
from compress.benchmark import machine
from compress.errors import RecipeError, RunError
from compress.report import ci, write
from compress.report.frame import find_reports
from compress.results.report import read_report
from compress.results.sides import GateResult, Measurement, Side
from tests.conftest import recipe_for
from tests.report.test_files import made
from tests.test_cli import program

WORKFLOW = Path(__file__).parent.parent / "docs" / "workflows" / "compress.yml"
BASE = [float(30 + (n * 37) % 41) for n in range(200)]
NOISE = [((n * 61) % 21 - 10) / 4 for n in range(200)]


def kept(folder, drop=0.0, noise=1.0, verdict="pass", check=None, **changes):
    """A report on disk whose candidate is worse by `drop` points of ROUGE-L."""
    ours = [value - drop + noise * n for value, n in zip(BASE, NOISE, strict=True)]
    sides = [
        Side(role=role, model=f"/models/{role}", measurements=[
            Measurement(metric="rougeL", value=sum(values) / 200, samples=[[v] for v in values]),
            Measurement(metric="weight_bytes", value=size),
        ])
        for role, values, size in (("baseline", BASE, 4e6), ("candidate", ours, 1e6))
    ]  # fmt: skip
    settings = {"check": check or {"rougeL": {"max_drop": 1.0}}, "model": {}, "data": {}, "generation": {}, "benchmark": {}}
    report = made(**{"name": "summaries", "run": folder.name, "sides": sides, "settings": settings, "verdict": verdict, **changes})
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.model_dump_json())
    return folder


def workflow_steps():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["may-it-replace"]
    return job["env"], [step for step in job["steps"] if "run" in step]


def run_workflow(folder, compress, environment):
    """Every `run` step as GitHub's runners do it, until one fails: bash -e in the checkout. `pip` does nothing."""
    tools = folder / "tools"
    tools.mkdir()
    for name, script in (("pip", "exit 0"), ("compress", compress)):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    checkout = folder / "a checkout"
    checkout.mkdir(exist_ok=True)
    usual, steps = workflow_steps()
    environment = {
        **os.environ, **usual, **environment, "PATH": f"{tools}:{os.environ['PATH']}", "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(folder / "summary"), "COLUMNS": "400",
    }  # fmt: skip
    (folder / "summary").touch()
    for step in steps:
        done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            break
    return step["name"], done, (folder / "summary").read_text(), checkout


@pytest.mark.parametrize(
    ("drop", "noise", "status", "annotation", "sentence"),
    [
        (0.0, 1.0, 0, None, "summaries: pass: every gate holds"),
        (3.0, 1.0, 1, "::error title=summaries%3A FAIL%3A rougeL%3A max_drop 1::", "rougeL drop is 3.013 points (95 % "),
        (0.8, 5.0, 4, "::warning title=summaries%3A cannot tell yet%3A rougeL%3A max_drop 1::", " examples would tell, there were 200"),
    ],
)  # fmt: skip
def test_the_workflow_ends_as_the_gates_say(drop, noise, status, annotation, sentence, tmp_path):
    """The workflow's own commands; `run` takes a report that is there, all else is the real program."""
    report = kept(tmp_path / "reports" / "r 1", drop, noise)
    python = f'"{sys.executable}" -m compress'
    compress = f'verb=$1; shift 2; [ $verb = run ] || exit 0; exec {python} check "{report}" "$@"'
    step, done, summary, checkout = run_workflow(tmp_path, compress, {})
    assert (step, done.returncode) == ("Compress, measure both models, judge", status), done.stderr
    output = done.stdout + done.stderr
    assert sentence in output
    commands = [line for line in done.stderr.splitlines() if line.startswith("::")]
    suite = ElementTree.parse(checkout / "junit.xml").getroot().find("testsuite")
    assert (suite.get("name"), suite.get("tests")) == ("summaries", "1")
    (case,) = suite
    if annotation is None:
        assert (commands, len(case)) == ([], 0)
        assert summary.startswith("# summaries: pass\n")
        return
    (command,) = commands
    assert command.startswith(annotation)
    assert "rougeL drop is " in command and "(95 %25 " in command and "at most 1 points is allowed" in command
    assert sentence.replace("%", "%25") in command
    assert [(entry.tag, entry.get("message")) for entry in case] == [
        ("failure" if status == 1 else "error", command.split("::")[2].replace("%25", "%"))
    ]
    assert summary.startswith(f"# summaries: {'FAIL' if status == 1 else 'cannot tell yet'}\n") and sentence in summary


@pytest.mark.slow
def test_the_workflow_runs_a_recipe(toys, rows, tmp_path):
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    benchmark = {"batch_sizes": [1], "prompt_tokens": [8], "new_tokens": 4, "rounds": 1, "precision": None, "turns": 1, "iterations": 1}
    data = recipe_for(
        "llama", toys["llama"], rows, benchmark=benchmark, stages=[{"quantize": "cast"}], check={"weight_bytes": {"max_ratio": 0.6}}
    )
    (checkout / "toy.yaml").write_text(yaml.safe_dump(data))
    commit = committed(checkout)
    step, done, summary, _ = run_workflow(tmp_path, f'exec "{sys.executable}" -m compress "$@"', {"RECIPE": "toy.yaml"})
    assert (step, done.returncode) == ("Compress, measure both models, judge", 0), done.stderr
    assert summary.startswith("# toy: pass\n")
    (file,) = find_reports([checkout / "reports"])
    assert read_report(file).environment["commit"] == commit
    assert program("history", "reports", "--metric", "weight_bytes", cwd=checkout).stdout.count(commit[:7]) == 1


def committed(folder):
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a"], ["tag", "-am", "v1", "v1"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_folder(tmp_path, monkeypatch):
    assert machine.commit(tmp_path) is None
    (tmp_path / "a.yaml").write_text("version: 1")
    commit = committed(tmp_path)
    assert machine.commit(tmp_path) == commit
    (tmp_path / "new").touch()
    assert machine.commit(tmp_path) == commit, "what git doesn't follow makes nothing dirty"
    (tmp_path / "a.yaml").write_text("version: 2")
    assert machine.commit(tmp_path) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert machine.commit(tmp_path) is None


def test_gates_of_a_file_replace_the_recipes(tmp_path):
    report = kept(tmp_path / "r1", drop=3.0)
    (tmp_path / "my gates.yaml").write_text("rougeL: {max_drop: 5}\nweight_bytes: {max_ratio: 0.3}\n")
    done = program("check", report, "--gates", tmp_path / "my gates.yaml", "--json")
    assert done.returncode == 0
    assert [(gate["metric"], gate["limit"]) for gate in json.loads(done.stdout)["gates"]] == [("rougeL", 5), ("weight_bytes", 0.3)]
    preset = pipeline.check(read_report(report), gates="mlperf-99")
    assert {gate.metric: gate.verdict for gate in preset.gates}["rougeL"] == "fail"
    assert preset.settings["check"]["rougeL"]["min_ratio"] == 0.99


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rougel: {max_drop: 1}", ":1: rougel: 'rougel' is not a metric; did you mean 'rougeL'?"),
        ("bleu: {max_drop: 1}\nrougeL: {max_dorp: 1}", ":2: rougeL.max_dorp: unknown key 'max_dorp'; did you mean 'max_drop'?"),
        ("rougeL: 3", ":1: rougeL: 3 is not a mapping of keys to values"),
        ("weight_bytes: {max_drop: 1}", ":1: weight_bytes: max_drop makes no sense, weight_bytes is better lower"),
        ("rougeL: {max_drop: 1}\nrougeL: {max_drop: 2}", ":2: rougeL stands twice"),
        ("", ":1: a mapping of keys to values is expected, this is empty"),
    ],
)
def test_mistakes_in_gates_are_named_by_file_line_and_key(text, message, tmp_path):
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        recipe.load_gates(tmp_path / "gates.yaml")
    assert str(raised.value).startswith(f"{tmp_path}/gates.yaml{message}")


def test_against_the_best_of_a_folder(tmp_path):
    """Better by half a point than the best that passed; one that failed would be better still, one damaged is named."""
    (tmp_path / "gates.yaml").write_text("rougeL: {max_drop: 0}")
    history = tmp_path / "all reports"
    for name, drop, verdict in (("r1", 2.0, "pass"), ("r2", 1.0, "pass"), ("r3", -9.0, "fail")):
        kept(history / name, drop, verdict=verdict)
    kept(history / "r4", -9.0, environment={"device": "cuda"})
    (history / "half").mkdir()
    (history / "half" / "report.json").write_text((history / "r1" / "report.json").read_text()[:1000])
    ours = kept(history / "r5", 0.5)
    done = program("check", ours, "--against", history, "--best", "rougeL", "--gates", tmp_path / "gates.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert f"{history}/half/report.json: damaged, not JSON" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["gates"][0]["estimate"] == pytest.approx(-0.5)
    assert answer["notes"][0] == f"The baseline is the candidate of {history / 'r2'}."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--best", "rougeL"], "give --against DIR with it"),
        (["--against", ".", "--best", "bleu"], "--best bleu: no other report there passed, was measured as r1 was, and has bleu"),
        (["--junit", "nowhere/junit.xml"], "--junit nowhere/junit.xml: can't be written to"),
        (["--gates", "mlperf-100"], "mlperf-100: there is no such file"),
        (["--against", ""], "--against '': it is empty"),
        (["--against", ".", "--best", ""], "--best '': it is empty"),
        (["--junit", "x", "--markdown", "x"], "--junit and --markdown are both x"),
    ],
)
def test_what_cannot_be_checked_so_is_status_2(arguments, message, tmp_path):
    kept(tmp_path / "r1")
    done = program("check", "r1", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_what_a_pipeline_is_told_is_text():
    """Nothing in a sentence or a name ends an annotation, or makes JUnit's XML something that can't be read."""
    sentence = "100 % <b>&\x1b[31m\n::error::no, really: this, too\u202e"
    gate = GateResult(metric="rougeL", limit_kind="max_drop", limit=1, estimate=None, interval=None, verdict="fail", sentence=sentence)
    lost = gate.model_copy(update={"verdict": "cannot_tell", "batch_size": 8, "prompt_tokens": 64})
    report = made(name="a,b::c", verdict="fail", gates=[lost, gate])
    first, second = ci.annotations(report)
    assert first.startswith("::error title=a%2Cb%3A%3Ac%3A FAIL%3A rougeL%3A max_drop 1::100 %25 <b>&")
    assert second.startswith("::warning title=a%2Cb%3A%3Ac%3A cannot tell yet%3A rougeL [batch 8%2C prompt 64]%3A max_drop 1::")
    assert "%0A::error::no, really" in first and not {"\n", "\x1b", "\u202e"} & set(first)
    suite = ElementTree.fromstring(ci.junit([report]).encode()).find("testsuite")
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    assert suite[1][0].get("message").startswith("100 % <b>&")


def test_what_no_gate_says_is_told_of_the_whole():
    report = made(verdict="cannot_tell", decided_by="the recipe sets no limits under check to judge by")
    assert ci.annotations(report) == [
        "::warning title=toy%3A cannot tell yet%3A verdict::the recipe sets no limits under check to judge by"
    ]
    assert ElementTree.fromstring(ci.junit([report]).encode()).get("errors") == "1"


def test_runs_that_end_at_once_lose_nothing(write_recipe, tmp_path):
    """Eight write reports of one recipe at the same moments, every other one fails."""
    loaded = recipe.load(write_recipe(recipe_for("llama", Path("model"), Path("data"))))
    written, together = [], threading.Barrier(8, timeout=20)

    def run(number):
        for _ in range(10):
            together.wait()
            try:
                with pipeline._place(loaded, tmp_path / "reports") as (place, log):
                    log.write_text("")
                    if number % 2:
                        raise RunError("died")
                    written.append(write.write(made(name="toy", run=place.name), place).folder)
            except RunError:
                pass

    threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 40
    assert sorted(find_reports([tmp_path / "reports"])) == sorted(folder / "report.json" for folder in written)
    assert {read_report(folder).run for folder in written} == {folder.name for folder in written}


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(tmp_path):
    (tmp_path / "reports" / "quickstart").mkdir(parents=True)
    (tmp_path / "reports" / "quickstart").chmod(0o555)
    alike = [sys.executable, "-m", "compress", "run", "quickstart"]
    if os.getuid() == 0:  # whom no mode keeps out
        alike = ["setpriv", "--bounding-set", "-dac_override", "--", *alike]
    done = subprocess.run(alike, cwd=tmp_path, capture_output=True, text=True)
    if "setpriv" in done.stderr:
        pytest.skip("root can't give up its rights here")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "compress: --out reports: can't be written to: Permission denied\n"
    assert not (tmp_path / "reports" / "artifacts").exists()
