"""What a run leaves behind: measurements, the report, the artifact's record; all written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from compress.errors import NoSpace, ReportError
from compress.metrics import KERNELS, METRICS, Better, Missing
from compress.phases import Phase
from compress.process import is_disk_full
from compress.recipe import PLAIN, Benchmark, Gate

if TYPE_CHECKING:
    import msgspec

FORMAT = 1
MUCH_CUT = 0.01  # of the prompts
LEAST_EQUAL, MOST_APART = 0.9, 1.02  # of examples that an engine answers as transformers does; of perplexities with the same weights
MUCH_WORKED = 0.9  # of the weights that a stage could have worked on; less is said before all else
NOTES = "compress_notes.json"  # in an artifact: what a stage did to each layer and what it has to say
Verdict = Literal["pass", "fail", "cannot_tell"]
Role = Literal["baseline", "candidate", "original"]  # of a report's sides the first two
FIGURES_ONLY = {"samples": "not read"}  # the context in which a report is validated without them


class Record(BaseModel):
    """A block of a report."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Measurement(Record):
    """One figure of one side.

    value    in the metric's unit; None where it could not be had, `reason` then says why
    samples  what it was made from, in the same order on both sides: a row of sufficient statistics an example (quality), or a row
             a round with a number a turn (speed) or one number (memory); empty for exact figures. An example that has none has the
             reason in its place, and the value is of the others
    missing  how many have a reason in their place
    raw      every single timing in seconds, a row a round (speed only)
    rows     how many samples there are, where they were not read; those that are missing don't count
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
        """What identifies the figure on either side."""
        return self.metric, self.batch_size, self.prompt_tokens

    @property
    def present(self) -> list[list[float]]:
        """The samples that are there."""
        return [row for row in self.samples if isinstance(row, list)]

    @property
    def label(self) -> str:
        """latency_p50 [batch 8, prompt 128]"""
        return self.metric if self.batch_size is None else f"{self.metric} [batch {self.batch_size}, prompt {self.prompt_tokens}]"


class Comparison(Record):
    """One figure of the candidate against the baseline's, with an interval where there are samples.

    estimate, low, high    candidate - baseline for quality, candidate / baseline for all else
    left_out               examples that it doesn't rest on, since a side has no samples of them
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
    """One limit, held against the figures. `interval` is of `estimate`, which is what `limit` bounds.

    left_out         examples that it doesn't rest on, since a side has no samples of them
    needed           about how many examples or rounds would tell at the least, where these can't
    needed_at_most   and at the most, with a chance of 80 %; None where it is too early to say
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
    """One decode step at a grid point, looked at apart from the timed turns; of a classifier one forward pass.

    weight_bytes   of the layers that it calls, as they lie in memory
    cache_bytes    keys and values that it reads, half way through the generation
    flops          two for each weight and token that meet in it
    prefill_flops  the same of what comes before the first token; None for a classifier
    seconds        it took, without a profiler; None, and no shares, where a generation is too short for a profile
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
    """One of the two models: where it lies, what it measured, what it could not, what there is to say of its outputs.

    dtype   what it computes in, as torch calls it
    """

    role: Role
    model: str
    dtype: str | None = None
    measurements: list[Measurement] = []
    steps: list[Step] = []
    failures: list[str] = []
    said: list[str] = []

    def figure(self, point: tuple[str, int | None, int | None]) -> Measurement | None:
        return next((m for m in self.measurements if m.point == point), None)

    def values(self) -> dict[str, float | None]:
        """metric -> value; grid figures under their label."""
        return {m.label: m.value for m in self.measurements}


class Conditions(Record):
    """How the machine was while one side had a turn.

    load        tasks that ran or waited, the mean of a minute
    waiting     the share of the time that the process's threads were ready to run and did not; None where the kernel doesn't say
    steal       the share of its cores' time that the hypervisor gave to others
    others      how many cores other processes used
    clock_step  seconds by which the wall clock was set meanwhile; timings don't use it
    disturbed   what makes the turn one that should be taken again
    """

    seconds: float
    load: float
    waiting: float | None
    steal: float
    others: float
    clock_step: float
    sm_clock_mhz: int | None = None
    disturbed: list[str] = []


class Turn(Conditions):
    """One turn of one side, from 0 on by round and turn. `kept` says whether its timings count: of a disturbed one they do not, where
    there was time to take it again."""

    role: Role
    round: int
    turn: int
    kept: bool


class Layer(Record):
    """What a stage did to one layer.

    bits    a weight's; None where the layer stays in full precision, `remark` then says why
    error   the share (from 0) of the layer's output, mean square over the calibration tokens, that this changes; None where not measured
    sparsity  the share of its weights that are zero; None where that was not the aim
    """

    name: str
    bits: int | None = None
    error: float | None = None
    sparsity: float | None = None
    remark: str | None = None


class Point(Record):
    """Training after so many steps; a figure is None where it was not taken there.

    tokens         read by then, padding left out
    loss           the method's own, nats a position for cross-entropy; the mean since the point before
    learning_rate, grad_norm
    validation     what early stopping looks at: loss, or ROUGE-L in points
    """

    step: int
    tokens: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    validation: float | None = None


class Cut(Record):
    """How many prompts were longer than they may be.

    where   evaluation, or the stage's name
    limit   in tokens
    key     what sets it in the recipe; None where it is the model's own context
    """

    where: str
    cut: int
    all: int
    limit: int
    key: str | None

    @property
    def share(self) -> float:
        return self.cut / self.all if self.all else 0.0

    @property
    def sentence(self) -> str:
        more = f", more of which {self.key} lets in" if self.key else ", which is the model's context"
        return f"{self.cut:,} of the {self.all:,} prompts of {self.where} ({self.share:.1%}) were cut to {self.limit:,} tokens{more}"


class Account(Record):
    """What became of a model's parameters in a stage, each counted once.

    worked      in layers that the stage worked on; of one that trains or takes parts away, all that isn't in the result as it was
    heads       what maps the last hidden state to tokens or labels, left alone
    routers     what leads tokens to the experts of a mixture, left alone
    vectors     of one dimension: norms and biases
    asked       left alone as the recipe says
    left_out    matrices left alone for another reason, which the layers' remarks give
    """

    worked: int = 0
    heads: int = 0
    embeddings: int = 0
    routers: int = 0
    vectors: int = 0
    asked: int = 0
    left_out: int = 0

    @property
    def share(self) -> float:
        """What was worked on, of what was to be; 1 where there was nothing."""
        return self.worked / (self.worked + self.left_out) if self.worked + self.left_out else 1.0

    @property
    def sentence(self) -> str:
        """78.9% of 134,515,008 parameters were worked on; 21.0% are embeddings, 0.1% are norms and biases"""
        total = sum(getattr(self, name) for name in Account.model_fields)
        words = {
            "embeddings": "embeddings",
            "heads": "heads",
            "routers": "routers",
            "vectors": "norms and biases",
            "asked": "left out as asked",
            "left_out": "left out",
        }
        others = [f"{getattr(self, name) / total:.1%} are {word}" for name, word in words.items() if getattr(self, name)]
        return f"{self.worked / total:.1%} of {total:,} parameters were worked on; " + ", ".join(others)


class StageRecord(Record):
    """What one stage did: the claims in it are read from the saved artifact."""

    stage: dict[str, Any]
    artifact: str
    seconds: float
    reused: bool
    layers: list[Layer] = Field([], repr=False)
    account: Account | None = None
    said: list[str] = []
    curve: list[Point] = Field([], repr=False)
    cut: Cut | None = None

    @property
    def sentences(self) -> list[str]:
        """The account, where one was taken, and what the stage has to say besides."""
        return [*([self.account.sentence] if self.account else []), *self.said]

    @property
    def name(self) -> str:
        """quantize: gptq"""
        return ": ".join(map(str, next(iter(self.stage.items()))))


class Agreement(Record):
    """Whether an engine says of the original's weights what transformers says.

    equal        of so many `examples` the same was written or chosen
    likelihood   the engine's perplexity over transformers'; None where it isn't measured
    dtype        what transformers computes in, where the engine computes in another; then texts part by rounding
    half         whether both compute in 16 bits, in which they part by rounding, too
    """

    engine: str
    dtype: str | None = None
    half: bool = False
    examples: int
    equal: int | None = None
    likelihood: float | None = None

    @property
    def is_doubtful(self) -> bool:
        """Whether rounding alone doesn't explain what differs."""
        exact = self.dtype is None and not self.half
        few = self.equal is not None and exact and self.equal < LEAST_EQUAL * self.examples
        return few or (self.likelihood is not None and not 1 / MOST_APART <= self.likelihood <= MOST_APART)

    @property
    def sentence(self) -> str:
        said = []
        if self.equal is not None:
            where = "transformers" if self.dtype is None else f"transformers in {self.dtype}"
            how = ", both in 16 bits, where roundings part texts," if self.half else ""
            said.append(f"writes the same as {where} in {self.equal:,} of {self.examples:,} examples{how}")
        if self.likelihood is not None:
            said.append(f"has a perplexity of x{self.likelihood:.4f} of transformers'")
        return f"With the original's weights {self.engine} {' and '.join(said).removesuffix(',')}"


class Split(Record):
    """A split of the data as it was read before the first stage.

    name       its file's, or the hub id with the split
    path       of the file, which is no part of the report
    filtered   rows that data.where leaves out
    empty      rows in which nothing stands; `why_empty` is of the first of them
    sha256     of the file, hexadecimal
    changed    whether the file was another one once all had been measured
    """

    name: str
    path: Path | None = Field(None, exclude=True)
    rows: int
    filtered: int = 0
    empty: int = 0
    why_empty: str | None = None
    sha256: str | None = None
    changed: bool = False


class Prediction(Record):
    """One evaluation example with both outputs. Scores are the headline metric's (rougeL, perplexity ...), None if it has none."""

    id: str
    prompt: str
    references: list[str]
    baseline: str | None = None
    candidate: str | None = None
    baseline_score: float | None = None
    candidate_score: float | None = None


class Report(Record):
    """All of a run, as report.json holds it; the examples stand in predictions.parquet too.

    engine            in which both sides were measured
    original          the model as it came, in plain transformers, where the engine is another
    against_original  how the candidate compares with it
    agreement         whether the engine says the same of the original's weights
    others            the same in the recipe's other engines, each with a verdict of its own
    """

    format: int = FORMAT
    recipe: str
    run: str
    created: str
    digest: str
    examples_digest: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    stages: list[StageRecord] = []
    engine: str = PLAIN
    sides: list[Side]
    original: Side | None = None
    against_original: list[Comparison] = []
    agreement: Agreement | None = None
    others: list["Report"] = Field([], repr=False)
    splits: list[Split] = []
    turns: list[Turn] = Field([], repr=False)
    phases: list[Phase] = []
    comparisons: list[Comparison] = []
    gates: list[GateResult] = []
    verdict: Verdict
    decided_by: str
    notes: list[str] = []
    cut: Cut | None = None
    score: str | None = None
    predictions: list[Prediction] = Field([], repr=False)
    folder: Path = Field(Path(), exclude=True)

    @property
    def line(self) -> str:
        """The stages in short: quantize: int8_dynamic."""
        return ", ".join(record.name for record in self.stages)

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> "Report":
        roles = [side.role for side in self.sides]
        if roles not in (["candidate"], ["baseline", "candidate"]):
            raise ValueError(f"a candidate is wanted, with or without a baseline before it; it has {', '.join(roles) or 'nothing'}")
        for side in self.sides:
            for one in side.measurements:
                if one.metric not in METRICS:
                    raise ValueError(f"there is no metric {one.metric!r}")
                if info.context is FIGURES_ONLY:
                    continue
                widths = {len(row) for row in one.present}
                if one.missing != len(one.samples) - len(one.present):
                    raise ValueError(
                        f"{one.metric} misses {one.missing} samples, {len(one.samples) - len(one.present)} of them are missing"
                    )
                if METRICS[one.metric].kind != "size" and one.value is not None and (0 in widths or not widths):
                    raise ValueError(f"{one.metric} has no samples")
                if METRICS[one.metric].kind == "quality" and len(widths) > 1:
                    raise ValueError(f"{one.metric} has samples of unequal width")
        for key in ("check", "data", "generation", "benchmark"):
            if not isinstance(self.settings.get(key), dict):
                raise ValueError(f"settings.{key} is missing")
        if not isinstance(level := self.settings["benchmark"].get("confidence", 0.95), float) or not 0 < level < 1:
            raise ValueError(f"settings.benchmark.confidence is {level!r}, no share between 0 and 1")
        for gate in self.settings["check"].values():
            Gate.model_validate(gate)
        named = [self.score, *(gate.metric for gate in self.gates), *(one.metric for one in self.comparisons)]
        if unknown := [name for name in named if name is not None and name not in METRICS]:
            raise ValueError(f"there is no metric {unknown[0]!r}")
        if any(set(step.shares) - set(KERNELS) for side in self.sides for step in side.steps):
            raise ValueError(f"a step has shares of other kinds than {', '.join(KERNELS)}")
        if not all(record.stage for record in self.stages):
            raise ValueError("a stage without a name")
        return self

    @property
    def cautions(self) -> list[str]:
        """What is to be known before the verdict is: much of the model was left as it was, or prompts were cut to another task."""
        little = [
            f"{record.name} worked on {record.account.share:.1%} of the weights that are no embeddings, heads, norms or biases"
            for record in self.stages
            if record.account is not None and record.account.share < MUCH_WORKED
        ]
        if self.agreement is not None and self.agreement.is_doubtful:
            little.append(f"{self.agreement.sentence}, which rounding doesn't explain: its figures are of another model")
        cuts = [self.cut, *(record.cut for record in self.stages)]
        return [*little, *(cut.sentence for cut in cuts if cut is not None and cut.share > MUCH_CUT)]

    @property
    def machine(self) -> str | None:
        """What measured: the GPU, or else the CPU by name."""
        return next((str(name) for key in ("gpu", "cpu", "device") if (name := self.environment.get(key))), None)

    @property
    def candidate(self) -> Side:
        return self.sides[-1]

    @property
    def inside(self) -> str:
        """What stands behind a model's name: " in ctranslate2"; nothing where it is transformers."""
        return "" if self.engine == PLAIN else f" in {self.engine}"

    @property
    def parts(self) -> list["Report"]:
        """A report for each engine."""
        return [self.model_copy(update={"others": []}), *(one.model_copy(update={"folder": self.folder}) for one in self.others)]

    @property
    def confidence(self) -> float:
        """Of intervals and gates."""
        return float(self.settings["benchmark"].get("confidence", Benchmark.model_fields["confidence"].default))

    def side(self, role: Role) -> Side | None:
        return next((side for side in self.sides if side.role == role), None)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        sides = {role: side.values() if (side := self.side(role)) else {} for role in ("baseline", "candidate")}
        gates = [gate.model_dump(mode="json") for gate in self.gates]
        return {
            "report": str(self.folder), "verdict": self.verdict, "decided_by": self.decided_by, "gates": gates, **sides,
            "artifact": self.stages[-1].artifact if self.stages else None,
            "failures": [failure for side in self.sides for failure in side.failures], "notes": self.notes,
            "engine": self.engine,
            **({"original": self.original.values()} if self.original else {}),
            **({"others": [part.as_json() for part in self.others]} if self.others else {}),
            "missing": {side.role: found for side in self.sides if (found := {m.label: m.missing for m in side.measurements if m.missing})},
        }  # fmt: skip


def read_report(path: str | Path, figures_only: bool = False) -> Report:
    """The report in a folder, or in a report.json.

    figures_only   leave out samples, timings, steps, turns, examples, layers and curves: a tenth of the time, for tables of many

    Raises ReportError when it is missing, damaged or of another format.
    """
    file = Path(path)
    try:
        file = file / "report.json" if file.is_dir() else file
        content = file.read_bytes()
        data = _figures(content) if figures_only else json.loads(content)
        if not isinstance(data, dict) or "format" not in data:
            raise ReportError(f"{file}: not a report of this program")
        if data["format"] is not FORMAT:
            raise ReportError(f"{file}: report format {data['format']!r}; this version reads format {FORMAT}")
        return Report.model_validate({**data, "folder": file.parent}, context=FIGURES_ONLY if figures_only else None)
    except FileNotFoundError:
        raise ReportError(f"{file}: there is no report here") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ReportError(f"{file}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:500]) from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file}: damaged, not JSON: {error}") from None
    except OSError as error:
        raise ReportError(f"{file}: can't be read: {error.strerror}") from None


def _figures(content: bytes) -> dict[str, Any]:
    """The parts of a report.json that a table of figures needs. The rest is passed over, though its syntax is still checked.

    Raises ValueError.
    """
    import msgspec

    def rows(samples: Any) -> int:  # a list of lists of numbers
        return bytes(samples).count(b"[") - 1

    try:
        found: dict[str, Any] = msgspec.to_builtins(_few().decode(content), enc_hook=rows)
    except msgspec.MsgspecError:  # damaged, or of another shape; what reads it all will say how
        whole: dict[str, Any] = json.loads(content)
        return whole
    for side in found.get("sides", []):
        for measurement in side.get("measurements", []):
            measurement.update(rows=measurement.get("samples", 0), samples=[], raw=[])
    return found


@cache
def _few() -> "msgspec.json.Decoder[Any]":
    import msgspec

    def without(model: type[Record], *left_out: str, **nested: Any) -> Any:
        kept = [(name, nested.get(name, Any), msgspec.UNSET) for name in model.model_fields if name not in left_out]
        return msgspec.defstruct(model.__name__, kept)

    measurement = without(Measurement, "raw", "rows", samples=msgspec.Raw)
    side = without(Side, "steps", measurements=list[measurement])  # type: ignore[valid-type]
    stage = without(StageRecord, "layers", "curve")
    nested = {"sides": list[side], "stages": list[stage]}  # type: ignore[valid-type]
    return msgspec.json.Decoder(without(Report, "turns", "predictions", "folder", **nested))


def write_whole(file: Path, text: str) -> None:
    """Put a text into a file at once, or not at all; a device or a pipe is written to as it is.

    Raises NoSpace when the disk fills, OSError where it can't be written to.
    """
    plain = file.is_file() or not file.exists()
    fresh = file.with_name(f".{file.name}.{os.getpid()}.partial") if plain else file
    try:
        fresh.write_text(text, encoding="utf-8")
        if plain:
            fresh.replace(file)
    except OSError as error:
        if plain:
            fresh.unlink(missing_ok=True)
        if is_disk_full(error):
            raise NoSpace(f"the disk filled while {file} was written; free some space and run again") from None
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `target` when the block ends well and vanishes when it doesn't.

    Raises NoSpace when the disk fills.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    partial.chmod(0o755)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(partial)  # another run made the same meanwhile: same digest, same content
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise NoSpace(f"the disk filled while {target} was written; nothing of it is left, free some space and run again") from None
        raise
