"""Many recipes at once: what is asked for, what is shared, what happens when some of it fails or all is interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compress import pipeline, process, sweep
from compress.benchmark.isolate import Session
from compress.cluster import cluster
from compress.errors import CompressError, InputError, ModelError, RecipeError, RunError
from compress.execution import Execution
from compress.judgement import Prepared
from compress.methods import Example
from compress.model.source import Source
from compress.results.report import Report
from compress.results.sides import Measurement, Side
from compress.results.stages import StageRecord
from tests.benchmark.test_isolate import Subject, benchmark, noisy
from tests.conftest import recipe_for

STAGES = [{"prune": "magnitude", "sparsity": 0.3}, {"quantize": "rtn", "bits": 8, "group_size": -1}]
GRID = "stages.1.bits=3,4,8"


@pytest.fixture
def toy(toys, rows, write_recipe):
    return write_recipe(recipe_for("llama", toys["llama"], rows, stages=STAGES))


def report_of(prepared: Prepared, out: Path, **changes) -> Report:
    figures = [Measurement(metric="weight_bytes", value=4.0)]
    sides = [Side(role=role, model=role, measurements=figures, **changes) for role in ("baseline", "candidate")]
    return Report(
        recipe=prepared.recipe.name, run="r", created="2026-01-01", digest=prepared.recipe.digest,
        examples_digest=sweep.examples_digest(prepared.examples), settings=prepared.recipe.as_written(), environment={}, stages=prepared.stages,
        sides=sides, verdict="cannot_tell", decided_by="", folder=out / prepared.recipe.name / "r",
    )  # fmt: skip


class Pretended:
    """A pipeline that only notes what it is asked for."""

    def __init__(self, monkeypatch, broken=(), unmeasurable=(), stop_at=None):
        self.made, self.measured, self._how = [], [], (broken, unmeasurable, stop_at)
        monkeypatch.setattr(pipeline, "prepare", self.prepare)
        monkeypatch.setattr(pipeline, "measure", self.measure)

    def prepare(self, recipe, out, execution):
        self.made.append(recipe.name)
        if recipe.name in self._how[0]:
            raise RunError("it broke")
        stage = StageRecord(stage={"quantize": "rtn"}, artifact=f"a/{recipe.digest}", seconds=0, reused=False)
        return Prepared(recipe, Source("m", "causal-lm"), Source("a", "causal-lm"), "a", [Example("1", "p", ["r"])], [stage])

    def measure(self, prepared, out, execution):
        names = [job.recipe.name for job in prepared]
        self.measured.append(names)
        if self._how[2] in names:
            raise KeyboardInterrupt
        if set(names) & set(self._how[1]):
            raise ModelError("it can't be compiled")
        reports = [report_of(job, out) for job in prepared]
        for report in reports:
            report.folder.mkdir(parents=True, exist_ok=True)
            (report.folder / "report.json").write_text(report.model_dump_json())
        return reports


def test_a_grid_is_every_combination_named_by_its_values(toy, write_recipe, toys, rows):
    other = write_recipe(recipe_for("llama", toys["llama"], rows, stages=STAGES), "other")
    variants = sweep.expand([toy, other], ["stages.1.bits=3,{attention: 4}", "calibration.samples=5,6"], ["data.samples=7"])
    assert [recipe.name for recipe in variants] == [
        f"{file}+bits={bits}+samples={samples}" for file in ("toy", "other") for bits in ("3", "_attention_4_") for samples in (5, 6)
    ]
    assert [recipe.stages[1].settings.bits for recipe in variants[:3]] == [3, 3, {"attention": 4}]
    assert {(recipe.data.samples, recipe.folder) for recipe in variants} == {(7, toy.parent)}
    (alike, *_) = sweep.expand([toy], ["calibration.samples=5", "data.samples=6"])
    assert alike.name == "toy+calibration.samples=5+data.samples=6", "a key's last part alone would not tell"
    layers = [f'{{"{"decoder." * 30}{n}": 4}}' for n in range(3)]
    long = sweep.expand([toy], [f"stages.1.bits={','.join(layers)}"])
    assert len({recipe.name for recipe in long}) == 3
    assert {len(recipe.name) for recipe in long} == {sweep.LONGEST}


def test_all_mistakes_of_a_sweep_are_told_before_anything_runs(toy, monkeypatch):
    with pytest.raises(RecipeError) as wrong:
        sweep.expand([toy, "nowhere.yaml"], ["stages.1.bits=4,11", "data.samples=0"])
    assert [line for line in str(wrong.value).split("\n") if "bits: 11" in line]
    assert [line for line in str(wrong.value).split("\n") if line == "nowhere.yaml: there is no such file"]
    assert [line for line in str(wrong.value).split("\n") if "samples" in line]
    for nothing in ("stages.1.bits", "stages.1.bits=", "=3", "stages.1.bits=] #"):
        with pytest.raises(RecipeError, match=r"as in --grid stages\.0\.bits=3,4,8"):
            sweep.expand([toy], [nothing])
    for grid, message in (
        (["stages.1.bits=3", "stages.01.bits=4"], "stages.1.bits: it is given twice"),
        (["stages.1.bits=3", "stages.1={quantize: rtn}"], "stages.1.bits: it lies within stages.1"),
        (["stages.1.bits={2026-01-01: 3}"], "give values, as in"),
        ([f"stages.1.bits={','.join(map(str, range(1500)))}"], "that makes 1,500 recipes, and 1,000 are the most"),
    ):
        with pytest.raises(RecipeError, match=message):
            sweep.expand([toy], grid)
    assert len(sweep.expand([toy], ["stages.1.bits=4,4"])) == 1
    asked = Pretended(monkeypatch)
    recipes = sweep.expand([toy], ["model.id=/no/such/place"])
    monkeypatch.setattr(pipeline, "refuse", lambda recipe, *_: (_ for _ in ()).throw(InputError(f"not {recipe.name}")))
    with pytest.raises(InputError, match=r"not toy\+id=_no_such_place"):
        sweep.run(recipes)
    assert asked.made == []


def test_one_that_fails_is_named_and_the_others_go_on(toy, monkeypatch, tmp_path):
    asked = Pretended(monkeypatch, broken=["toy+bits=3"], unmeasurable=["toy+bits=8"])
    lines = []
    outcomes = sweep.run(sweep.expand([toy], ["stages.1.bits=2,3,4,8"]), tmp_path, progress=lambda what, *_: lines.append(what))
    assert [(outcome.report is not None, outcome.reason) for outcome in outcomes] == [
        (True, None), (False, "it broke"), (True, None), (False, "it can't be compiled"),
    ]  # fmt: skip
    assert asked.measured[0] == ["toy+bits=2", "toy+bits=4", "toy+bits=8"], "together, and where that fails, each alone"
    assert asked.measured[1:] == [["toy+bits=2"], ["toy+bits=4"], ["toy+bits=8"]]
    assert any(line.startswith("recipe 2 of 4: toy+bits=3, about ") and line.endswith(" left") for line in lines)


def test_a_side_that_could_not_be_measured_to_the_end_is_a_failure_and_measured_again(toy, monkeypatch, tmp_path):
    asked = Pretended(monkeypatch)
    recipes = sweep.expand([toy], [])
    (outcome,) = sweep.run(recipes, tmp_path)
    file = outcome.report.folder / "report.json"
    cut = json.loads(file.read_text())
    cut["sides"][1]["failures"] = ["candidate: memory ran out"]
    file.write_text(json.dumps(cut))
    sweep.run(recipes, tmp_path)
    assert len(asked.measured) == 2
    assert sweep.run(recipes, tmp_path)[0].reason is None
    assert len(asked.measured) == 2


def test_only_what_is_measured_alike_and_fits_takes_turns_together(toy, monkeypatch, tmp_path):
    asked = Pretended(monkeypatch)
    recipes = sweep.expand([toy], [GRID, "benchmark.turns=1,2"])
    sweep.run(recipes, tmp_path / "roomy")
    assert asked.measured == [[f"toy+bits={bits}+turns={turns}" for bits in (3, 4, 8)] for turns in (1, 2)]
    asked.measured.clear()
    plan = sweep.plan.plan(recipes[0], sweep.machine.here(1))
    peak = max(row.peak for row in plan.rows if row.dtype == "FP32")
    small = sweep.machine.Machine("small", "cpu", 3 * peak, 1e9, 1e9)
    monkeypatch.setattr(sweep.machine, "here", lambda _: small)
    sweep.run(recipes, tmp_path / "small")
    assert [len(names) for names in asked.measured] == [2, 1, 2, 1], "a baseline and two candidates fit"


def test_an_interrupted_sweep_goes_on_where_it_was(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "TOGETHER", 1)
    asked = Pretended(monkeypatch, stop_at="toy+bits=4")
    recipes = sweep.expand([toy], [GRID])
    with pytest.raises(KeyboardInterrupt):
        sweep.run(recipes, tmp_path)
    asked = Pretended(monkeypatch)
    outcomes = sweep.run(sweep.expand([toy], ["stages.1.bits=3,4,8,2"]), tmp_path)
    assert asked.measured == [["toy+bits=4"], ["toy+bits=8"], ["toy+bits=2"]], "with a value more"
    assert [outcome.report.recipe for outcome in outcomes] == ["toy+bits=3", "toy+bits=4", "toy+bits=8", "toy+bits=2"]
    changed = pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda *arguments: _other_examples(changed(*arguments)))
    sweep.run(recipes, tmp_path)
    assert asked.measured[3:] == [["toy+bits=3"], ["toy+bits=4"], ["toy+bits=8"]], "the data have changed since"


def _other_examples(prepared: Prepared) -> Prepared:
    return Prepared(prepared.recipe, prepared.baseline, prepared.candidate, prepared.name, [Example("2", "q", ["r"])], prepared.stages)


class Losing(Subject):
    """One that can't run a point, or dies in its second round."""

    point = (1, 8)

    def __init__(self, role, base, luck, dies=False):
        super().__init__(role, base, luck)
        self._dies = dies
        if not dies:
            self.reasons = {self.point: "out of memory"}

    def take_turn(self, machine, usable, ours):
        if self._dies and self.number == 1:
            raise RunError("it was killed")
        assert self._dies or usable == []
        return (yield from super().take_turn(machine, usable, ours))

    def keep(self, number):
        if self._dies:
            super().keep(number)


def test_a_candidate_that_fails_or_lacks_a_point_takes_nothing_from_the_others():
    subjects = [
        Subject("baseline", 1.0, noisy(0)), Losing("candidate", 0.5, noisy(0)), Losing("candidate", 0.5, noisy(0), dies=True),
        Subject("candidate", 0.25, noisy(0)),
    ]  # fmt: skip
    session = Session(subjects, type("Recipe", (), {"benchmark": benchmark(rounds=3)}), Execution())
    session.sides = list
    session.run([], lambda _: False)
    assert [len(subject.rounds[Losing.point]) for subject in subjects] == [3, 0, 1, 3]
    assert [subject.failures for subject in subjects] == [[], [], ["candidate: it was killed"], []]
    assert [turn.round for turn in session.turns if turn.role == "baseline"] == [0, 1, 2]


@pytest.mark.slow
def test_six_recipes_that_share_a_stage_make_it_once_and_take_less_than_7_tenths_of_the_work(toy, monkeypatch, tmp_path):
    """Work is counted in processes that load a model, which is what takes the time here; a sweep of real size starts as many."""
    started = []

    class Counted(process.Child):
        def __init__(self, module, *rest, **named):
            started.append(module)
            super().__init__(module, *rest, **named)

    monkeypatch.setattr("compress.artifacts.Child", Counted)
    monkeypatch.setattr("compress.benchmark.subject.Child", Counted)
    recipes = sweep.expand([toy], ["stages.1.bits=3,4,8", "stages.1.group_size=32,64"], ["benchmark.rounds=2"])
    outcomes = sweep.run(recipes, tmp_path / "many", "cpu")
    assert all(outcome.reason is None for outcome in outcomes)
    assert started.count("compress.stage") == 1 + 6
    together = len(started)
    started.clear()
    single = pipeline.run(recipes[0], tmp_path / "one", "cpu")
    assert started.count("compress.stage") == 2
    one_by_one = 6 * len(started) - 5  # the shared stage would be found made by five of them
    assert together < 0.7 * one_by_one, (together, one_by_one)
    baselines = [outcome.report.side("baseline").figure(("latency_p50", 1, 8)).samples for outcome in outcomes]
    assert all(samples == baselines[0] for samples in baselines), "it was measured once"
    assert {len(outcome.report.turns) for outcome in outcomes} <= {8, 9, 10, 11, 12}, "each has the turns of its own two sides"
    first = outcomes[0].report
    assert [outcome.name for outcome in first.stages] == [outcome.name for outcome in single.stages]
    assert first.stages[-1].artifact.rsplit("/")[-1] == single.stages[-1].artifact.rsplit("/")[-1]
    quality = [report.candidate.figure(("rougeL", None, None)).samples for report in (first, single)]
    assert quality[0] == quality[1]
    started.clear()
    assert [outcome.report.run for outcome in sweep.run(recipes, tmp_path / "many", "cpu")] == [outcome.report.run for outcome in outcomes]
    assert started == []


@pytest.mark.slow
def test_a_sweep_on_ray(toy, tmp_path, monkeypatch):
    """A real one, on this machine: its two runs leave ordinary reports in the folder, and one that fails is told."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    bad = toy.with_name("bad.yaml")
    written = yaml.safe_load(toy.read_text())
    written["stages"][0]["ignore"] = ["nothing"]
    bad.write_text(yaml.safe_dump(written))
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "compress", "sweep", toy, bad, "--on", "ray", "--set", "benchmark.turns=1", "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert done.returncode == 3, done.stderr
    assert [(entry["recipe"], Path(entry["report"]).parent) for entry in answer["reports"]] == [("toy", tmp_path / "reports" / "toy")]
    (failed,) = answer["failed"]
    assert failed["recipe"] == "bad"
    assert "'nothing'" in failed["reason"]


@pytest.mark.slow
def test_a_cluster_gives_what_its_tasks_gave(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))

    def work(number):  # from here, and not by the name of this module, which imports torch
        if number == 1:
            raise RunError("it broke")
        if number == 2:
            raise ValueError("a fault")
        return number

    with cluster() as workers:
        assert workers.room >= 1
        tasks = {workers.start(work, number): number for number in range(3)}
        answers = {}
        while tasks:
            task, answer = workers.first(list(tasks))
            answers[tasks.pop(task)] = str(answer) if isinstance(answer, CompressError) else answer
    assert answers == {0: 0, 1: "it broke", 2: "its Ray task ended: ValueError: a fault"}
