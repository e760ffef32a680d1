"""Why a candidate is no faster: each rule on figures made by hand, to the word."""

import pytest

from compress.metrics import KERNELS
from compress.report import markdown, why
from compress.results.sides import Comparison, GateResult, Measurement, Side, Step
from compress.results.stages import StageRecord
from tests.report.test_files import made

STAGES = [StageRecord(stage={"quantize": "bnb_nf4"}, artifact="a", seconds=1, reused=False)]
MACHINE = {"copy_bytes_per_second": 10e9, "float32_flops_per_second": 50e9}
FIRST = "Slower than the baseline at batch 1 x prompt 64: x2.000 (1.900 to 2.100)."


def step(seconds, weight_bytes=10_000_000, cache_bytes=1000, flops=1000, batch_size=1, **shares):
    """What isn't given of the shares are matrix products."""
    whole = {**dict.fromkeys(KERNELS, 0.0), "matrix_products": 1 - sum(shares.values()), **shares}
    return Step(
        batch_size=batch_size, prompt_tokens=64, weight_bytes=weight_bytes, cache_bytes=cache_bytes, flops=flops, prefill_flops=1,
        seconds=seconds, shares=whole,
    )  # fmt: skip


def figure(metric, value):
    return Measurement(metric=metric, value=value, batch_size=1, prompt_tokens=64, samples=[[value]])


def side(role, *steps, **figures):
    measurements = [figure(metric, value) for metric, value in figures.items()]
    return Side(role=role, model="m", dtype="float32", measurements=measurements, steps=list(steps))


def compared(metric, estimate, low, high, batch_size=1):
    point = {} if metric == "weight_bytes" else {"batch_size": batch_size, "prompt_tokens": 64}
    return Comparison(metric=metric, baseline=1.0, candidate=estimate, kind="ratio", estimate=estimate, low=low, high=high, **point)


SLOWER = compared("latency_p50", 2.0, 1.9, 2.1)
SHRUNK = compared("weight_bytes", 0.3, 0.3, 0.3)


def notes_on(theirs, ours, *comparisons, environment=MACHINE, gates=()):
    return why.notes(STAGES, list(comparisons) or [SLOWER], environment, [theirs, ours], gates)


def test_unpacking_is_named_with_its_share():
    (note,) = notes_on(side("baseline", step(0.005)), side("candidate", step(0.016, unpacking=0.61)))
    assert note == f"{FIRST} A step at batch 1 spends 9.8 ms, 61% of it, on unpacking weights, which the baseline doesn't do."


def test_the_two_largest_costs_are_named_the_largest_first():
    ours = step(0.02, rounding=0.3, unpacking=0.12, overhead=0.15)
    (note,) = notes_on(side("baseline", step(0.005)), side("candidate", ours))
    assert note == (
        f"{FIRST} A step at batch 1 spends 6.0 ms, 30% of it, on rounding inputs to integers, which the baseline doesn't do. "
        "A step at batch 1 spends 8.6 ms, 43% of it, on matrix products, the baseline 5.0 ms."
    )


def test_a_step_takes_what_the_timings_say():
    """Not the 16 ms of the one look."""
    (note,) = notes_on(side("baseline", step(0.005)), side("candidate", step(0.016, unpacking=0.5), tpot=0.020))
    assert "A step at batch 1 spends 10.0 ms, 50% of it, on unpacking weights" in note


def test_a_difference_of_less_than_a_tenth_of_a_step_is_no_reason():
    (note,) = notes_on(side("baseline", step(0.0100)), side("candidate", step(0.0105)))
    assert note.startswith(f"{FIRST} quantize: bnb_nf4: the weights are unpacked"), "then the method says what it does"


def test_what_hides_a_gain_is_no_reason_to_be_slower():
    """Nor is a profile of steps that take no longer."""
    (hidden,) = notes_on(side("baseline", step(0.0125, overhead=0.7)), side("candidate", step(0.013, overhead=0.7)))
    (prefill,) = notes_on(side("baseline", step(0.010)), side("candidate", step(0.009, unpacking=0.5)))
    assert hidden == prefill and hidden.startswith(f"{FIRST} quantize: bnb_nf4: the weights are unpacked at every step")


def test_where_a_gate_can_not_tell_no_note_says_slower():
    def gate(verdict, batch_size):
        return GateResult(
            metric="latency_p50", batch_size=batch_size, prompt_tokens=64, limit_kind="max_ratio", limit=1.0, estimate=1.03,
            interval=(1.01, 1.05), verdict=verdict, sentence="on its own it would fail, as one of 6 it may be chance",
        )  # fmt: skip

    little, much = compared("latency_p50", 1.03, 1.01, 1.05), compared("latency_p50", 2.0, 1.9, 2.1, batch_size=8)
    both = [side("baseline", step(0.01)), side("candidate", step(0.02, unpacking=0.5))]
    unsure = "Not shown to be slower than the baseline at batch 1 x prompt 64: x1.030 (1.010 to 1.050): the gate there can't tell yet."
    assert notes_on(*both, little, gates=[gate("cannot_tell", 1)]) == [unsure]
    slower, other = notes_on(*both, little, much, gates=[gate("cannot_tell", 1), gate("fail", 8)])
    assert slower.startswith("Slower than the baseline at batch 8 x prompt 64: x2.000 (1.900 to 2.100).") and other == unsure


def test_overhead_hides_smaller_weights():
    """10 MB at 10 GB/s are 1 ms of 12.5."""
    both = step(0.0125, overhead=0.7)
    sentences = notes_on(side("baseline", both), side("candidate", both), compared("latency_p50", 1.0, 0.9, 1.1), SHRUNK)
    assert sentences == [
        "Not shown to be faster than the baseline at batch 1 x prompt 64: x1.000 (0.900 to 1.100). Of the baseline's step at batch 1, 70% lies "
        "outside kernels and reading the weights takes about 8%: smaller weights can hardly show."
    ]


def test_a_step_bound_by_arithmetic_is_named():
    """355 MFLOP in 10 ms are 35.5 GFLOP/s of 50."""
    both = step(0.010, flops=355_000_000)
    (note,) = notes_on(side("baseline", both), side("candidate", both), compared("latency_p50", 1.0, 0.9, 1.1), SHRUNK)
    assert note.endswith("The baseline's step at batch 1 is bound by arithmetic (MFU 0.71): smaller weights don't help there.")
    assert notes_on(side("baseline", both), side("candidate", both), compared("latency_p50", 1.0, 0.9, 1.1), SHRUNK, environment={}) == []


def test_a_latency_of_mostly_prefill_is_named():
    theirs = side("baseline", step(0.010), mfu=0.65, ttft=0.8, latency_p50=1.0)
    ours = side("candidate", step(0.010))
    (note,) = notes_on(theirs, ours, compared("latency_p50", 1.0, 0.9, 1.1), SHRUNK)
    assert note.endswith(
        "80% of the baseline's latency at batch 1 is prefill, which is bound by arithmetic (MFU 0.65): smaller weights don't help there."
    )


def test_a_cache_larger_than_the_weights_is_named():
    both = step(0.010, cache_bytes=30_000_000)
    (note,) = notes_on(side("baseline", both), side("candidate", both), compared("latency_p50", 1.0, 0.9, 1.1), SHRUNK)
    assert note.endswith("The cache that a step at batch 1 reads is 3.0 times the baseline's weights.")


def test_the_worst_point_is_explained():
    worse = compared("latency_p50", 3.0, 2.9, 3.1, batch_size=8)
    theirs = side("baseline", step(0.01), step(0.01, batch_size=8))
    ours = side("candidate", step(0.02, unpacking=0.5), step(0.03, rounding=0.6, batch_size=8))
    (note,) = notes_on(theirs, ours, SLOWER, worse)
    assert "batch 1 x prompt 64: x2.000" in note and "batch 8 x prompt 64: x3.000" in note
    assert "A step at batch 8 spends 18.0 ms, 60% of it, on rounding" in note and "unpacking" not in note


def test_nothing_is_said_of_a_candidate_that_is_faster_or_did_not_shrink():
    both = [side("baseline", step(0.0125, overhead=0.7)), side("candidate", step(0.0125, overhead=0.7))]
    assert notes_on(*both, compared("latency_p50", 0.5, 0.4, 0.6), SHRUNK) == []
    assert notes_on(*both, compared("latency_p50", 1.0, 0.9, 1.1)) == []


@pytest.mark.parametrize("steps", [[], [step(0.02, batch_size=8)]])
def test_without_a_profile_there_the_method_speaks(steps):
    (note,) = notes_on(side("baseline", step(0.01)), side("candidate", *steps))
    assert note.startswith(f"{FIRST} quantize: bnb_nf4:")


def test_the_table_has_a_row_a_side_and_point():
    ours = side("candidate", step(0.016, unpacking=0.61), step(0.02, batch_size=8))
    text = markdown.whole(made(sides=[side("baseline", step(0.005)), ours], environment={"device": "cpu", **MACHINE}, score=None))
    section = text.split("## Where a step's time goes\n\n")[1].split("\n## ")[0]
    assert (
        "| point | side | step | matrix products | attention | unpacking weights | rounding inputs | the rest | outside kernels |"
        in section
    )
    assert "| batch 1, prompt 64 | baseline | 5.0 ms | 100% | 0% | 0% | 0% | 0% | 0% |" in section
    assert "| batch 1, prompt 64 | candidate | 16.0 ms | 39% | 0% | 61% | 0% | 0% | 0% |" in section
    assert "copies of 10 GB/s, matrix products of 50 GFLOP/s in float32." in section
    assert "## Where" not in markdown.whole(made())
