"""The harness by an engine that answers as it is told: what it makes of an engine that is another one, or that fails."""

import re

import pytest

import compress
from compress import engines, pipeline
from compress.benchmark import latency
from compress.engines import Opening
from compress.errors import ModelError, RecipeError
from compress.methods import Settings, quiet
from compress.model.source import Source
from compress.recipe import Generation, Runtime, load
from tests.conftest import TASKS, recipe_for


def opened(folder, task, **settings):
    module = engines.find("fake")
    engine = module.make(Opening(Source(str(folder), task), "cpu", 1, Runtime(), module.Settings(**settings)))
    engine.open()
    return engine


@pytest.fixture
def report_of(toys, rows, write_recipe, tmp_path):
    def run(kind="llama", **changes):
        written = {**recipe_for(kind, toys[kind], rows, stages=[]), **changes}
        return pipeline.run(load(write_recipe(written)), tmp_path / "out", "cpu")

    return run


def test_every_engine_says_what_it_is_and_needs_no_import():
    for name in engines.names():
        module = engines.find(name)
        assert module.__doc__ and module.ABOUT.reads and module.ABOUT.devices
        assert issubclass(module.Settings, Settings)
        assert module.ABOUT.extra or module.ABOUT.apart or not module.ABOUT.packages


def test_a_time_that_is_known_is_what_is_measured(toys):
    engine = opened(toys["llama"], "causal-lm", token_seconds=0.01)
    marks = latency.seconds(engine, latency.prompts(engine.traits, 2, 8), 5)
    assert len(marks) == 5
    assert all(mark >= 0.01 * number for number, mark in enumerate(marks, 1))
    with pytest.raises(RuntimeError, match="5 tokens were forced and 4 came"):
        latency.seconds(opened(toys["llama"], "causal-lm", fails="fewer tokens"), latency.prompts(engine.traits, 2, 8), 5)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_a_report_of_another_engine_has_the_original_beside_it(report_of, kind):
    report = report_of(kind, engine={"name": "fake", "token_seconds": 0.002})
    assert report.engine == "fake"
    assert (report.side("baseline").dtype, report.original.role) == ("float32", "original")
    latency_p50 = min(m.value for m in report.candidate.measurements if m.metric == "latency_p50")
    assert latency_p50 >= 0.002 * (1 if kind == "bert" else report.settings["benchmark"]["new_tokens"])
    assert {c.metric for c in report.against_original} >= {"latency_p50", "weight_bytes"}
    assert (report.agreement.dtype, report.agreement.equal < report.agreement.examples) == (None, True), (
        "it doesn't write what the model writes"
    )
    assert any("which rounding doesn't explain" in sentence for sentence in report.cautions)
    text = (report.folder / "report.md").read_text()
    assert text.startswith("# toy in fake: ")
    assert "## Beside the original in plain transformers" in text
    assert "original in transformers" in (report.folder / "report.html").read_text()


def test_several_engines_have_a_verdict_each_in_one_report(report_of, capsys):
    report = report_of("t5", engines=["transformers", {"name": "fake", "fails": "no text"}], check={"rougeL": {"min": 0.0}})
    first, other = report.parts
    assert [part.engine for part in report.parts] == ["transformers", "fake"]
    assert compress.read_report(report.folder).others[0].gates == other.gates
    assert first.original is None
    assert other.agreement.equal <= other.agreement.examples
    assert {m.value for m in other.candidate.measurements if m.metric == "generated_tokens"} == {0.0}
    assert report.as_json()["others"][0]["engine"] == "fake"
    assert (report.folder / "report.md").read_text().count("\n# toy in fake: ") == 1
    from compress.report import compare

    names = [row.name for row in compare.rows(report.parts)]
    assert [name for name in names if "in fake" in name] == [
        f"baseline {report.settings['model']['id'].rsplit('/', 1)[-1]} in fake",
        "toy in fake (as it is)",
    ]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("killed", "its process was killed"),
        ("fewer tokens", "tokens were forced and"),
        ("hanging", "took longer than the limit and was stopped"),
    ],
)
def test_an_engine_that_fails_is_a_row_with_its_reason(report_of, fails, message):
    benchmark = {
        "batch_sizes": [1],
        "prompt_tokens": [8],
        "new_tokens": 4,
        "rounds": 1,
        "turns": 1,
        "precision": None,
        "limit_minutes": 0.05,
    }
    report = report_of("llama", engine={"name": "fake", "fails": fails}, benchmark=benchmark)
    assert report.verdict == "cannot_tell"
    reasons = [*(failure for side in report.sides for failure in side.failures), *(m.reason or "" for m in report.candidate.measurements)]
    assert any(re.search(message, reason) for reason in reasons), reasons


def test_an_engine_that_cannot_open_a_model_says_so(report_of):
    with pytest.raises(ModelError, match="it was told to fail at opening"):
        report_of("llama", engine={"name": "fake", "fails": "opening"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "fack"}, "there is no engine 'fack'; did you mean 'fake'"),
        ({"engine": {"name": "fake", "nat": 1}}, "unknown key 'nat'; did you mean 'nats'"),
        ({"engine": 3}, "the name of an engine is expected"),
        ({"engines": []}, "a list of engines is expected"),
        ({"engines": ["fake", "fake"]}, "fake stands twice"),
        ({"engine": "fake", "engines": ["fake"]}, "engine and engines mean the same"),
        ({"engine": "fake", "metrics": ["divergence"]}, "divergence can't be measured in it"),
        ({"engine": "fake", "generation": {"do_sample": True, "max_new_tokens": 4}}, "no two engines draw alike"),
        ({"engine": "fake", "stages": [{"export": "ctranslate2"}]}, "it opens no ctranslate2"),
        (
            {"engine": "ctranslate2", "model": {"id": "x", "task": "sequence-classification"}, "metrics": ["accuracy"]},
            "for task seq2seq and causal-lm",
        ),
        ({"stages": [{"export": "ctranslate2"}]}, "it opens no ctranslate2"),
    ],
)
def test_mistakes_about_engines_are_named(toys, rows, write_recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        load(write_recipe({**recipe_for("llama", toys["llama"], rows, stages=[]), **changes}))


def test_an_engine_is_written_into_the_recipe_of_a_report_and_of_its_digest(toys, rows, write_recipe):
    written = recipe_for("t5", toys["t5"], rows, stages=[])
    plain = load(write_recipe(written))
    other = load(write_recipe(written), ["engine=fake"])
    assert "engines" not in plain.as_written()
    assert other.as_written()["engines"] == ["fake"]
    assert plain.digest != other.digest
    assert load(write_recipe({**written, "engines": ["transformers", "fake"]}), ["engine=fake"]).digest == other.digest


def test_what_the_fake_writes_and_reads(toys):
    engine = opened(toys["t5"], TASKS["t5"], nats=1.5)
    assert engine.write([[3, 4, 5, 1]], Generation(max_new_tokens=2), quiet).tokens == [[3, 4]]
    (row,) = engine.read([engines.Piece(0, [3, 4], [5, 6, 1])], quiet)
    assert (row.nats, row.tokens) == (4.5, 3)


def test_prompts_that_have_no_place_in_memory_are_refused_at_once():
    with pytest.raises(MemoryError):
        engines.random_prompts(64, None, 10**12, 8)
    rows = engines.random_prompts(64, 7, 3, 8)
    assert rows == engines.random_prompts(64, 7, 3, 8)
    assert {len(row) for row in rows} == {8}
    assert all(row[-1] == 7 and min(row) >= 7 for row in rows)
