"""The report of a run, and reading one."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from compress.errors import ReportError
from compress.metrics import KERNELS, METRICS
from compress.phases import Phase
from compress.recipe import PLAIN, Benchmark, Gate
from compress.results.record import Record, Role
from compress.results.sides import Comparison, GateResult, Measurement, Side, Turn, Verdict
from compress.results.stages import Cut, StageRecord

if TYPE_CHECKING:
    import msgspec

FORMAT = 1
MUCH_CUT = 0.01  # of the prompts
LEAST_EQUAL, MOST_APART = 0.9, 1.02  # an engine against transformers: examples with equal answers; the ratio of perplexities
MUCH_WORKED = 0.9  # of the weights that a stage could have worked on; less is a caution
FIGURES_ONLY = {"samples": "not read"}  # the context for validating a report without samples


class Agreement(Record):
    """Whether an engine and transformers agree on the original's weights.

    equal        examples, of all `examples`, in which both wrote or chose the same
    likelihood   the engine's perplexity over transformers'; None where it isn't measured
    dtype        what transformers computes in, if the engine computes in another; then rounding makes texts differ
    half         whether both compute in 16 bits; then rounding makes texts differ, too
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
        claims = []
        if self.equal is not None:
            where = "transformers" if self.dtype is None else f"transformers in {self.dtype}"
            how = ", both in 16 bits, where roundings part texts," if self.half else ""
            claims.append(f"writes the same as {where} in {self.equal:,} of {self.examples:,} examples{how}")
        if self.likelihood is not None:
            claims.append(f"has a perplexity of x{self.likelihood:.4f} of transformers'")
        return f"With the original's weights {self.engine} {' and '.join(claims).removesuffix(',')}"


class Split(Record):
    """A split of the data as it was read before the first stage.

    name       of its file, or the hub id with the split
    path       of the file; not stored in the report
    filtered   rows that data.where leaves out
    empty      rows without content; `why_empty` is about the first of them
    sha256     of the file, hexadecimal
    changed    whether the file had changed when all was measured
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
    """All of a run, as report.json holds it. The examples are in predictions.parquet, too.

    engine            in which both sides were measured
    original          the unchanged model in plain transformers, if the engine is another
    against_original  the candidate compared with it
    agreement         whether the engine and transformers agree on the original's weights
    others            reports for the recipe's other engines, each with a verdict of its own
    """

    format: int = FORMAT
    recipe: str
    run: str
    created: str
    digest: str
    examples_digest: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    stages: list[StageRecord] = Field([])
    engine: str = PLAIN
    sides: list[Side]
    original: Side | None = None
    against_original: list[Comparison] = Field([])
    agreement: Agreement | None = None
    others: list["Report"] = Field([], repr=False)
    splits: list[Split] = Field([])
    turns: list[Turn] = Field([], repr=False)
    phases: list[Phase] = Field([])
    comparisons: list[Comparison] = Field([])
    gates: list[GateResult] = Field([])
    verdict: Verdict
    decided_by: str
    notes: list[str] = Field([])
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
            raise ValueError(f"its sides are {', '.join(roles) or 'none'}; allowed are a candidate, and a baseline before it")
        for side in self.sides:
            for measurement in side.measurements:
                if measurement.metric not in METRICS:
                    raise ValueError(f"there is no metric {measurement.metric!r}")
                if info.context is FIGURES_ONLY:
                    continue
                widths = {len(row) for row in measurement.present}
                if measurement.missing != (missing := len(measurement.samples) - len(measurement.present)):
                    raise ValueError(f"{measurement.metric}: missing is {measurement.missing}, but {missing} samples are")
                if METRICS[measurement.metric].kind != "size" and measurement.value is not None and (0 in widths or not widths):
                    raise ValueError(f"{measurement.metric} has no samples")
                if METRICS[measurement.metric].kind == "quality" and len(widths) > 1:
                    raise ValueError(f"{measurement.metric} has samples of unequal width")
        for key in ("check", "data", "generation", "benchmark"):
            if not isinstance(self.settings.get(key), dict):
                raise ValueError(f"settings.{key} is missing")
        if not isinstance(level := self.settings["benchmark"].get("confidence", 0.95), float) or not 0 < level < 1:
            raise ValueError(f"settings.benchmark.confidence is {level!r}, no share between 0 and 1")
        for gate in self.settings["check"].values():
            Gate.model_validate(gate)
        named = [self.score, *(gate.metric for gate in self.gates), *(comparison.metric for comparison in self.comparisons)]
        if unknown := [name for name in named if name is not None and name not in METRICS]:
            raise ValueError(f"there is no metric {unknown[0]!r}")
        if any(set(step.shares) - set(KERNELS) for side in self.sides for step in side.steps):
            raise ValueError(f"a step has shares of other kinds than {', '.join(KERNELS)}")
        if not all(record.stage for record in self.stages):
            raise ValueError("a stage without a name")
        return self

    @property
    def cautions(self) -> list[str]:
        """Warnings that go before the verdict: much of the model was left out, or cut prompts made it another task."""
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
        """The name of the GPU, or else of the CPU, that was measured on."""
        return next((str(name) for key in ("gpu", "cpu", "device") if (name := self.environment.get(key))), None)

    @property
    def candidate(self) -> Side:
        return self.sides[-1]

    @property
    def inside(self) -> str:
        """The suffix of a model's name: " in ctranslate2"; empty for transformers."""
        return "" if self.engine == PLAIN else f" in {self.engine}"

    @property
    def parts(self) -> list["Report"]:
        """A report for each engine."""
        return [self.model_copy(update={"others": []}), *(part.model_copy(update={"folder": self.folder}) for part in self.others)]

    @property
    def confidence(self) -> float:
        """The confidence of intervals and gates."""
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
            "missing": {
                side.role: missing for side in self.sides if (missing := {m.label: m.missing for m in side.measurements if m.missing})
            },
        }  # fmt: skip


def read_report(path: str | Path, figures_only: bool = False) -> Report:
    """The report in a folder, or in a report.json.

    figures_only   leave out samples, timings, steps, turns, examples, layers and curves, which takes a tenth of the time

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
    """The parts of a report.json that a table of figures needs. The rest is skipped, though its syntax is still checked.

    Raises ValueError.
    """
    import msgspec

    def rows(samples: Any) -> int:  # a list of lists of numbers
        return bytes(samples).count(b"[") - 1

    try:
        parsed: dict[str, Any] = msgspec.to_builtins(_few().decode(content), enc_hook=rows)
    except msgspec.MsgspecError:  # damaged, or of another shape; reading it all will tell how
        whole: dict[str, Any] = json.loads(content)
        return whole
    for side in parsed.get("sides", []):
        for measurement in side.get("measurements", []):
            measurement.update(rows=measurement.get("samples", 0), samples=[], raw=[])
    return parsed


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
