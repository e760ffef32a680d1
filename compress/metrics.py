"""Every figure the harness can give: its name, unit and which way is better.

A recipe asks for groups (`rouge` gives twelve figures); gates and reports speak of single figures. Units are base
units: seconds, bytes, tokens; points are shares times 100, as papers print ROUGE, BLEU and accuracy.
"""

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """One figure. `kind` says what its samples are:

    quality  one row an example, paired between the two sides
    speed    a row a round with a number a turn, at each grid point, paired by round and turn
    memory   a row a round with one number
    size     exact, read once
    """

    name: str
    unit: str
    better: Better
    kind: Literal["quality", "speed", "memory", "size"]
    about: str


def _rouge() -> list[Metric]:
    figures = []
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        figures.append(Metric(name, "points", "higher", "quality", f"{name} F1, the best of the references"))
        for part in ("precision", "recall"):
            figures.append(Metric(f"{name}_{part}", "points", "higher", "quality", f"{name} {part} at that reference"))
    return figures


TASK = "lm_eval:"  # begins the groups that are tasks of lm-evaluation-harness (lm_eval:mmlu) and their figures (lm_eval:mmlu:acc)


class _Metrics(dict[str, Metric]):
    """Metrics by name; figures of lm_eval's tasks are known by their names' beginning, since lm_eval alone knows which there are."""

    def __missing__(self, name: str) -> Metric:
        if not name.startswith(TASK):
            raise KeyError(name)
        return Metric(name, "points", "higher", "quality", "mean score of a task's examples, by lm_eval")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(TASK))


METRICS: dict[str, Metric] = _Metrics(
    {
        metric.name: metric
        for metric in [
            *_rouge(),
            Metric("bleu", "points", "higher", "quality", "corpus BLEU as sacreBLEU computes it (13a)"),
            Metric("perplexity", "1", "lower", "quality", "exp of the mean negative log-likelihood a token"),
            Metric("accuracy", "points", "higher", "quality", "share of right labels"),
            Metric("f1", "points", "higher", "quality", "macro-averaged F1 over the labels"),
            Metric("generated_tokens", "tokens", "neither", "quality", "mean length of an output"),
            Metric("latency_p50", "s", "lower", "speed", "whole generation, median"),
            Metric("latency_p90", "s", "lower", "speed", "whole generation, 90th percentile"),
            Metric("latency_p99", "s", "lower", "speed", "whole generation, 99th percentile"),
            Metric("ttft", "s", "lower", "speed", "time to first token, median"),
            Metric("tpot", "s", "lower", "speed", "time per output token after the first, median"),
            Metric("tokens_per_second", "tokens/s", "higher", "speed", "output tokens of the batch over whole latency, median"),
            Metric("examples_per_second", "1/s", "higher", "speed", "examples classified over whole latency, median"),
            Metric("peak_load_bytes", "bytes", "lower", "memory", "peak while loading: RSS less the interpreter's, or GPU allocated"),
            Metric("peak_run_bytes", "bytes", "lower", "memory", "peak while running the grid: the same"),
            Metric("peak_reserved_bytes", "bytes", "lower", "memory", "GPU: peak of reserved memory while running"),
            Metric("process_gpu_bytes", "bytes", "lower", "memory", "GPU: what NVML says the process holds"),
            Metric("weight_bytes", "bytes", "lower", "size", "parameters and buffers as loaded"),
            Metric("file_bytes", "bytes", "lower", "size", "safetensors on disk"),
            Metric("parameters", "1", "lower", "size", "number of weights, packed ones counted unpacked"),
            Metric("bits_per_weight", "bits", "lower", "size", "weight_bytes times eight over parameters"),
        ]
    }
)

GROUPS: dict[str, tuple[str, ...]] = {
    "rouge": tuple(metric.name for metric in _rouge()),
    "bleu": ("bleu",),
    "perplexity": ("perplexity",),
    "accuracy": ("accuracy",),
    "f1": ("f1",),
    "generated_tokens": ("generated_tokens",),
}
GENERATED = {"rouge", "bleu", "generated_tokens"}  # groups that need generated text
CLASSIFIED = {"accuracy", "f1"}  # groups that need predicted labels
