"""The program as a person meets it: verbs, exit statuses, what goes to stdout, and how fast it answers."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
import yaml

import compress
from compress import cli, publish
from compress.recipe import shipped
from tests.conftest import recipe_for

LIGHT = """
    import sys
    sys.argv = ["compress", *{arguments!r}]
    from compress.cli import main
    try:
        main()
    except SystemExit as done:
        assert not done.code, done.code
    heavy = {{"torch", "transformers", "pandas", "numpy", "scipy"}} & sys.modules.keys()
    assert not heavy, heavy
"""


def program(*arguments, cwd=None, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=timeout
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["validate", "quickstart"],
        ["methods", "--json"],
        ["schema"],
        ["run", "--help"],
        ["inspect", "--help"],
        ["plan", "quickstart"],
    ],
)
def test_light_verbs_import_nothing_heavy(arguments):
    code = textwrap.dedent(LIGHT.format(arguments=arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import compress, sys; assert not {'torch', 'transformers', 'pandas', 'numpy', 'pydantic'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_verb_has_help_with_an_example():
    for verb in (
        "run",
        "sweep",
        "search",
        "bench",
        "inspect",
        "plan",
        "validate",
        "compare",
        "check",
        "history",
        "publish",
        "methods",
        "schema",
    ):
        done = program(verb, "--help")
        assert done.returncode == 0
        assert "Example:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["run", "quickstart", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["run", "quickstart", "--set", "data.sample=3"], "unknown key 'sample'; did you mean 'samples'?"),
        (["run"], "the following arguments are required: RECIPE"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["compare", "nowhere"], "there is no report here"),
        (["check", "nowhere"], "there is no report here"),
        (["bench", "./nowhere", "--recipe", "quickstart"], "there is no folder"),
        (["run", "quickstart", "--set", "model.id=no/such/model"], "there is no folder"),
        (["run", "quickstart", "--set", "data.source=./nowhere.jsonl"], "there is no file or folder"),
        (["run", "quickstart", "--set", "data.prompt='{talk}'"], "the field 'talk' that the prompt names isn't there; the columns are id, dialogue, summary"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_status_2(arguments, message, tmp_path):
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_validate_tells_every_recipe(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(shipped().joinpath("quickstart.yaml").read_text())
    bad.write_text("version: 1\n")
    done = program("validate", good, bad)
    assert done.returncode == 2
    assert f"{good}: a valid recipe" in done.stdout
    assert f"{bad}:1: model: is missing\n{bad}:1: data: is missing" in done.stderr
    answer = json.loads(program("validate", good, bad, "--json").stdout)
    assert answer["valid"] is False
    assert answer["recipes"][str(good)] == []


def test_methods_says_what_is_installed():
    methods = {m["method"]: m for m in json.loads(program("methods", "--json").stdout)}
    assert methods["bnb_nf4"]["packages"] == ["bitsandbytes"]
    assert methods["cast"]["installed"] is True
    assert "quantize: bnb_nf4" in program("methods").stdout


@pytest.mark.parametrize("columns", ["80", "120"])
def test_methods_says_what_is_unpacked_and_when(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    table = program("methods").stdout
    assert max(map(len, table.splitlines())) <= int(columns)
    text = " ".join(table.replace("cpu, cuda; installed", "").split())
    for method in json.loads(program("methods", "--json").stdout):
        if method["devices"] == ["cpu", "cuda"] and method["installed"]:
            assert f"In use: {method['at_run_time']}." in text
    assert "In use: the weights are unpacked at every step" in text


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_help_of_every_verb_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    (verbs,) = (action.choices for action in cli.parser()._actions if action.choices)
    assert set(verbs) == set(cli.VERBS)
    for verb in verbs.values():
        long = [line for line in verb.format_help().splitlines() if len(line) > int(columns)]
        assert all(line.startswith(("Example", " " * 4)) for line in long), "a command to copy is one line"


@pytest.fixture(scope="module")
def finished(toys, rows, tmp_path_factory):
    """One real run over a random T5, from the command line."""
    folder = tmp_path_factory.mktemp("run")
    data = recipe_for(
        "t5", toys["t5"], rows, metrics=["rouge", "bleu", "generated_tokens", "perplexity", "divergence"], stages=[{"quantize": "cast", "dtype": "bfloat16"}],
        check={"weight_bytes": {"max_ratio": 0.6}, "perplexity": {"max_ratio": 100}, "divergence": {"max": 0.1}},
    )  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump(data))
    done = program("run", "toy.yaml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done


@pytest.mark.slow
def test_run_prints_one_document_and_leaves_a_report(finished):
    folder, answer, _ = finished
    assert answer["verdict"] == "pass"
    assert {g["metric"] for g in answer["gates"]} == {"weight_bytes", "perplexity", "divergence"}
    assert (answer["baseline"]["divergence"], answer["baseline"]["equal_top"]) == (0, 100)
    assert 0 < answer["candidate"]["divergence"] < answer["candidate"]["divergence_worst"] < 0.1, "bfloat16"
    assert answer["gates"][0].keys() >= {"metric", "verdict", "estimate", "interval", "limit"}
    assert answer["candidate"]["weight_bytes"] == answer["baseline"]["weight_bytes"] / 2
    for metric in ("rouge1", "bleu", "perplexity", "generated_tokens", "peak_load_bytes", "peak_run_bytes", "ttft [batch 2, prompt 8]"):
        assert answer["candidate"][metric] is not None
    report = folder / answer["report"]
    files = ["measurements.parquet", "predictions.parquet", "report.html", "report.json", "report.md"]
    assert sorted(f.name for f in report.iterdir()) == files
    assert sorted(f.name for f in folder.iterdir()) == ["reports", "toy.yaml"]
    raw = json.loads((report / "report.json").read_text())
    latency = next(m for m in raw["sides"][0]["measurements"] if m["metric"] == "latency_p50")
    assert [len(timings) for timings in latency["raw"]] == [4], "one round of two turns of two generations"
    assert raw["environment"]["threads"] == 1


@pytest.mark.slow
def test_a_terminal_gets_our_own_lines_alone(finished):
    ours = r"quantize: cast|saving|(baseline|candidate): .*|timing in turns.*|waiting for .*"
    assert [line for line in finished[2].stderr.splitlines() if not re.fullmatch(ours, line)] == []


@pytest.mark.slow
def test_the_artifact_has_the_card_of_a_run_by_which_it_can_be_published(finished):
    folder, answer, _ = finished
    card = (folder / answer["artifact"] / "README.md").read_text()
    assert "compress_run: toy/" in card and "| rougeL |" in card and "AutoModelForSeq2SeqLM" in card
    assert str(folder) not in card and "dtype: bfloat16" in card
    assert "README.md" in publish.pack(folder / answer["artifact"], failed_too=True).files


@pytest.mark.slow
def test_check_compare_and_bench_agree_with_the_run(finished):
    folder, answer, _ = finished
    again = program("check", answer["report"], "--json", cwd=folder)
    assert (again.returncode, json.loads(again.stdout)["gates"]) == (0, answer["gates"])
    against = program("check", answer["report"], "--against", answer["report"], "--json", cwd=folder)
    verdicts = {g["metric"]: g["verdict"] for g in json.loads(against.stdout)["gates"]}
    assert verdicts == {"weight_bytes": "fail", "perplexity": "pass", "divergence": "pass"}, "against itself nothing is smaller"
    assert against.returncode == 1
    for style in ("table", "md", "csv", "json"):
        assert program("compare", "reports", "--format", style, cwd=folder).returncode == 0
    bench = program("bench", answer["artifact"], "--recipe", "toy.yaml", "--json", cwd=folder)
    assert bench.returncode == 0, bench.stderr
    measured = json.loads(bench.stdout)
    assert measured["baseline"] == {}
    for metric in ("weight_bytes", "parameters"):
        assert measured["candidate"][metric] == json.loads(again.stdout)["baseline" if metric == "parameters" else "candidate"][metric]


@pytest.mark.slow
def test_the_second_run_reuses_the_artifact(finished):
    folder, _, _ = finished
    done = program("run", "toy.yaml", "--json", "--set", "benchmark.turns=1", cwd=folder)
    report = compress.read_report(folder / json.loads(done.stdout)["report"])
    assert report.stages[0].reused


@pytest.mark.slow
def test_a_failed_gate_is_status_1_and_too_little_data_4(finished):
    folder, _, _ = finished
    failed = program("run", "toy.yaml", "--set", "check.weight_bytes.max_ratio=0.1", "--set", "benchmark.turns=1", cwd=folder)
    assert failed.returncode == 1
    assert "FAIL: weight_bytes ratio is 0.5" in " ".join(failed.stdout.split())
    four = program("run", "toy.yaml", "--set", "check.latency_p50.max_ratio=9", "--set", "benchmark.turns=1", cwd=folder)
    assert four.returncode == 4
    assert "from too little data for an interval" in " ".join(four.stdout.split())
