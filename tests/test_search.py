"""The best recipe under gates: what is asked for, what is found against trying all, what is given up, what a killed search goes on with."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from compress import recipe, screening, search
from compress.benchmark.messages import Outputs
from compress.errors import InputError, RecipeError, RunError
from compress.execution import Execution
from compress.judgement import Prepared
from compress.methods import Example
from compress.model.source import Source
from compress.results.report import Report
from compress.results.sides import GateResult, Side
from compress.search import Range, Search, Tried, gate, space
from tests.conftest import recipe_for

pytest.importorskip("optuna")
STAGES = [{"prune": "magnitude", "sparsity": 0.3}, {"quantize": "rtn", "bits": 8, "group_size": -1}]
BITS = "stages.1.bits=2,3,4,8"


@pytest.fixture
def toy(toys, rows, write_recipe):
    return write_recipe(recipe_for("llama", toys["llama"], rows, stages=STAGES))


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Runs that take no time: `value` of a choice is what is minimised, `keeps` says whether its gate is kept."""

    def pretend(value, keeps, stop_at=None):
        asked = []

        def attempt(_search, choice, out, execution):
            asked.append(choice)
            if len(asked) == stop_at:
                raise KeyboardInterrupt
            if keeps(choice) is None:
                raise RunError("it broke")
            verdict, died = (
                ("cannot_tell", keeps(choice)) if isinstance(keeps(choice), str) else ("pass" if keeps(choice) else "fail", None)
            )
            folder = tmp_path / "made" / str(len(list(tmp_path.glob("made/*"))))
            folder.mkdir(parents=True)
            (folder / "report.json").write_text(judged(verdict).model_dump_json())
            return Tried(choice, str(folder), verdict, value(choice), died)

        monkeypatch.setattr(search, "_attempt", attempt)
        return asked

    return pretend


def judged(verdict) -> Report:
    result = GateResult(metric="rougeL", limit_kind="max_drop", limit=1, estimate=0, interval=None, verdict=verdict, sentence="")
    settings = {"check": {}, "data": {}, "generation": {}, "benchmark": {}}
    return Report(
        recipe="r", run="r", created="2026-01-01", digest="d", examples_digest="e", settings=settings, environment={},
        sides=[Side(role="candidate", model="m")], gates=[result], verdict=verdict, decided_by="",
    )  # fmt: skip


def test_gates_and_spaces_are_read_as_people_write_them():
    assert gate("rougeL:-1.0") == 'check.rougeL={"max_drop": 1.0}'
    assert gate("perplexity:+0.5") == 'check.perplexity={"max_rise": 0.5}'
    assert gate("latency_p50:+5%") == 'check.latency_p50={"max_ratio": 1.05}'
    assert gate("tokens_per_second:-10%") == 'check.tokens_per_second={"min_ratio": 0.9}'
    assert gate("lm_eval:mmlu:acc:-1") == 'check.lm_eval:mmlu:acc={"max_drop": 1.0}'
    assert space(["a=2..8", "b.c=0.1..0.7", "d=1e-5..1e-3:log", "e=2,null,x..y"]) == {
        "a": Range(2, 8), "b.c": Range(0.1, 0.7), "d": Range(1e-5, 1e-3, log=True), "e": [2, None, "x..y"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "minimise", "over", "message"),
    [
        ("rougeL", "weight_bytes", BITS, "--keep rougeL: give a metric and how much it may change, as in rougeL:-1.0"),
        ("rougel:-1", "weight_bytes", BITS, "'rougel' is not a metric; did you mean 'rougeL'?"),
        ("perplexity:+1", "weight_bytes", BITS, "perplexity isn't measured by this recipe; put perplexity under metrics"),
        ("rougeL:+1", "weight_bytes", BITS, "max_rise makes no sense, rougeL is better higher"),
        ("rougeL:-1", "weight", BITS, "--minimise weight: there is no such metric; did you mean"),
        ("rougeL:-1", "rougeL", BITS, "--minimise rougeL: higher is better"),
        ("rougeL:-1", "weight_bytes", "stages.1.bits=4,5", "bits: 5 is not one of 2, 3, 4, 8"),
        ("rougeL:-1", "weight_bytes", "stages.0.sparsity=0.5..1.5", "sparsity: 1.5"),
        ("rougeL:-1", "weight_bytes", "stages.0.sparsity=0.7..0.1", "not a range from low to high, as 0.1..0.7"),
        ("rougeL:-1", "weight_bytes", "stages.0.sparsity", "give a key and values, as in --over"),
    ],
)
def test_what_can_not_be_searched_is_refused(toy, keep, minimise, over, message):
    with pytest.raises(RecipeError) as wrong:
        Search(toy, [keep], minimise, [over])
    assert message in str(wrong.value)
    with pytest.raises(RecipeError, match=r"has no gates; give one"):
        Search(toy, [], "weight_bytes", [BITS])


def test_of_a_few_choices_all_are_tried_and_the_best_that_keeps_the_gates_is_written(toy, pretend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = pretend(
        lambda choice: choice["stages.1.bits"], lambda choice: {2: None, 3: False, 8: "it died"}.get(choice["stages.1.bits"], True)
    )
    search = Search(toy.name, ["rougeL:-1"], "weight_bytes", [BITS, "calibration.samples=5,6"])
    outcome = search.run(tmp_path / "a b")
    assert sorted(map(str, asked)) == sorted(
        str({"stages.1.bits": bits, "calibration.samples": samples}) for bits in (2, 3, 4, 8) for samples in (5, 6)
    )
    assert (outcome.best.choice["stages.1.bits"], outcome.best.verdict) == (4, "pass")
    assert {trial.reason for trial in outcome.tried if trial.choice["stages.1.bits"] == 2} == {"it broke"}
    assert {trial.reason for trial in outcome.tried if trial.choice["stages.1.bits"] == 8} == {"it died"}
    again = pretend(lambda choice: choice["stages.1.bits"], lambda _: True)
    assert {trial.reason for trial in search.run(tmp_path / "a b").tried} == {None}, "what broke or died is tried again"
    assert sorted(choice["stages.1.bits"] for choice in again) == [2, 2, 8, 8]
    outcome = search.run(tmp_path / "a b")
    assert (len(again), outcome.best.choice["stages.1.bits"]) == (4, 2)
    (tmp_path / "elsewhere").mkdir()
    written = recipe.load(outcome.file.rename(tmp_path / "elsewhere" / "best.yaml"))
    assert written.digest == search.variant(outcome.best.choice).digest
    assert written.check["rougeL"].max_drop == 1


def test_a_killed_search_goes_on_where_it_was(toy, pretend, tmp_path):
    def bits(choice):
        return choice["stages.1.bits"]

    search = Search(toy, ["rougeL:-1"], "weight_bytes", [BITS])
    first = pretend(bits, lambda _: True, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        search.run(tmp_path)
    second = pretend(bits, lambda _: True)
    outcome = search.run(tmp_path)
    assert first[2] == second[0], "what it was about comes first"
    assert sorted(map(bits, [*first[:2], *second])) == [2, 3, 4, 8]
    assert len(outcome.tried) == 4
    assert outcome.best.choice == {"stages.1.bits": 2}
    search.run(tmp_path)
    assert len(second) == 2, "nothing is left"
    study = search.place(tmp_path) / "study.sqlite"
    study.write_bytes(study.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"study\.sqlite: the study can't be read: .*; move it away to search anew"):
        search.run(tmp_path)
    Search(toy, ["rougeL:-2"], "weight_bytes", [BITS]).run(tmp_path)
    assert len(second) == 6, "other gates are another search"


def test_in_a_range_the_search_closes_in_on_the_edge_of_what_keeps_the_gates(toy, pretend, tmp_path):
    """Sparser is better up to 0.4: of 20 recipes one comes closer to that than of 20 at random in nine searches of ten."""
    key = "stages.0.sparsity"
    asked = pretend(lambda choice: 1 - choice[key], lambda choice: choice[key] <= 0.4)
    outcome = Search(toy, ["rougeL:-1"], "weight_bytes", [f"{key}=0.01..0.99"]).run(tmp_path, trials=20)
    assert len(asked) == len(outcome.tried) == 20
    assert all(0.01 <= choice[key] <= 0.99 and choice[key] == float(f"{choice[key]:.4g}") for choice in asked)
    assert outcome.best.choice[key] == max(choice[key] for choice in asked if choice[key] <= 0.4)
    assert 0.4 - outcome.best.choice[key] < 0.005


class Answering:
    """A side that makes of each example what `rows` says."""

    asked: dict = {}  # noqa: RUF012

    module = "json"

    def __init__(self, role, source, *_):
        self.role, self.drop, self.outputs = role, float(source.id) if role == "candidate" else 0.0, None
        self.asked[role] = []

    def start(self, warm):
        assert not warm

    def stop(self):
        pass

    def answer(self, examples):
        self.asked[self.role].append(len(examples))
        self.outputs = Outputs({"rougeL": [[50 + int(e.id) % 20 - self.drop * (1 + math.sin(int(e.id)))] for e in examples]})


@pytest.mark.parametrize(("drop", "looks"), [(40.0, [20]), (1.6, [20, 40]), (0.5, [20, 40])])
def test_what_breaks_a_gate_on_few_examples_is_given_up(toy, tmp_path, monkeypatch, drop, looks):
    """Drops by 1 are allowed; 1.6 with a spread of 1.1 is told apart from it by 60 examples, hardly by 20."""
    monkeypatch.setattr(screening, "Subject", Answering)
    loaded = recipe.load(toy, [gate("rougeL:-1"), "check.weight_bytes.max_ratio=0.1"])
    examples = [Example(str(number), "p", ["r"]) for number in range(180)]
    prepared = Prepared(loaded, Source("0", "causal-lm"), Source(str(drop), "causal-lm"), "c", examples, [])
    reason = screening.hopeless(prepared, tmp_path, Execution("cpu"))
    assert Answering.asked["candidate"] == looks
    assert Answering.asked["baseline"] == [20, 40]
    if drop > 1:
        assert reason.startswith(f"after {sum(looks)} examples: rougeL drop is ")
        assert reason.endswith("; at most 1 points is allowed")
    else:
        assert reason is None


def test_what_is_minimised_is_a_ratio_over_all_points():
    compared = [
        {"metric": "latency_p50", "batch_size": n, "prompt_tokens": 8, "baseline": 1, "candidate": ratio, "kind": "ratio",
         "estimate": ratio, "low": None, "high": None}
        for n, ratio in ((1, 0.5), (2, 2.0), (4, 8.0))
    ]  # fmt: skip
    report = Report.model_validate({**judged("pass").model_dump(), "comparisons": compared})
    assert search._value(report, "latency_p50") == pytest.approx(2.0)
    assert search._value(report, "weight_bytes") is None


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "ray"])
def test_a_search_from_the_command_line(toy, toys, rows, tmp_path, monkeypatch, where):
    """Of pruning nearly nothing and nearly all, the latter is given up after 20 of the 24 examples: it guesses evenly, which a random model is no better than."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "compress", "search", toy, "--keep", "perplexity:-1%", "--minimise", "latency_p50", "--over",
         "stages.0.sparsity=0.01,0.98", "--set", "metrics=[perplexity]", "--set", "benchmark.turns=1", "--set", "stages.1.bits=8",
         "--on", where, "--json"],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    tried = {trial["choice"]["stages.0.sparsity"]: trial for trial in answer["tried"]}
    assert tried[0.98]["report"] is None
    assert tried[0.98]["reason"].startswith("given up after 20 examples: perplexity ratio is ")
    assert answer["best"]["report"] == tried[0.01]["report"]
    assert recipe.load(answer["best"]["recipe"]).stages[0].settings.sparsity == 0.01
