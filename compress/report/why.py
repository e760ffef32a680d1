"""Why a candidate is not smaller or not faster, in a sentence each, by rules over what was measured."""

from typing import Any

from compress.report.numbers import change, scaled
from compress.results import Comparison, Side

UNPACKED = ("quantize: bnb_nf4", "quantize: bnb_int8")  # methods whose weights are unpacked at every step


def notes(line: str, compared: list[Comparison], candidate: Side, environment: dict[str, Any]) -> list[str]:
    """The sentences; none where the candidate is smaller and faster everywhere. `line` are the stages in short."""
    found = []
    slower = [c for c in compared if c.metric == "latency_p50" and c.low is not None and c.low > 1]
    if slower:
        where = ", ".join(f"batch {c.batch_size} x prompt {c.prompt_tokens}: {change(c)}" for c in slower)
        found.append(f"Slower than the baseline at {where}. {_why_slower(line, environment)}")
    by_name = {c.metric: c for c in compared}
    weights, run = by_name.get("weight_bytes"), by_name.get("peak_run_bytes")
    if weights and weights.candidate >= weights.baseline:
        found.append("The weights take no less memory than before: the line of stages removes and packs nothing.")
    elif weights and run and run.low is not None and run.low > 0.95 and run.baseline > 0:
        found.append(
            f"Peak memory while running hardly changed although the weights shrank by {scaled(weights.baseline - weights.candidate, 'bytes')}: "
            f"they are {weights.candidate / run.candidate:.0%} of it; cache, activations and the kernels' own buffers are the rest."
        )
    return found


def _why_slower(line: str, environment: dict[str, Any]) -> str:
    if "int8_dynamic" in line and environment.get("device") == "cpu" and not environment.get("int8_instructions"):
        return "This CPU has no int8 instructions (VNNI, AMX), so int8 products run in plain integer code; on one that has them, or a GPU, they gain."
    if any(method in line for method in UNPACKED):
        return "The packed weights are unpacked or scaled at every step, which costs more here than reading fewer bytes saves."
    if "cast" in line and environment.get("device") == "cpu":
        return "16-bit arithmetic is slower than 32-bit on CPUs without instructions for it; it saves memory, not time."
    return "No rule explains it; the raw timings are in report.json."
