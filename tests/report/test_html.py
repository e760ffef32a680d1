"""The page of a report: what it says, and that everything in it is text."""

import base64
import gzip
import json
import random
import re

import pytest
import vl_convert

from compress.report import html, plots
from compress.report.html import examples, sections
from compress.results.report import Prediction
from compress.results.sides import Comparison, GateResult, Measurement, Side
from compress.results.stages import Layer, Point, StageRecord
from tests.report.test_files import made

WORDS = [f"{first}{last}" for first in ("ba", "ko", "li", "mu", "re", "sta", "ti", "vo") for last in ("n", "ra", "s", "to", "lle")]
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\x1b[31mred {{ 7*7 }}"
HEBREW = "\u202eשלום עולם"
RATIO = GateResult(
    metric="rougeL", limit_kind="min_ratio", limit=0.97, estimate=0.989, interval=(0.959, 1.021), verdict="cannot_tell",
    sentence="rougeL ratio is 0.989 (95 % 0.959 to 1.021); at least 0.97 is allowed",
)  # fmt: skip


def embedded(page):
    """What the page's script reads."""
    packed = re.search(r'id="data">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def shown(page):
    """The page without its scripts and its style."""
    return re.sub(r"(?s)<(script|style)\b.*?</\1>", "", page)


def large(number=1, examples=500, words=120, points=6, seed=0):
    """A report as of a real run: texts of some length, every kind of figure, several grid points."""
    drawn = random.Random(seed)
    prompts = [" ".join(drawn.choices(WORDS, k=words)) for _ in range(examples)]
    baseline = [" ".join(drawn.choices(WORDS, k=30)) for _ in range(examples)]
    drawn = random.Random(seed + number)
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    kinds = [name + part for name in names for part in ("", "_precision", "_recall")]

    def side(role, factor):
        quality = [
            Measurement(metric=name, value=70 - factor, samples=[[drawn.uniform(0, 100)] for _ in range(examples)]) for name in kinds
        ]
        sizes = {
            "weight_bytes": 9e6, "file_bytes": 9e6, "peak_run_bytes": 2e7, "buffer_bytes": 1e5, "kv_cache_bytes": 1e6,
            "activation_bytes": 8e6,
        }  # fmt: skip
        exact = [Measurement(metric=name, value=value / factor, samples=[[value / factor]]) for name, value in sizes.items()]
        timed = []
        for point in range(points):
            for metric in ("latency_p50", "ttft", "tpot"):
                raw = [[drawn.lognormvariate(-3, 0.1) / factor for _ in range(30)] for _ in range(6)]
                place = {"batch_size": 2 ** (point % 3), "prompt_tokens": 64 * (1 + point // 3)}
                timed.append(Measurement(metric=metric, value=raw[0][0], samples=[[row[0]] for row in raw], raw=raw, **place))
        return Side(role=role, model=f"/models/{role}", measurements=[*quality, *exact, *timed])

    sides = [side("baseline", 1.0), side("candidate", 1.0 + number)]
    predictions = []
    for place, (prompt, text) in enumerate(zip(prompts, baseline, strict=True)):
        ours = " ".join(word if drawn.random() < 0.8 else drawn.choice(WORDS) for word in text.split())
        scores = {"baseline_score": drawn.uniform(0, 100), "candidate_score": drawn.uniform(0, 100)}
        predictions.append(Prediction(id=f"test-{place}", prompt=prompt, references=[text], baseline=text, candidate=ours, **scores))
    layers = [
        Layer(name=f"decoder.layers.{n}.{kind}", bits=4, error=drawn.random() / 10) for n in range(12) for kind in ("q", "k", "v", "fc1")
    ]
    curve = [Point(step=step, loss=3 / step, validation=step if step % 10 == 0 else None) for step in range(1, 200)]
    stages = [
        StageRecord(stage={"quantize": "gptq", "bits": 4}, artifact="a", seconds=90, reused=False, layers=layers),
        StageRecord(stage={"distill": "logits"}, artifact="b", seconds=9, reused=True, curve=curve),
    ]
    compared = [
        Comparison(
            metric="rougeL", baseline=69, candidate=69 - number, kind="difference", estimate=-number, low=-number - 1, high=-number + 1
        )
    ]
    return made(
        f"candidate-{number}",
        sides=sides,
        predictions=predictions,
        stages=stages,
        comparisons=compared,
        gates=[RATIO],
        decided_by=RATIO.sentence,
    )


def test_the_verdict_comes_first_in_a_sentence_with_its_interval():
    text = shown(html.render([made(verdict="cannot_tell", gates=[RATIO], decided_by=RATIO.sentence)]))
    assert '<h1 dir="auto">May toy replace baseline?</h1>' in text
    first = text.index("<strong>cannot tell yet</strong>")
    assert text.index(f"{RATIO.sentence}.</span>", first) < text.index("<h2")
    passed = RATIO.model_copy(update={"verdict": "pass"})
    assert f"every gate holds; {RATIO.sentence}." in shown(html.render([made(gates=[passed])]))


def test_sections_come_in_the_order_of_their_weight():
    text = shown(html.render([large(examples=3)]))
    order = [re.search(rf'<h2 id="{name}"', text).start() for name in (
        "gates", "figures", "tradeoff", "latency", "memory", "stages", "layers", "training", "examples", "recipe", "environment",
    )]  # fmt: skip
    assert order == sorted(order)


def test_markup_and_controls_are_shown_as_text_wherever_they_stand():
    side = made().sides[1].model_copy(update={"failures": [EVIL], "model": f"/m/{EVIL}"})
    report = made(
        f"{EVIL}{HEBREW}", decided_by=EVIL, notes=[EVIL], sides=[made().sides[0].model_copy(update={"model": EVIL}), side],
        environment={EVIL: EVIL}, settings={**made().settings, EVIL: EVIL}, gates=[RATIO.model_copy(update={"sentence": EVIL})],
        stages=[StageRecord(stage={"quantize": EVIL}, artifact=EVIL, seconds=1, reused=False, said=[EVIL], layers=[Layer(name=EVIL, error=0.1, remark=EVIL)])],
        predictions=[Prediction(id=EVIL, prompt=EVIL, references=[EVIL], baseline=EVIL, candidate=HEBREW)],
    )  # fmt: skip
    page = html.render([report])
    assert "<img" not in shown(page) and page.count("<script") == 3, "the data and two scripts, as ever"
    assert "\x1b" not in page and "\u202e" not in page
    assert "{{ 7*7 }}" in shown(page)
    assert not re.search("u001b|\u202e", json.dumps(embedded(page)["charts"], ensure_ascii=False))
    example = embedded(page)["examples"][0]
    assert example["prompt"].startswith("<img") and "\x1b" not in example["prompt"]
    assert "".join(example["outputs"][0]["candidate"]) == HEBREW.replace("\u202e", "\N{REPLACEMENT CHARACTER}")


def test_only_the_pages_own_scripts_may_run_and_nothing_may_be_asked_for():
    page = html.render([made()])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and policy.count("sha256-") == 2
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:)", shown(page))


def test_what_is_missing_is_a_dash_or_its_reason_and_never_zero():
    lacking = Side(role="candidate", model="c", measurements=[Measurement(metric="rougeL", value=None, reason="the output was empty")])
    predictions = [Prediction(id="1", prompt="p", references=[], baseline="a", candidate=None, baseline_score=1.0, candidate_score=None)]
    page = html.render([made(sides=[made().sides[0], lacking], predictions=predictions, stages=[], verdict="fail", decided_by="x")])
    row = re.search(r"(?s)>rougeL .*?</tr>", shown(page))[0]
    assert "71.50" in row and "the output was empty" in row
    row = re.search(r"(?s)>weight_bytes .*?</tr>", shown(page))[0]
    assert re.findall(r'value">([^<]*)<', row) == ["4.00 MB", "-"]
    output = embedded(page)["examples"][0]["outputs"][0]
    assert output["scores"] == [1.0, None] and output["candidate"] is None and output["changed"] is None


@pytest.mark.parametrize(
    ("theirs", "ours", "left", "right", "changed"),
    [
        ("the cat sat", "the dog sat", ["the ", "cat ", "sat"], ["the ", "dog ", "sat"], 1 / 3),
        ("a b", "a b", ["a b"], ["a b"], 0),
        ("", "new words", ["", ""], ["", "new words"], 1),
        ("one  two\n", "one two", ["one  two\n"], ["one two"], 0),
        ("Yes, it is.", "No, it is!", ["", "Yes", ", it is", "."], ["", "No", ", it is", "!"], 2 / 5),
        ("שלום עולם 👩\u200d👩\u200d👧", "שלום 👩\u200d👩\u200d👧", ["שלום ", "עולם ", "👩\u200d👩\u200d👧"], ["שלום ", "", "👩\u200d👩\u200d👧"], 1 / 5),
    ],
)  # fmt: skip
def test_words_that_differ_are_marked_on_both_sides(theirs, ours, left, right, changed):
    assert examples.marked(theirs, ours) == (left, right, pytest.approx(changed, abs=1e-4))


def test_long_outputs_are_kept_whole():
    lines = [f"line {n} of the same thing" for n in range(3000)]
    theirs, ours = "\n".join(lines), "\n".join(line.replace("same", "other") for line in lines)
    left, right, _ = examples.marked(theirs, ours)
    assert ("".join(left), "".join(right)) == (theirs, ours)
    assert (left[0], left[-1], len(left)) == ("line 0 of the ", "thing", 3), "words that many are not compared one by one"


def test_repetitive_texts_differ_by_what_was_inserted():
    words = ["the cat sat on the mat"] * 50
    for theirs, ours, changed in (
        (" ".join(words), " ".join([*words[:20], "down", *words[20:]]), 1 / 601),
        ("the cat sat " * 60, "the cat sat down " * 60, 1 - 2 * 180 / 420),
    ):
        left, right, share = examples.marked(theirs, ours)
        assert ("".join(left), "".join(right)) == (theirs, ours)
        assert share == pytest.approx(changed, abs=1e-3)


def test_candidates_stand_beside_the_baseline_that_they_share():
    reports = [made("first"), made("second"), made("second", run="r2")]
    names = [column.name for column in sections.columns(reports)]
    assert names == ["baseline", "first r1", "second r1", "second r2"]
    assert [column.name for column in sections.columns([made("a"), made("b")])] == ["baseline", "a", "b"]
    other = made("b", sides=[made().sides[0].model_copy(update={"model": "/m/other"}), made().sides[1]])
    assert [column.name for column in sections.columns([made("a"), other])] == ["baseline baseline", "baseline other", "a", "b"]
    single = made("alone", sides=made().sides[1:])
    assert [column.name for column in sections.columns([single])] == ["alone"]
    assert "alone, without a baseline" in html.render([single])


@pytest.mark.parametrize(
    ("metric", "kind", "low", "high", "expected"),
    [
        ("rougeL", "difference", -3.0, -1.0, "worse"),
        ("rougeL", "difference", -3.0, 1.0, ""),
        ("perplexity", "difference", 0.1, 0.2, "worse"),
        ("latency_p50", "ratio", 0.8, 0.9, "better"),
        ("tokens_per_second", "ratio", 1.1, 1.2, "better"),
        ("weight_bytes", "ratio", 0.5, 0.5, "better"),
        ("generated_tokens", "difference", 1.0, 2.0, ""),
        ("rougeL", "difference", None, None, ""),
    ],
)
def test_better_and_worse_are_said_beyond_doubt_alone(metric, kind, low, high, expected):
    assert sections.mark(Comparison(metric=metric, baseline=1, candidate=1, kind=kind, estimate=1, low=low, high=high), set()) == expected


def test_a_gate_is_drawn_with_what_it_allows_to_the_right_side_of_its_limit():
    at = sections.picture(RATIO)
    assert 0 < at["low"] < at["limit"] < at["at"] < at["high"] < 100
    assert (at["begin"], at["end"]) == (at["limit"], 100)
    assert sections.picture(RATIO.model_copy(update={"limit_kind": "max_ratio"}))["begin"] == 0
    assert sections.picture(RATIO.model_copy(update={"estimate": None, "interval": None})) is None


def on_the_front(points, across, up):
    """By the definition: no other model is at least as good in both and better in one. Lower is better across, higher up."""
    models = [(p["name"], p["figures"][across], p["figures"][up]) for p in points]
    return {n for n, x, y in models if not any(a <= x and b >= y and (a < x or b > y) for _, a, b in models)}


def test_the_front_is_the_models_that_none_beats():
    drawn = random.Random(3)
    sizes = [drawn.randint(1, 12) for _ in range(20)]
    points = [
        {"name": f"m{n}", "role": "candidate", "figures": {"rougeL": size + drawn.randint(50, 58), "weight_bytes": size * 1e6}}
        for n, size in enumerate(sizes)
    ]  # fmt: skip
    spec = plots.tradeoff(
        [*points, {"name": "lacks one", "role": "candidate", "figures": {"rougeL": 99.0, "weight_bytes": None}}]
    ).to_dict()
    svg = vl_convert.vegalite_to_svg(spec | {"width": 600})
    named = set(re.findall(r">(m\d+)</text>", svg))
    front = on_the_front(points, "weight_bytes", "rougeL")
    values = {name: tuple(p["figures"].values()) for p in points if (name := p["name"])}
    assert {values[name] for name in named} == {values[name] for name in front}, "more than a dozen models: those on the front are named"
    assert 1 < len(named) < 12 and "lacks one" not in svg


def test_a_trade_off_needs_two_figures_with_a_better_side():
    with pytest.raises(ValueError, match="there are weight_bytes"):
        plots.tradeoff([{"name": "a", "role": "baseline", "figures": {"weight_bytes": 1.0, "generated_tokens": 3.0, "rougeL": None}}])


def test_five_candidates_and_500_examples_stay_under_3_mb_with_every_number():
    reports = [large(number) for number in range(1, 6)]
    page = html.render(reports)
    assert len(page.encode()) < 3e6
    data = embedded(page)
    assert "Left out" not in page and len(data["examples"]) == 500
    kept = data["reports"][3]["sides"][1]["measurements"]
    assert [m["raw"] for m in kept] == [m.raw for m in reports[3].candidate.measurements]
    assert [m["samples"] for m in kept] == [m.samples for m in reports[3].candidate.measurements]


def test_what_does_not_fit_is_left_out_by_name_least_changed_first(monkeypatch):
    monkeypatch.setattr(html, "ROOM", 500_000)
    report = large(examples=1200)
    page = html.render([report])
    data = embedded(page)
    assert 0 < len(data["examples"]) <= 500
    assert f"{1200 - len(data['examples']):,} of 1,200 examples, those that changed least" in page
    change = {p.id: abs(p.candidate_score - p.baseline_score) for p in report.predictions}
    kept = {example["id"] for example in data["examples"]}
    assert min(change[name] for name in kept) >= max(change[name] for name in change.keys() - kept)
    monkeypatch.setattr(html, "ROOM", 1)
    assert "and the samples of every figure. They are in the report.json of each run" in html.render([large(examples=3)])
