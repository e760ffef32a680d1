"""Why a candidate is not smaller or not faster, and what was left out unasked, in a sentence each, by rules over what was measured."""

from collections.abc import Sequence
from typing import Any

from compress import methods
from compress.report import steps
from compress.report.layers import counted
from compress.report.numbers import change, scaled
from compress.results.sides import Comparison, GateResult, Side
from compress.results.stages import StageRecord

# reasons that are the recipe's, or the same for all models
EXPECTED = (methods.HEAD, *methods.ASKED, "stands outside the blocks")
NAMED = 3
SMALLER = 0.9  # weights that shrank by less aren't expected to make a difference


def notes(
    stages: list[StageRecord], compared: list[Comparison], environment: dict[str, Any], sides: list[Side], gates: Sequence[GateResult] = ()
) -> list[str]:
    """The sentences; none where the candidate is smaller and faster everywhere and no layer was left out unasked.

    gates   no sentence claims more than they do
    """
    sentences = _speed(stages, compared, environment, sides, gates)
    by_name = {c.metric: c for c in compared}
    weights, run = by_name.get("weight_bytes"), by_name.get("peak_run_bytes")
    if weights and weights.candidate >= weights.baseline:
        files = by_name.get("file_bytes")
        on_disk = f", though on disk they are {change(files)}" if files and files.candidate < files.baseline else ""
        sentences.append(f"Once loaded, the weights take no less memory than before{on_disk}. {_at_run_time(stages)}")
    elif weights and run and run.low is not None and run.low > 0.95:
        saved = scaled(weights.baseline - weights.candidate, "bytes")
        sentences.append(
            f"Peak memory while running did not fall although the weights shrank by {saved}: they are now "
            f"{weights.candidate / run.candidate:.0%} of it; cache, activations and the kernels' own buffers are the rest."
        )
    if foreign := environment.get("foreign_gpu_bytes"):
        sentences.append(f"Other processes held {scaled(foreign, 'bytes')} of the GPU meanwhile; measure again without them.")
    if cut := environment.get("inputs_cut"):
        sentences.append(
            f"{cut} inputs were longer than the model's context or data.max_tokens and were cut, alike on both sides. The cut is at the"
            " end of their longest field, or at their start where shots stand there; the text around it is whole."
        )
    return sentences + [sentence for record in stages for sentence in _left_out(record)]


def open_points(gates: Sequence[GateResult]) -> set[tuple[str, int | None, int | None]]:
    """The figures at which a gate can't tell yet; nothing else in a report calls these better or worse."""
    return {(gate.metric, gate.batch_size, gate.prompt_tokens) for gate in gates if gate.verdict == "cannot_tell"}


def _speed(
    stages: list[StageRecord], compared: list[Comparison], environment: dict[str, Any], sides: list[Side], gates: Sequence[GateResult]
) -> list[str]:
    """Where the candidate is slower, or no faster although its weights shrank; and why, where it is worst, in two sentences at most.

    What a gate leaves open isn't called slower.
    """
    timed = [c for c in compared if c.metric == "latency_p50" and c.low is not None and c.high is not None]
    undecided = open_points(gates)
    higher = [c for c in timed if c.low is not None and c.low > 1]
    slower, unsure = ([c for c in higher if (c.point in undecided) == doubted] for doubted in (False, True))
    alike = [c for c in timed if c not in higher and c.high is not None and c.high >= 1]
    shrank = any(c.metric == "weight_bytes" and c.candidate < SMALLER * c.baseline for c in compared)
    sentences = [f"Not shown to be slower than the baseline at {_places(unsure)}: the gate there can't tell yet."] if unsure else []
    if slower:
        reasons = steps.costs(sides, max(slower, key=_estimate))[:2] or [_at_run_time(stages, slows=True)]
        sentences.insert(0, " ".join([f"Slower than the baseline at {_places(slower)}.", *reasons]))
    elif alike and shrank and (reasons := steps.reasons(sides, max(alike, key=_estimate), environment)[:2]):
        sentences.append(" ".join([f"Not shown to be faster than the baseline at {_places(alike)}.", *reasons]))
    return sentences


def _places(compared: list[Comparison]) -> str:
    """batch 1 x prompt 64: x1.029 (1.012 to 1.046), and so on"""
    return ", ".join(f"batch {c.batch_size} x prompt {c.prompt_tokens}: {change(c)}" for c in compared)


def _estimate(compared: Comparison) -> float:
    return compared.estimate or 0.0


def at_run_time(record: StageRecord) -> str | None:
    """What happens at every step of a model by a stage's method; None for a method that no longer exists."""
    about = _about(record)
    return about.at_run_time if about else None


def _about(record: StageRecord) -> methods.About | None:
    family, name = next(iter(record.stage.items()))
    exists = family in methods.FAMILIES and name in methods.names(family)
    return methods.find(family, name).ABOUT if exists else None


def _left_out(record: StageRecord) -> list[str]:
    """The layers that a stage left out although nobody asked it to, a sentence a reason."""
    reasons: dict[str, list[str]] = {}
    for layer in record.layers:
        reason = (layer.remark or "").removeprefix(methods.LEFT_OUT)
        if layer.bits is None and reason and reason not in EXPECTED:
            reasons.setdefault(reason, []).append(layer.name)
    how = "in full precision" if "quantize" in record.stage else "whole"
    return [f"{record.name} left {_few(names, how)} because {reason}." for reason, names in reasons.items()]


def _few(names: list[str], how: str) -> str:
    """1 layer in full precision (fc1); 9 layers in full precision (a, b, c and 6 more), each"""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{counted(len(names))} {how} ({', '.join(names[:NAMED])}{more})" + (", each" if len(names) > 1 else "")


def _at_run_time(stages: list[StageRecord], slows: bool = False) -> str:
    """What happens at every step of a model by the stages' methods; with `slows` only of those that can make a step longer."""
    sentences = [f"{record.name}: {about.at_run_time}." for record in stages if (about := _about(record)) and (about.slows or not slows)]
    return " ".join(sentences) or "Nothing was done to the model that would explain it."
