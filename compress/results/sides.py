"""The figures of a model, their comparison with another model's, and the outcomes of gates."""

from typing import Literal

from pydantic import Field

from compress.metrics import METRICS, Better, Missing
from compress.results.record import Record, Role

Verdict = Literal["pass", "fail", "cannot_tell"]


class Measurement(Record):
    """One figure of one side.

    value    in the metric's unit; None where there is none, and `reason` then says why
    samples  what it was computed from, in the same order on both sides; empty for exact figures. Quality has a row of sufficient statistics
             an example. Speed has a row a round with a number a turn, memory a row a round with one number. An example without statistics
             has the reason in their place, and the value is of the others.
    missing  how many samples have a reason in their place
    raw      every single timing in seconds, a row a round (speed only)
    rows     how many samples there are, where they were not read; missing ones don't count
    """

    metric: str
    value: float | None
    batch_size: int | None = None
    prompt_tokens: int | None = None
    samples: list[list[float] | Missing] = Field([], repr=False)
    missing: int = Field(0, ge=0)
    raw: list[list[float]] = Field([], repr=False)
    reason: str | None = None
    rows: int | None = Field(None, exclude=True, ge=0)

    @property
    def unit(self) -> str:
        return METRICS[self.metric].unit

    @property
    def better(self) -> Better:
        return METRICS[self.metric].better

    @property
    def point(self) -> tuple[str, int | None, int | None]:
        """The key of the figure, the same on both sides."""
        return self.metric, self.batch_size, self.prompt_tokens

    @property
    def present(self) -> list[list[float]]:
        """The samples without those that are missing."""
        return [row for row in self.samples if isinstance(row, list)]

    @property
    def label(self) -> str:
        """latency_p50 [batch 8, prompt 128]"""
        return self.metric if self.batch_size is None else f"{self.metric} [batch {self.batch_size}, prompt {self.prompt_tokens}]"


class Comparison(Record):
    """One figure of the candidate against the baseline's, with an interval where there are samples.

    estimate, low, high    candidate - baseline for quality, candidate / baseline for all else
    left_out               examples that are left out, since a side has no samples of them
    """

    metric: str
    batch_size: int | None = None
    prompt_tokens: int | None = None
    baseline: float
    candidate: float
    kind: Literal["difference", "ratio"]
    estimate: float | None
    low: float | None
    high: float | None
    left_out: int = 0

    @property
    def point(self) -> tuple[str, int | None, int | None]:
        return self.metric, self.batch_size, self.prompt_tokens


class GateResult(Record):
    """One limit, checked against the figures. `interval` is that of `estimate`, which `limit` bounds.

    left_out         examples that are left out, since a side has no samples of them
    needed           where these can't decide: about how many examples or rounds would at the least
    needed_at_most   about how many would with a chance of 80 %; None where it is too early to say
    """

    metric: str
    limit_kind: str
    limit: float
    estimate: float | None
    interval: tuple[float, float] | None
    needed: int | None = None
    needed_at_most: int | None = None
    left_out: int = 0
    verdict: Verdict
    sentence: str
    batch_size: int | None = None
    prompt_tokens: int | None = None

    @property
    def label(self) -> str:
        """latency_p50 [batch 8, prompt 128]: max_ratio 1.05"""
        figure = Measurement(metric=self.metric, value=None, batch_size=self.batch_size, prompt_tokens=self.prompt_tokens)
        return f"{figure.label}: {self.limit_kind} {self.limit:g}"


class Step(Record):
    """One decode step at a grid point, inspected outside the timed turns; of a classifier one forward pass.

    weight_bytes   of the layers that it calls, as they lie in memory
    cache_bytes    keys and values that it reads, half way through the generation
    flops          two for each weight and token that meet in it
    prefill_flops  the same for the work before the first token; None for a classifier
    seconds        of the step without a profiler; None, and no shares, where a generation is too short to profile
    shares         kind of kernel (metrics.KERNELS) -> share of the step; they sum to 1
    """

    batch_size: int
    prompt_tokens: int
    weight_bytes: int
    cache_bytes: int
    flops: int
    prefill_flops: int | None
    seconds: float | None
    shares: dict[str, float]


class Side(Record):
    """One of the two models: where it is, its figures, its failures, and remarks (`said`) on its outputs.

    dtype   what it computes in, by torch's name
    """

    role: Role
    model: str
    dtype: str | None = None
    measurements: list[Measurement] = Field([])
    steps: list[Step] = Field([])
    failures: list[str] = Field([])
    said: list[str] = Field([])

    def figure(self, point: tuple[str, int | None, int | None]) -> Measurement | None:
        return next((m for m in self.measurements if m.point == point), None)

    def values(self) -> dict[str, float | None]:
        """metric -> value; grid figures under their label."""
        return {m.label: m.value for m in self.measurements}


class Conditions(Record):
    """The conditions on the machine during one side's turn.

    load        tasks that ran or waited, on average over a minute
    waiting     the share of the time that the process's threads were ready to run and did not; None where the kernel doesn't say
    steal       the share of its cores' time that the hypervisor gave to others
    others      how many cores other processes used
    clock_step  seconds by which the wall clock was adjusted meanwhile; timings don't use it
    disturbed   the disturbances for which the turn should be taken again
    """

    seconds: float
    load: float
    waiting: float | None
    steal: float
    others: float
    clock_step: float
    sm_clock_mhz: int | None = None
    disturbed: list[str] = Field([])


class Turn(Conditions):
    """One turn of one side; round and turn count from 0.

    kept   whether its timings count: those of a disturbed turn don't if there was time to take it again
    """

    role: Role
    round: int
    turn: int
    kept: bool
