"""Why a candidate is not smaller or not faster, in a sentence each, by rules over what was measured."""

from typing import Any

from compress import methods
from compress.report.numbers import change, scaled
from compress.results import Comparison, StageRecord


def notes(stages: list[StageRecord], compared: list[Comparison], environment: dict[str, Any]) -> list[str]:
    """The sentences; none where the candidate is smaller and faster everywhere."""
    found = []
    slower = [c for c in compared if c.metric == "latency_p50" and c.low is not None and c.low > 1]
    if slower:
        where = ", ".join(f"batch {c.batch_size} x prompt {c.prompt_tokens}: {change(c)}" for c in slower)
        found.append(f"Slower than the baseline at {where}. {_at_run_time(stages)}")
    by_name = {c.metric: c for c in compared}
    weights, run = by_name.get("weight_bytes"), by_name.get("peak_run_bytes")
    if weights and weights.candidate >= weights.baseline:
        files = by_name.get("file_bytes")
        on_disk = f", though on disk they are {change(files)}" if files and files.candidate < files.baseline else ""
        found.append(f"Once loaded, the weights take no less memory than before{on_disk}. {_at_run_time(stages)}")
    elif weights and run and run.low is not None and run.low > 0.95:
        saved = scaled(weights.baseline - weights.candidate, "bytes")
        found.append(
            f"Peak memory while running did not fall although the weights shrank by {saved}: they are now "
            f"{weights.candidate / run.candidate:.0%} of it; cache, activations and the kernels' own buffers are the rest."
        )
    if cut := environment.get("inputs_cut"):
        found.append(
            f"{cut} inputs were longer than the model's context or data.max_tokens and were cut at their end, alike on both sides."
        )
    return found


def _at_run_time(stages: list[StageRecord]) -> str:
    """What the methods say happens at every step of their models."""
    said = []
    for record in stages:
        family, name = next(iter(record.stage.items()))
        if family in methods.FAMILIES and name in methods.names(family):
            said.append(f"{family}: {name}: {methods.find(family, name).ABOUT.at_run_time}.")
    return " ".join(said) or "Nothing was done to the model that would explain it."
