"""The order of events: what names an artifact, what is tidied up, what is put together from measurements."""

import json
import shutil
import threading
from types import SimpleNamespace

import pytest

from compress import artifacts, methods, pipeline, preflight, recipe
from compress.benchmark import figures, isolate
from compress.errors import MissingPackage, ModelError, OutOfMemory
from compress.execution import Execution
from compress.model.source import Source, pinned
from compress.report import verdict, why
from compress.report.html import sections
from compress.requests import Shown
from compress.results.sides import Comparison, GateResult, Step
from compress.results.stages import StageRecord
from tests.conftest import recipe_for


@pytest.fixture
def loaded(toys, rows, write_recipe):
    def load(**changes):
        changes = {"stages": [{"quantize": "rtn", "group_size": -1}], **changes}
        return recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, **changes)))

    return load


def name_of(monkeypatch, loaded_recipe, source, tmp_path, device="cpu"):
    """What the stage's artifact would be called; nothing is made."""
    names = []
    monkeypatch.setattr(
        artifacts,
        "_make_one",
        lambda stage, source, models, shown, target, *_: (names.append(target.name), target.mkdir(parents=True)),
    )
    artifacts.make(loaded_recipe, source, tmp_path / "artifacts", Execution(device, tmp_path / "log"))
    shutil.rmtree(tmp_path / "artifacts")
    return names[0]


def test_an_artifact_is_named_by_all_that_it_depends_on(loaded, toys, tmp_path, monkeypatch):
    copy = tmp_path / "moved" / "llama"
    shutil.copytree(toys["llama"], copy)
    source = Source(str(toys["llama"]), "causal-lm", "float32")
    first = name_of(monkeypatch, loaded(), source, tmp_path)
    assert first.startswith("llama-rtn-")
    assert name_of(monkeypatch, loaded(), source, tmp_path) == first
    assert name_of(monkeypatch, loaded(), Source(str(copy), "causal-lm", "float32"), tmp_path) == first, "content counts, not the place"
    others = {
        name_of(monkeypatch, loaded(stages=[{"quantize": "rtn", "group_size": -1, "bits": 3}]), source, tmp_path),
        name_of(monkeypatch, loaded(calibration={"samples": 5}), source, tmp_path),
        name_of(monkeypatch, loaded(), Source(str(toys["llama"]), "causal-lm", "bfloat16"), tmp_path),
        name_of(monkeypatch, loaded(), source, tmp_path, device="cuda"),
    }
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    others.add(name_of(monkeypatch, loaded(), Source(str(copy), "causal-lm", "float32"), tmp_path))
    monkeypatch.setattr(methods, "versions", lambda names: dict.fromkeys(names, "0"))
    others.add(name_of(monkeypatch, loaded(), source, tmp_path))
    assert len(others | {first}) == 7


def test_a_damaged_artifact_is_made_anew(toys, tmp_path):
    artifact = tmp_path / "artifact"
    assert not artifacts.is_whole(artifact)
    shutil.copytree(toys["llama"], artifact)
    assert artifacts.is_whole(artifact)
    (artifact / "model.safetensors").unlink()
    assert not artifacts.is_whole(artifact)
    assert not artifact.exists()


def test_what_a_killed_stage_left_is_swept(loaded, toys, tmp_path, monkeypatch):
    target = tmp_path / "artifacts" / "llama-rtn-abc"

    class Interrupted:
        def __init__(self, *_, **__):
            (target.parent / f".{target.name}.x1.partial").mkdir(parents=True)

        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(artifacts, "Child", Interrupted)
    loaded_recipe = loaded()
    with pytest.raises(KeyboardInterrupt):
        artifacts._make_one(
            loaded_recipe.stages[0], Source(str(toys["llama"]), "causal-lm"), {}, Shown(), target, Execution("cpu", tmp_path / "log")
        )
    assert list(target.parent.iterdir()) == []


def test_of_two_runs_that_make_the_same_the_second_waits(loaded, toys, tmp_path, monkeypatch):
    target, asked, told, begun, go_on = tmp_path / "artifacts" / "a", [], [], threading.Event(), threading.Event()

    class Slow:
        def __init__(self, *_, **__):
            pass

        def ask(self, *_, **named):
            asked.append(named["target"])
            begun.set()
            go_on.wait(10)
            shutil.copytree(toys["llama"], target)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def make(progress):
        source = Source(str(toys["llama"]), "causal-lm")
        artifacts._make_one(loaded_recipe.stages[0], source, {}, Shown(), target, Execution("cpu", tmp_path / "log", progress))

    monkeypatch.setattr(artifacts, "Child", Slow)
    loaded_recipe = loaded()
    first = threading.Thread(target=make, args=[methods.quiet])
    first.start()
    begun.wait(10)
    second = threading.Thread(target=make, args=[lambda *line: (told.append(line[0]), go_on.set())])
    second.start()
    first.join(10)
    second.join(10)
    assert asked == [str(target)], "one of them made it"
    assert told == 2 * ["waiting for another run that makes the same"], "it waits, and has waited"
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_two_runs_in_one_second_have_places_of_their_own(loaded, tmp_path):
    loaded_recipe = loaded()
    with pipeline._place(loaded_recipe, tmp_path) as (first, _), pipeline._place(loaded_recipe, tmp_path) as (second, _):
        assert first != second


def test_speeds_by_hand():
    """Two rounds of two turns of two generations of three tokens, batch 4."""
    rounds = [[[[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]], [[2.0, 3.0, 4.0]] * 2], [[[1.0, 1.5, 2.0]] * 2] * 2]
    measurements = {m.metric: m for m in figures._speeds(rounds, figures._rates(rounds, 4), 4, 16)}
    assert measurements["latency_p50"].samples == [[4.0, 4.0], [2.0, 2.0]]
    assert measurements["latency_p50"].raw == [[3.0, 5.0, 4.0, 4.0], [2.0, 2.0, 2.0, 2.0]]
    assert measurements["latency_p50"].value == pytest.approx(8**0.5)  # the geometric mean of 4 4 2 2
    assert measurements["latency_p90"].samples == [[pytest.approx(4.7)], [2.0]]
    assert measurements["ttft"].samples == [[1.0, 2.0], [1.0, 1.0]]
    assert measurements["tpot"].samples == [[1.5, 1.0], [0.5, 0.5]]
    assert measurements["tokens_per_second"].samples[1] == [6.0, 6.0]  # 4 x 3 tokens in 2 s


def test_the_figures_of_two_sides_have_the_ratio_that_is_judged():
    """Timings whose medians say faster and whose means by turn say slower: columns and change must say the same."""
    turns = {"baseline": [[[0.220]], [[0.221]], [[0.180]]], "candidate": [[[0.219]], [[0.2195]], [[0.205]]]}
    theirs, ours = (figures._speeds([turn], figures._rates([turn], 1), 1, 16)[0] for turn in turns.values())
    compared = verdict.compare(verdict.Pair(theirs, ours, same_run=True), 0.95)
    assert compared.estimate == pytest.approx(ours.value / theirs.value) and compared.estimate > 1
    assert [round(side.value, 4) for side in (theirs, ours)] == [0.2061, 0.2144]
    nothing = figures.central([[0.0], [3.0], [1.0]])
    assert nothing == 1.0, "without a logarithm the median stands"


def test_utilisations_by_hand():
    """A step of 0.5 s reads 80 + 20 bytes of 1000 a second; prefill in 1 s computes 600 of 2000, a classification its own."""
    ceilings = {"copy_bytes_per_second": 1000, "float32_flops_per_second": 2000}
    step = Step(batch_size=4, prompt_tokens=16, weight_bytes=80, cache_bytes=20, flops=50, prefill_flops=600, seconds=None, shares={})
    rounds = [[[[1.0, 1.5, 2.0]]]]
    utilisations = {m.metric: m.value for m in figures._speeds(rounds, figures._utilisations(step, ceilings, "float32"), 4, 16)}
    assert utilisations == {"mbu": 0.2, "mfu": 0.3}
    passed = step.model_copy(update={"prefill_flops": None})
    utilisations = {m.metric: m.value for m in figures._speeds([[[[0.1]]]], figures._utilisations(passed, ceilings, "float32"), 4, 16)}
    assert utilisations == {"mfu": pytest.approx(0.25)}


def test_energy_by_hand():
    """Two turns of two generations of three tokens, batch 4: 24 tokens a turn."""
    rounds = [[[[1.0, 2.0, 3.0]] * 2] * 2]
    (energy,) = figures._energy(rounds, [[48.0, 96.0]], 4, 16)
    assert (energy.value, energy.samples, energy.unit) == (pytest.approx(8**0.5), [[2.0, 4.0]], "J")
    assert figures._energy(rounds, [[48.0]], 4, 16) == [], "a turn without"
    assert figures._energy(rounds, [[]], 4, 16) == []


def test_of_two_sides_ceilings_the_better_counts():
    sides = [
        Explained({"copy_bytes_per_second": 5, "float32_flops_per_second": 9}),
        Explained({"copy_bytes_per_second": 7}),
        Explained(None),
    ]
    assert isolate._ceilings(sides) == {"copy_bytes_per_second": 7, "float32_flops_per_second": 9}


class Explained:
    def __init__(self, ceilings):
        self.explanation = ceilings and SimpleNamespace(ceilings=ceilings)


class Crowded:
    """A side that fits into memory only without the other."""

    def __init__(self, at_load, too_large=False):
        self.at_load, self.too_large, self.stopped, self.log = at_load, too_large, False, []
        self.short_of_memory = False

    def start(self):
        self.log.append("start")
        if self.at_load:
            raise OutOfMemory("memory ran out")
        self.short_of_memory = True

    def start_alone(self):
        self.log.append("start alone")
        self.short_of_memory = self.too_large

    def stop(self):
        self.stopped = True


@pytest.mark.parametrize("at_load", [True, False])
def test_sides_that_do_not_fit_together_are_measured_apart(at_load):
    side, other = Crowded(at_load), Crowded(at_load)
    assert isolate._bring_up(side, [other]) is True
    assert side.log == ["start", "start alone"]
    assert other.stopped


def test_a_point_that_does_not_fit_alone_either_keeps_the_sides_together():
    side = Crowded(at_load=False, too_large=True)
    assert isolate._bring_up(side, [Crowded(at_load=False)]) is False
    assert isolate._bring_up(side, [Crowded(at_load=False)]) is False
    assert side.log == ["start", "start alone", "start"], "known by now, it is not tried again"


def test_a_side_that_does_not_fit_alone_either_says_so():
    with pytest.raises(OutOfMemory):
        isolate._bring_up(Crowded(at_load=True), [])
    points_lost = Crowded(at_load=False)
    assert isolate._bring_up(points_lost, []) is False
    assert points_lost.log == ["start"]


def ratio(metric, estimate, low, high, **point):
    return Comparison(metric=metric, baseline=100.0, candidate=100 * estimate, kind="ratio", estimate=estimate, low=low, high=high, **point)


STAGES = [StageRecord(stage={"quantize": "bnb_nf4"}, artifact="a", seconds=1, reused=False)]


def test_the_report_says_why_it_is_slower_or_no_smaller():
    slow = ratio("latency_p50", 1.5, 1.2, 1.8, batch_size=8, prompt_tokens=64)
    (note,) = why.notes(STAGES, [slow], {}, [])
    assert note.startswith(
        "Slower than the baseline at batch 8 x prompt 64: x1.500 (1.200 to 1.800). quantize: bnb_nf4: the weights are unpacked"
    )
    maybe = ratio("latency_p50", 1.5, 0.9, 2.5, batch_size=8, prompt_tokens=64)
    assert why.notes(STAGES, [maybe], {}, []) == []
    (note,) = why.notes(STAGES, [ratio("weight_bytes", 1.0, 1.0, 1.0)], {}, [])
    assert note.startswith("Once loaded, the weights take no less memory than before. quantize: bnb_nf4:")
    notes = why.notes(STAGES, [ratio("weight_bytes", 1.0, 1.0, 1.0), ratio("file_bytes", 0.3, 0.3, 0.3)], {}, [])
    assert "though on disk they are x0.300" in notes[0]
    (note,) = why.notes(STAGES, [ratio("weight_bytes", 0.3, 0.3, 0.3), ratio("peak_run_bytes", 1.0, 0.99, 1.01)], {}, [])
    assert "they are now 30% of it" in note
    assert "3 inputs were longer" in why.notes(STAGES, [], {"inputs_cut": 3}, [])[0]


def test_a_note_is_no_surer_than_the_gate():
    slow = ratio("latency_p50", 1.06, 1.01, 1.11, batch_size=8, prompt_tokens=64)
    gate = GateResult(
        metric="latency_p50", limit_kind="max_ratio", limit=1.0, estimate=1.06, interval=(1.01, 1.11), verdict="cannot_tell",
        sentence="on its own it would fail, as one of 7 it may be chance", batch_size=8, prompt_tokens=64,
    )  # fmt: skip
    assert why.notes(STAGES, [slow], {}, [])[0].startswith("Slower than the baseline")
    shrank = ratio("weight_bytes", 0.3, 0.3, 0.3)
    assert not any(note.startswith("Slower") for note in why.notes(STAGES, [slow, shrank], {}, [], [gate]))
    assert sections.mark(slow, set()) == "worse" and sections.mark(slow, {slow.point}) == ""


def test_no_reason_is_given_that_can_not_slow_a_step():
    slow = ratio("latency_p50", 1.5, 1.2, 1.8, batch_size=8, prompt_tokens=64)
    for method, family in (("gptq", "quantize"), ("structured", "prune"), ("wanda", "prune"), ("full", "finetune")):
        (note,) = why.notes([StageRecord(stage={family: method}, artifact="a", seconds=1, reused=False)], [slow], {}, [])
        assert note.endswith("Nothing was done to the model that would explain it."), method


def test_hub_ids_are_pinned_to_a_commit(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, id, **_: type("Info", (), {"sha": "abc123"}))
    assert pinned(Source("google/flan-t5-small", "seq2seq")).revision == "abc123"


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    import huggingface_hub

    def silent(self, id, **_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(ModelError, match="no folder of that name here, and the hub does not answer: no route"):
        pinned(Source("nobody/no-such-model", "seq2seq"))


def test_a_tokenizer_whose_packages_are_missing_is_refused_with_the_way_out(monkeypatch):
    quickstart = recipe.load("quickstart", ["metrics=[rouge, {bleu: {tokenizer: ja-mecab}}]"])
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(
        MissingPackage,
        match=r"tokenizer ja-mecab needs packages that aren't here; char needs none\. Install with: pip install 'mecab-python3",
    ):
        pipeline.refuse(quickstart, "cpu", 1)
