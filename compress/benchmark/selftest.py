"""The harness tested on itself: a model against itself, faults of known size, intervals against simulated truths.

    python -m compress.benchmark.selftest [--out reports/selftest] [--comparisons 40]

Each comparison is a benchmark of the package's own model, in processes that take turns: the model as baseline and three candidates. These
are the same model, the same with every step 5 % slower, and the same 10 % slower with 8 MB more in memory. No gate has a margin, so the
smallest regression counts. In every second comparison another process keeps one core busy. Predictions are made once and then damaged.

Each part is written when it ends, and a part that is there is not measured again. So a selftest that was stopped goes on.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress import data, recipe, terminal
from compress.benchmark import figures, isolate, statistics
from compress.benchmark.messages import Load, Outputs
from compress.benchmark.planted import Plant
from compress.benchmark.subject import Subject, T
from compress.border import Request
from compress.errors import RunError
from compress.execution import Execution
from compress.methods import Example
from compress.model.source import BUILTIN, Source
from compress.nursery import nursery
from compress.process import Progress
from compress.recipe import Gate, Recipe
from compress.report import verdict
from compress.report.table import table
from compress.results.sides import Side

RECIPE = "quickstart-int8"
BENCHMARK = {
    "batch_sizes": [1], "prompt_tokens": [64], "new_tokens": 24, "rounds": 5, "turns": 9, "iterations": 1, "warmup": 1, "threads": 1,
    "precision": 0.02, "max_minutes": 6,
}  # fmt: skip
SUBJECTS: dict[str, dict[str, float]] = {
    "the same": {},
    "5 % slower": {"slowdown": 0.05},
    "10 % slower and 8 MB more": {"slowdown": 0.10, "resident_bytes": 8_000_000},
}
SPEED, MEMORY = {"latency_p50": Gate(max_ratio=1.0), "tokens_per_second": Gate(min_ratio=1.0)}, {"peak_run_bytes": Gate(max_ratio=1.0)}
GATES = SPEED | MEMORY
RAW = ("latency_p50", "peak_run_bytes")  # the metrics whose samples are kept, by round and turn; the others follow from them
EXAMPLES = 500
DAMAGED, POINTS = 0.2, 1.0  # of the examples; points of ROUGE-L that all lose together
SIMULATIONS = 2000


class Faulty(Subject):
    """A side whose process has a fault."""

    module = "compress.benchmark.planted"

    def __init__(self, fault: dict[str, float], source: Source, loaded: Recipe, execution: Execution):
        super().__init__("candidate", source, loaded, execution, execution.log.parent)
        self._fault = Plant(fault.get("slowdown", 0.0), int(fault.get("resident_bytes", 0)))

    def ask(self, request: Request[T]) -> T:
        if isinstance(request, Load):
            super().ask(self._fault)
        return super().ask(request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/selftest"))
    parser.add_argument("--comparisons", type=int, default=40)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    loaded = recipe.load(RECIPE, [f"benchmark={json.dumps(BENCHMARK)}"])
    with terminal.bars() as progress:
        damaged = _kept(arguments.out / "damages.json", lambda: damages(loaded, arguments.comparisons, progress))
        covered = _kept(arguments.out / "coverage.json", coverage)
        records = comparisons(loaded, arguments.out / "comparisons.jsonl", arguments.comparisons, progress)
    summary = report(records, damaged, covered)
    (arguments.out / "README.md").write_text(summary, encoding="utf-8")
    print(summary)


def _kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; where there is none, `make` is called and its answer written there."""
    if not file.exists():
        file.write_text(json.dumps(make()) + "\n")
    return json.loads(file.read_text())


def comparisons(loaded: Recipe, file: Path, total: int, progress: Progress) -> list[dict[str, Any]]:
    """`total` comparisons, those that the file holds included; each new one is added to it."""
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with tempfile.TemporaryDirectory() as folder, nursery():
        for number in range(len(done), total):
            progress("comparisons", number, total)
            done.append({"number": number, **comparison(loaded, number % 2 == 1, Execution("cpu", Path(folder) / "log", progress))})
            with file.open("a") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
    return done


def comparison(loaded: Recipe, busy: bool, execution: Execution) -> dict[str, Any]:
    """A baseline and its faulty candidates in turns: for each of these the verdict of every gate, with its interval."""
    source, start = Source(str(BUILTIN), loaded.model.task, "float32"), time.monotonic()
    with another_process(busy):
        subjects = [Subject("baseline", source, loaded, execution, execution.log.parent)]
        subjects += [Faulty(fault, source, loaded, execution) for fault in SUBJECTS.values()]
        for subject in subjects:
            subject.outputs, subject.explained = Outputs({}), True  # speed and memory only
        session = isolate.Session(subjects, loaded, execution)
        try:
            session.run([], lambda _: False)
        finally:
            for subject in subjects:
                subject.stop()
    pairs = session.sides()
    baseline, others = pairs[0][0], [pair[-1] for pair in pairs]
    sides = [baseline, *others]
    if failures := [failure for side in sides for failure in side.failures]:
        raise RunError(failures[0])
    record: dict[str, Any] = {
        "busy": busy, "minutes": round((time.monotonic() - start) / 60, 2), "rounds": 1 + max(turn.round for turn in session.turns),
        "disturbed": sum(bool(turn.disturbed) for turn in session.turns), "turns": len(session.turns),
    }  # fmt: skip
    for name, side in zip(SUBJECTS, others, strict=True):
        results = verdict.gates(GATES, verdict.pairs(baseline, side, True), baseline, side, loaded.benchmark.confidence)
        record[name] = {result.metric: [result.verdict, result.estimate, result.interval] for result in results}
    for metric in RAW:
        samples = {
            name: [measurement.present for measurement in side.measurements if measurement.metric == metric]
            for name, side in zip(["baseline", *SUBJECTS], sides, strict=True)
        }
        record[metric] = {name: [[float(f"{value:.5g}") for value in turns] for turns in rounds] for name, (rounds,) in samples.items()}
    return record


def _spin(parent: int) -> None:
    while os.getppid() == parent:
        pass


@contextmanager
def another_process(busy: bool) -> Iterator[None]:
    """Another process that keeps one core busy, or none."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(os.getpid(),), daemon=True) if busy else None
    if process is not None:
        process.start()
    try:
        yield
    finally:
        if process is not None:
            process.kill()


def damages(loaded: Recipe, times: int, progress: Progress) -> dict[str, int]:
    """How often damaged texts are called a regression of ROUGE-L, and how often undamaged ones."""
    from compress.scores import rouge

    def scored(texts: list[str], references: list[list[str]]) -> list[list[float]]:
        return figures.quality("rougeL", rouge(texts, references)["rougeL"]).present

    examples = data.examples(loaded.data, loaded.folder, "evaluation", EXAMPLES, 0)
    texts = _predictions(loaded, examples, progress)
    references = [example.references for example in examples]
    before = scored(texts, references)
    regressions = {"damaged": 0, "as they were": 0}
    for seed in range(times):
        rng = random.Random(seed)
        chosen = rng.sample(range(len(texts)), round(DAMAGED * len(texts)))
        after, lost = list(before), 0.0
        spoiled = list(texts)
        while lost < POINTS * len(texts):  # a word at a time of one example after another
            for index in chosen:
                spoiled[index] = _without_a_word(spoiled[index], rng)
                (score,) = scored([spoiled[index]], [references[index]])
                lost += after[index][0] - score[0]
                after[index] = score
                if lost >= POINTS * len(texts):
                    break
        for name, rows in (("damaged", after), ("as they were", before)):
            a = Side(role="baseline", model="as they were", measurements=[figures.quality("rougeL", before)])
            b = Side(role="candidate", model=name, measurements=[figures.quality("rougeL", rows)])
            (result,) = verdict.gates({"rougeL": Gate(max_drop=0.0)}, verdict.pairs(a, b, True), a, b, loaded.benchmark.confidence)
            regressions[name] += result.verdict == "fail"
    return regressions


def _predictions(loaded: Recipe, examples: list[Example], progress: Progress) -> list[str]:
    source = Source(str(BUILTIN), loaded.model.task, "float32")
    with tempfile.TemporaryDirectory() as folder:
        decided = loaded.decided_by([example.references for example in examples])
        subject = Subject("baseline", source, decided, Execution("cpu", Path(folder) / "log", progress), Path(folder))
        subject.reasons = dict.fromkeys(subject.rounds, "not timed")
        try:
            subject.start()
            subject.answer(examples)
        finally:
            subject.stop()
    assert subject.outputs is not None
    return list(subject.outputs.texts or [])


def _without_a_word(text: str, rng: random.Random) -> str:
    words = text.split()
    if words:
        words.pop(rng.randrange(len(words)))
    return " ".join(words)


def coverage() -> list[list[str]]:
    """How often intervals of 95 % hold the truth, on simulated data."""
    import numpy as np

    rng = np.random.default_rng(0)

    def speeds(rounds: int, interval: Callable[..., tuple[float, float]]) -> float:
        """Both sides of a turn share the machine's pace; each process has noise of its own for a round, and each turn too."""
        hits = 0
        for _ in range(SIMULATIONS):
            pace = rng.lognormal(0, 0.5, (rounds, 3))
            a, b = (pace * rng.lognormal(0, 0.02, (rounds, 1)) * rng.lognormal(0, 0.02, (rounds, 3)) for _ in range(2))
            low, high = interval(a, 1.05 * b)
            hits += low <= 1.05 <= high
        return hits / SIMULATIONS

    def ours(a: Any, b: Any) -> tuple[float, float]:
        return statistics.paired_ratio(a.tolist(), b.tolist()).interval(0.95) or (math.nan, math.nan)

    def hierarchical(a: Any, b: Any) -> tuple[float, float]:
        logs, rounds = np.log(b) - np.log(a), len(a)
        chosen = rng.integers(rounds, size=(1000, rounds, 1))
        drawn = logs[chosen, rng.integers(logs.shape[1], size=(1000, rounds, logs.shape[1]))]
        low, high = np.exp(np.quantile(drawn.mean(axis=(1, 2)), [0.025, 0.975]))
        return float(low), float(high)

    def drops(examples: int, drawn: Callable[[int], Any]) -> float:
        hits, repeats, truth = 0, SIMULATIONS // 5, float(drawn(1_000_000).mean())
        for seed in range(repeats):
            lost = drawn(examples)[:, None]
            low, high = statistics.paired("rougeL", (0 * lost).tolist(), lost.tolist(), seed=seed).interval(0.95) or (math.nan, math.nan)
            hits += low <= truth <= high
        return hits / repeats

    def few_lose_much(n: int) -> Any:
        return -rng.exponential(20, n) * (rng.random(n) < 0.15)

    rows = [[f"latency ratio, {rounds} rounds of 3 turns", f"{speeds(rounds, ours):.1%}"] for rounds in (3, 5, 10)]
    rows += [[f"the same by a hierarchical bootstrap, {n} rounds", f"{speeds(n, hierarchical):.1%}"] for n in (5, 10)]
    rows += [[f"ROUGE-L difference, {n} examples, normal", f"{drops(n, lambda n: rng.normal(-1, 8, n)):.1%}"] for n in (100, 500)]
    rows += [[f"ROUGE-L difference, {n} examples, a few lose much", f"{drops(n, few_lose_much):.1%}"] for n in (100, 500)]
    return rows


def report(records: Sequence[dict[str, Any]], damaged: dict[str, int], covered: list[list[str]]) -> str:
    """The outcome as Markdown."""
    rows = []
    for name in SUBJECTS:
        for busy in (False, True):
            part = [record[name] for record in records if record["busy"] == busy]
            calls = [sum(gates[metric][0] == "fail" for gates in part) for metric in GATES]
            either = sum(any(gate[0] == "fail" for gate in gates.values()) for gates in part)
            ratios = sorted(gates["latency_p50"][1] for gates in part)
            spread = f"x{ratios[0]:.3f} to x{ratios[-1]:.3f}" if ratios else "-"
            rows.append([name, "one core busy" if busy else "alone", str(len(part)), *map(str, calls), str(either), spread])
    header = ["candidate", "machine", "comparisons", *(f"{metric} fails" for metric in GATES), "any gate fails", "latency ratios"]
    rounds, minutes = [record["rounds"] for record in records], [record["minutes"] for record in records]
    disturbed = sum(record["disturbed"] for record in records) / max(1, sum(record["turns"] for record in records))
    return "\n\n".join([
        "# Selftest of the benchmark",
        "A model against itself, and against itself with planted faults; gates without any margin, confidence 95 %.",
        table(header, rows),
        f"Rounds a comparison: {min(rounds)} to {max(rounds)}; minutes: {min(minutes):.1f} to {max(minutes):.1f}; {disturbed:.0%} of all"
        " turns were disturbed." if records else "No comparison was made.",
        f"Of {EXAMPLES} predictions {DAMAGED:.0%} lost words until ROUGE-L had fallen by {POINTS:g} (of 100): called a regression"
        f" {damaged['damaged']} times; undamaged {damaged['as they were']} times.",
        "How often intervals of 95 % hold the truth, on simulated data:",
        table(["interval", "holds the truth"], covered),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
