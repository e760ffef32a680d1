"""Where the time of a decode step goes on either side, and why a candidate may be no faster."""

from typing import Any

from compress.metrics import KERNELS
from compress.report.numbers import scaled
from compress.report.table import table
from compress.results.report import Report
from compress.results.sides import Comparison, Side, Step

TAKES_MORE = 0.1  # of the candidate's step: less is no explanation
MOSTLY = 0.5  # of a step
BOUND = 0.6  # of what the machine multiplies at best; kernels hardly come nearer on what a model multiplies
HEAD = ["point", "side", "step", *KERNELS.values()]
NOTE = (
    "One decode step, of a classifier one forward pass. Its time is that of the timings; the shares are those that torch's "
    "profiler sees apart from these, its own time taken out."
)
DOING = {
    "matrix_products": "matrix products",
    "attention": "attention",
    "unpacking": "unpacking weights",
    "rounding": "rounding inputs to integers",
    "other": "the rest of its kernels (norms, activations, copies)",
    "overhead": "what lies outside kernels",
}


def reasons(sides: list[Side], where: Comparison, environment: dict[str, Any]) -> list[str]:
    """Why the candidate is no faster at a grid point, a sentence a reason: what costs it more, then what smaller weights can't help."""
    if (both := _both(sides, where)) is None:
        return []
    theirs, ours = both
    point = f"at batch {where.batch_size}"
    return [*_costs(theirs, ours, point), *_limits(sides[0], theirs, where, environment, point)]


def costs(sides: list[Side], where: Comparison) -> list[str]:
    """Why the candidate is slower at a grid point, a sentence a reason; none where its steps take no longer."""
    if (both := _both(sides, where)) is None:
        return []
    theirs, ours = both
    slower = (ours.seconds or 0.0) > (theirs.seconds or 0.0)
    return _costs(theirs, ours, f"at batch {where.batch_size}") if slower else []


def section(report: Report) -> str:
    """The shares in Markdown, and what the machine can do at best."""
    body = rows(report)
    return "\n\n".join(["## Where a step's time goes", NOTE, table(HEAD, body), ceilings(report.environment)]) if body else ""


def rows(report: Report) -> list[list[str]]:
    """The shares of a step by kind of kernel, a row a side and grid point, under `HEAD`."""
    profiled = [(_timed(side, step), side.role) for side in report.sides for step in side.steps if step.shares]
    profiled.sort(key=lambda row: (row[0].prompt_tokens, row[0].batch_size, row[1]))
    return [
        [f"batch {s.batch_size}, prompt {s.prompt_tokens}", role, scaled(s.seconds or 0, "s"), *_percentages(s)] for s, role in profiled
    ]


def ceilings(environment: dict[str, Any]) -> str:
    """What utilisation is held against."""
    ending = "_flops_per_second"
    products = [f"{v / 1e9:,.3g} GFLOP/s in {k.removesuffix(ending)}" for k, v in environment.items() if k.endswith(ending)]
    copied = environment.get("copy_bytes_per_second", 0) / 1e9
    return (
        f"This machine at its best, in the same run: copies of {copied:,.3g} GB/s, matrix products of {' and '.join(products)}. Against "
        "these, mbu is what a step must read of weights and cache (an encoder-decoder's: of its decoder), mfu what prefill must multiply."
    )


def _percentages(step: Step) -> list[str]:
    return [f"{step.shares[kind]:.0%}" for kind in KERNELS]


def _both(sides: list[Side], where: Comparison) -> tuple[Step, Step] | None:
    """The baseline's and the candidate's step at a comparison's grid point, where both were profiled."""
    steps = [step for side in sides if (step := _step_at(side, where))]
    return (steps[0], steps[1]) if len(steps) == 2 else None


def _step_at(side: Side, where: Comparison) -> Step | None:
    """The step at a comparison's grid point, where it was profiled."""
    point = (where.batch_size, where.prompt_tokens)
    return next((_timed(side, s) for s in side.steps if (s.batch_size, s.prompt_tokens) == point and s.shares), None)


def _timed(side: Side, step: Step) -> Step:
    """The step with the seconds of the timings, which disturbances move less than those of the one look at it."""
    metric = "latency_p50" if step.prefill_flops is None else "tpot"
    timing = side.figure((metric, step.batch_size, step.prompt_tokens))
    return step if timing is None or timing.value is None else step.model_copy(update={"seconds": timing.value})


def _spent(step: Step, kind: str) -> float:
    """Seconds of a step."""
    return step.shares[kind] * (step.seconds or 0.0)


def _costs(theirs: Step, ours: Step, point: str) -> list[str]:
    """What takes the candidate more time than the baseline, the largest first."""
    more = {kind: _spent(ours, kind) - _spent(theirs, kind) for kind in KERNELS}
    sentences = []
    for kind in sorted(more, key=lambda kind: more[kind], reverse=True):
        if more[kind] < TAKES_MORE * (ours.seconds or 0.0):
            break
        took, before = scaled(_spent(ours, kind), "s"), _spent(theirs, kind)
        against = "which the baseline doesn't do" if before == 0 else f"the baseline {scaled(before, 's')}"
        sentences.append(f"A step {point} spends {took}, {ours.shares[kind]:.0%} of it, on {DOING[kind]}, {against}.")
    return sentences


def _limits(side: Side, theirs: Step, where: Comparison, environment: dict[str, Any], point: str) -> list[str]:
    """Why smaller weights could not have helped the baseline."""
    assert theirs.seconds is not None
    sentences = []
    prefill = side.figure(("mfu", where.batch_size, where.prompt_tokens))
    first, whole = (side.figure((metric, where.batch_size, where.prompt_tokens)) for metric in ("ttft", "latency_p50"))
    if prefill and prefill.value and first and first.value and whole and whole.value:
        part = first.value / whole.value
        if part >= MOSTLY and prefill.value >= BOUND:
            sentences.append(
                f"{part:.0%} of the baseline's latency {point} is prefill, which is bound by arithmetic (MFU {prefill.value:.2f}): smaller "
                "weights don't help there."
            )
    rate = environment.get(f"{side.dtype}_flops_per_second")
    utilised = theirs.flops / theirs.seconds / rate if rate else 0.0
    if utilised >= BOUND:
        sentences.append(f"The baseline's step {point} is bound by arithmetic (MFU {utilised:.2f}): smaller weights don't help there.")
    if (bandwidth := environment.get("copy_bytes_per_second")) and theirs.shares["overhead"] >= MOSTLY:
        reading = theirs.weight_bytes / bandwidth / theirs.seconds
        if reading < MOSTLY:
            sentences.append(
                f"Of the baseline's step {point}, {theirs.shares['overhead']:.0%} lies outside kernels and reading the weights takes about "
                f"{reading:.0%}: smaller weights can hardly show."
            )
    if theirs.cache_bytes > theirs.weight_bytes:
        times = theirs.cache_bytes / max(1, theirs.weight_bytes)
        sentences.append(f"The cache that a step {point} reads is {times:.1f} times the baseline's weights.")
    return sentences
