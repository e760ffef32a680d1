"""The code of a card, run as it stands in a process that knows nothing else, gives what the report holds."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

from compress import data, recipe, scores
from compress.benchmark.messages import Answer
from compress.benchmark.statistics import corpus_value
from compress.methods import Context, quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.quantize import int8_dynamic
from compress.report import card, usage
from compress.results.report import Prediction
from compress.results.stages import StageRecord
from tests.conftest import TASKS, make_tokenizer, recipe_for
from tests.measuring import loaded
from tests.report.test_files import made

LONG = "{said} {said} {said} {said} {said} {said}"
TICKS = "```\n<script>alert(1)</script> {said}\\\n    ---"
CASES = {  # a toy, what its recipe says otherwise
    "seq2seq": ("t5", {"data": {"prompt": TICKS, "target": "{short}"}}),
    "beams": ("bart", {"generation": {"max_new_tokens": 6, "num_beams": 3, "repetition_penalty": 1.3}}),
    "cut": ("t5", {"data": {"prompt": LONG, "target": "{short}", "max_tokens": 9}}),
    "int8": ("t5", {}),
    "decoder": ("llama", {"data": {"prompt": LONG, "target": "{short}", "max_tokens": 7}}),
    "chat": ("llama", {"data": {"prompt": "{said}", "target": "{short}", "chat": True}}),
    "shots": ("llama", {"data": {"prompt": "{said}", "target": "{short}", "shots": 2, "shot_separator": " and "}}),
    "classifier": ("bert", {}),
    "text": ("llama", {"data": {"text": "{said}"}}),
    "answer": ("llama", {"metrics": ["perplexity"]}),
    "translation": ("t5", {"metrics": ["perplexity"]}),
}
RUN = """
import contextlib, io, json, os, sys
found = []
for folder, code in json.load(sys.stdin):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "__main__"})
    found.append(printed.getvalue())
print(json.dumps(found))
"""


def artifact(name, kind, toys, folder):
    """The model that a case's candidate is."""
    if name == "int8":
        bundle = Bundle(Source(str(toys[kind]), TASKS[kind], "float32"), "cpu")
        int8_dynamic.apply(bundle, int8_dynamic.Settings(), Context(device="cpu", progress=quiet)).save(folder)
    else:
        shutil.copytree(toys[kind], folder)
    if kind == "t5":  # which else writes padding alone
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "suppress_tokens": [0, 1, 2]}))
    words = make_tokenizer()
    words.add_tokens([f"word{number}" for number in range(len(words), 64)])  # every token that the model may write is seen
    words.chat_template = "the {{ messages[0]['content'] }} and" if name == "chat" else None
    words.save_pretrained(folder)


def measured(parsed, folder):
    """A report with what a measuring process gives for the examples of a recipe."""
    examples = data.examples(parsed.data, parsed.folder, "evaluation", 6, 0)
    written = parsed.as_written()
    worker, _ = loaded(folder, parsed.model.task, runtime=written["benchmark"]["runtime"])
    outputs = worker.answer(quiet, Answer(examples, list(parsed.groups), written["generation"], written["data"]))
    references = [example.references for example in examples]
    compares = outputs.texts is not None and "rouge" in parsed.groups
    samples = {**(scores.rouge(outputs.texts, references) if compares else {}), **outputs.samples}
    score = next((name for name in ("rougeL", "perplexity", "accuracy") if name in samples), None)
    predictions = [
        Prediction(
            **asdict(example), candidate=outputs.texts and outputs.texts[number],
            candidate_score=corpus_value(score, [samples[score][number]]),
        )
        for number, example in enumerate(examples)
    ]  # fmt: skip
    environment = {"device": "cpu", "cpu": "Abacus 3", "longest_input": outputs.longest_input, "inputs_cut": outputs.cut}
    return made(settings={**written, "check": {}}, environment=environment, predictions=predictions, score=score)


@pytest.fixture(scope="module")
def cards(toys, rows, tmp_path_factory):
    """Of each case the card, the report, and what the card's code printed."""
    contents, place = {}, tmp_path_factory.mktemp("a folder")
    for name, (kind, changes) in CASES.items():
        folder = place / "artifacts" / name
        artifact(name, kind, toys, folder)
        written = recipe_for(kind, toys[kind], rows, stages=[{"quantize": "int8_dynamic"}], **changes)
        written["data"] = {"source": str(rows), **written["data"]}
        if name == "int8":
            written["benchmark"]["runtime"] = {"cpu_int8": True}
        file = place / f"{name}.yaml"
        file.write_text(json.dumps(written))
        loaded = recipe.load(file)
        report = measured(loaded, folder)
        record = StageRecord(stage=loaded.stages[0].as_written(), artifact=str(folder), seconds=1, reused=False)
        card.write(loaded, Source(str(toys[kind]), TASKS[kind]), [record], report)
        contents[name] = (folder / "README.md").read_text(), report
    codes = [(str(place / "artifacts" / name), code_of(text)) for name, (text, _) in contents.items()]
    ran = subprocess.run([sys.executable, "-c", RUN], input=json.dumps(codes), capture_output=True, text=True, timeout=240, cwd=place)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {name: (*both, printed) for (name, both), printed in zip(contents.items(), json.loads(ran.stdout), strict=True)}


def code_of(text):
    return re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]


@pytest.mark.parametrize("name", CASES)
def test_its_code_gives_the_reports_first_output(cards, name):
    text, report, printed = cards[name]
    if report.environment["inputs_cut"]:
        assert f"if it is no longer than {report.environment['longest_input']} tokens" in text
        return
    first = report.predictions[0]
    if printed.strip():
        shown = text.split("what the report has:\n\n")[1].split("\n\n#")[0]
        assert [line.removeprefix("    ") for line in shown.split("\n")] == printed.rstrip("\n").split("\n")
    else:
        assert "prints an empty line" in text
    if first.candidate is None:
        assert float(printed) == pytest.approx(first.candidate_score, rel=1e-3)
    else:
        assert printed == f"{first.candidate}\n"
    above = text.split("## Recipe")[0]
    assert "<script>" not in above and above.count("```") == 2


def test_outputs_are_not_all_empty(cards):
    assert sum(bool(printed.strip()) for _, _, printed in cards.values()) >= len(CASES) - 1


def test_it_says_in_which_runtime_figures_were_measured(cards):
    text = cards["int8"][0]
    assert "compress.use_cpu_int8(model)" in text and "Runtime of both models: int8 layers by `compress.use_cpu_int8`." in text
    plain = cards["seq2seq"][0]
    assert "Runtime of both models: plain transformers." in plain and "import compress" not in plain


def test_what_can_not_be_promised_is_not(toys, rows, write_recipe, tmp_path):
    def section(predictions, **changes):
        parsed = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=[{"quantize": "rtn"}], **changes)))
        return usage.section(parsed, toys["llama"], made(predictions=predictions, score="perplexity"))

    drawn = section([Prediction(id="a", prompt="the cat", references=["x"], candidate="mat")], generation={"do_sample": True, "top_k": 3})
    assert "transformers draws another" in drawn and "do_sample=True, top_k=3" in drawn and "seed" not in drawn and "    mat" not in drawn
    long = section([Prediction(id="a", prompt="cat " * 3000, references=["x"], candidate="mat")])
    assert "longer than 4,000 characters" in long and "    mat" not in long
    data = {"source": str(rows), "text": "{said}", "stride": 4}
    windows = section([Prediction(id="a", prompt="the cat", references=[], candidate_score=3.0)], data=data)
    assert "what the report has" not in windows
