"""Gates: pass, fail and cannot tell, each from its interval."""

import pytest

from compress.errors import ReportError
from compress.recipe import Gate
from compress.report import verdict
from compress.results.sides import Measurement, Side
from tests.report.test_files import made


def side(role, **figures):
    return Side(role=role, model=role, measurements=list(figures.values()))


def quality(values, metric="rougeL"):
    return Measurement(metric=metric, value=sum(values) / len(values), samples=[[v] for v in values])


def speed(values, metric="latency_p50", batch_size=1):
    return Measurement(
        metric=metric, value=sorted(values)[len(values) // 2], batch_size=batch_size, prompt_tokens=64, samples=[[v] for v in values]
    )


def judge(theirs, ours, metric, **limits):
    return every(side("baseline", m=theirs), side("candidate", m=ours), {metric: Gate(**limits)})[0]


def every(a, b, check):
    return verdict.gates(check, verdict.pairs(a, b, True), a, b, 0.95)


BASE = [float(30 + (n * 37) % 41) for n in range(200)]
NOISE = [((n * 61) % 21 - 10) / 4 for n in range(200)]


@pytest.mark.parametrize(
    ("drop", "limit", "expected"), [(0.0, 1.0, "pass"), (2.0, 1.0, "fail"), (1.0, 1.0, "cannot_tell"), (-3.0, 0.0, "pass")]
)
def test_a_drop_in_quality(drop, limit, expected):
    ours = [b - drop + n for b, n in zip(BASE, NOISE, strict=True)]
    gate = judge(quality(BASE), quality(ours), "rougeL", max_drop=limit)
    assert gate.verdict == expected
    assert gate.estimate == pytest.approx(drop - sum(NOISE) / 200, abs=1e-9)
    assert gate.interval[0] < gate.estimate < gate.interval[1]


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "pass"), (1.3, "fail"), (1.1, "cannot_tell")])
def test_a_ratio_of_speeds(factor, expected):
    theirs = [1.0, 1.5, 0.9, 1.1, 2.0]
    ours = [factor * t * w for t, w in zip(theirs, [1.01, 0.98, 1.02, 0.99, 1.0], strict=True)]
    assert judge(speed(theirs), speed(ours), "latency_p50", max_ratio=1.1).verdict == expected


def test_exact_figures_need_no_interval():
    a, b = Measurement(metric="weight_bytes", value=100.0), Measurement(metric="weight_bytes", value=60.0)
    assert judge(a, b, "weight_bytes", max_ratio=0.6).verdict == "pass"
    assert judge(a, b, "weight_bytes", max_ratio=0.59).verdict == "fail"
    assert judge(a, b, "weight_bytes", max_rise=0).verdict == "pass"
    assert judge(a, b, "weight_bytes", max=50).verdict == "fail"


def test_one_turn_cannot_tell():
    assert judge(speed([1.0]), speed([1.0]), "latency_p50", max_ratio=2).verdict == "cannot_tell"


def test_what_was_not_measured_cannot_pass():
    lost = Measurement(metric="latency_p50", value=None, batch_size=1, prompt_tokens=64, reason="out of memory")
    gate = judge(speed([1.0, 1.0]), lost, "latency_p50", max_ratio=2)
    assert gate.verdict == "cannot_tell"
    assert gate.sentence == "latency_p50 [batch 1, prompt 64]: max_ratio 2 can't be checked: out of memory"


def test_one_grid_point_that_was_lost_spoils_the_pass_of_the_others():
    lost = Measurement(metric="latency_p50", value=None, batch_size=8, prompt_tokens=64, reason="out of memory")
    a = Side(role="baseline", model="a", measurements=[speed([1.0, 1.0, 1.01]), speed([1.0, 1.0, 1.01], batch_size=8)])
    b = Side(role="candidate", model="b", measurements=[speed([1.0, 1.0, 1.01]), lost])
    results = every(a, b, {"latency_p50": Gate(max_ratio=1.05)})
    assert sorted(r.verdict for r in results) == ["cannot_tell", "pass"]
    assert verdict.decide(results, [])[0] == "cannot_tell"


def test_a_broken_candidate_fails():
    broken = Measurement(metric="perplexity", value=None, reason="its value is nan")
    assert judge(quality(BASE, "perplexity"), broken, "perplexity", max_ratio=1.1).verdict == "fail"


def test_every_grid_point_is_checked_and_the_worst_decides():
    a = Side(role="baseline", model="a", measurements=[speed([1.0, 1.0, 1.0], batch_size=b) for b in (1, 8)])
    b = Side(role="candidate", model="b", measurements=[speed([1.0, 1.0, 1.01]), speed([3.0, 3.0, 3.01], batch_size=8)])
    results = every(a, b, {"latency_p50": Gate(max_ratio=1.05)})
    assert [r.verdict for r in results] == ["pass", "fail"]
    decision, reason = verdict.decide(results, [])
    assert decision == "fail"
    assert reason.startswith("latency_p50 [batch 8, prompt 64] ratio is 3.0")


def test_limits_on_the_candidate_alone():
    gate = judge(quality(BASE), quality(BASE), "rougeL", min=40)
    assert gate.verdict == "pass"
    assert gate.interval[0] < gate.estimate < gate.interval[1]
    assert judge(speed([1.0]), speed([0.999, 5.0, 0.2]), "latency_p50", max=1.0).verdict == "cannot_tell"


def test_a_failure_outweighs_passes_and_no_gates_tell_nothing():
    assert verdict.decide([], ["candidate: was killed"])[0] == "cannot_tell"
    assert verdict.decide([], [])[0] == "cannot_tell"


def test_sides_on_different_examples_are_refused():
    with pytest.raises(ReportError, match="200 examples on one side and 199"):
        judge(quality(BASE), quality(BASE[1:]), "rougeL", max_drop=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples_digest": "other"}, "the digest of the examples is 'e' in one, 'other'"),
        ({"environment": {"device": "cuda"}}, "device is 'cpu' in one, 'cuda'"),
        (
            {"settings": {"check": {}, "data": {}, "benchmark": {"new_tokens": 9}, "generation": {}}},
            "benchmark.new_tokens is None in one, 9 in the other",
        ),
    ],
)
def test_reports_that_were_not_measured_alike_are_refused(change, message):
    with pytest.raises(ReportError, match=message):
        verdict.require_comparable(made(), made(**change))


def test_cannot_tell_says_how_much_would_tell():
    ours = [b - 0.9 + 4 * n for b, n in zip(BASE, NOISE, strict=True)]
    gate = judge(quality(BASE), quality(ours), "rougeL", max_drop=1.0)
    assert gate.verdict == "cannot_tell"
    assert gate.sentence.endswith(
        f"; at most 1 points is allowed; at least about {gate.needed:,} examples would tell, there were 200; it is too early to say how many at most"
    )
    assert (gate.needed_at_most, gate.needed > 300) == (None, True)
    ours = [b - 0.3 + 4 * n for b, n in zip(BASE, NOISE, strict=True)]
    gate = judge(quality(BASE), quality(ours), "rougeL", max_drop=1.0)
    assert gate.sentence.endswith(f"; about {gate.needed:,} to {gate.needed_at_most:,} examples would tell, there were 200")
    gate = judge(speed([1.0, 1.0, 1.0]), speed([1.0, 1.1, 1.2]), "latency_p50", max_ratio=1.2)
    assert f"about {gate.needed} to {gate.needed_at_most} rounds would tell, there were 3" in gate.sentence
    same = judge(speed([1.0, 1.0]), speed([0.9, 1 / 0.9]), "latency_p50", max_ratio=1.0)
    assert same.sentence.endswith(f"at least about {same.needed} rounds would tell, there were 2; it is too early to say how many at most")


def test_one_of_many_gates_does_not_fail_by_chance_alone():
    """A ratio that would fail at 2 % by itself, one of 40 that hold."""
    slow = [1.0 + x for x in (0.031, 0.018, 0.042, 0.006, 0.027)]
    points = range(1, 41)
    a = Side(role="baseline", model="a", measurements=[speed([1.0] * 5, batch_size=b) for b in points])
    even = [1.0, 1.01, 0.99, 1.004, 0.996]
    b = Side(role="candidate", model="b", measurements=[speed(slow if b == 7 else even, batch_size=b) for b in points])
    check = {"latency_p50": Gate(max_ratio=1.005)}
    (single,) = every(side("baseline", m=speed([1.0] * 5)), side("candidate", m=speed(slow)), check)
    assert single.verdict == "fail"
    among = every(a, b, check)[6]
    assert (among.interval, among.verdict) == (single.interval, "cannot_tell")
    assert among.sentence.endswith("on its own it would fail, as one of 40 it may be chance")
    worse = Side(role="candidate", model="b", measurements=[speed([3.0, 3.1, 3.0, 3.0, 3.1], batch_size=b) for b in points])
    assert {r.verdict for r in every(a, worse, check)} == {"fail"}


def test_a_confidence_that_a_recipe_asks_for():
    ours = [b - 0.6 + 1.6 * n for b, n in zip(BASE, NOISE, strict=True)]
    a, b = side("baseline", m=quality(BASE)), side("candidate", m=quality(ours))
    by_level = {
        level: verdict.gates({"rougeL": Gate(max_drop=1.0)}, verdict.pairs(a, b, True), a, b, level)[0] for level in (0.5, 0.95, 0.999)
    }
    assert [gate.verdict for gate in by_level.values()] == ["pass", "pass", "cannot_tell"]
    widths = [gate.interval[1] - gate.interval[0] for gate in by_level.values()]
    assert widths == sorted(widths)
    assert "(99.9 % " in by_level[0.999].sentence


def test_what_is_clear_beyond_doubt():
    a, check = side("baseline", m=speed([1.0, 1.0, 1.0])), {"latency_p50": Gate(max_ratio=1.05)}
    assert verdict.is_clear(check, [a, side("candidate", m=speed([0.5, 0.5005, 0.5]))])
    assert verdict.is_clear(check, [a, side("candidate", m=speed([2.0, 2.001, 2.0]))])
    assert not verdict.is_clear(check, [a, side("candidate", m=speed([1.0, 1.03, 0.98]))])
    assert not verdict.is_clear({"rougeL": Gate(max_drop=1)}, [a, side("candidate", m=speed([0.5, 0.5005, 0.5]))]), "nothing on speed"
