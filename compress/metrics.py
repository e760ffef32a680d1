"""Every figure that the harness can measure: its name, unit and which way is better.

A recipe asks for groups (`rouge` has twelve figures); gates and reports speak of single figures. Units are base units: seconds, bytes,
tokens. Points are shares times 100, as papers print ROUGE, BLEU and accuracy.

mbu (Agarwal et al., MosaicML and Databricks, 2023) is the bytes that a decode step reads over `tpot`, as a share of the bandwidth of a
large copy. The bytes are those of the weights of all layers that the step calls, as they lie in memory, and of the cache; an
encoder-decoder's step calls only the decoder.

mfu (Chowdhery et al., PaLM, 2022) is a rate of operations, as a share of that of large matrix products in the model's dtype. The operations
are two for each weight and token that meet; the time is `ttft`.

Neither counts what kernels read or compute besides, so unpacking lowers them. Both can exceed 1: what lies in the processor's caches is
read faster than memory is copied, and 8-bit products are faster than those of the model's dtype.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """One figure. `kind` says what its samples are:

    quality  one row an example, paired between the two sides
    speed    a row a round with a number a turn, at each grid point, paired by round and turn
    memory   a row a round with one number; time to compile too
             of both the value is the geometric mean, as the ratio of two sides is one of such means
    size     exact, read once; of a divergence the worst of the examples
    """

    name: str
    unit: str
    better: Better
    kind: Literal["quality", "speed", "memory", "size"]
    about: str


class Missing(StrEnum):
    """Why an example has no statistics of a metric."""

    UNSEEN = "no token in the references"
    UNPREDICTED = "no token to predict"
    INFINITE = "infinite"
    NAN = "not a number"

    @property
    def is_broken(self) -> bool:
        """Whether the model is at fault, and not the example."""
        return self in (Missing.INFINITE, Missing.NAN)


def _rouge() -> list[Metric]:
    figures = []
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        figures.append(Metric(name, "points", "higher", "quality", f"{name} F1, the best of the references"))
        for part in ("precision", "recall"):
            figures.append(Metric(f"{name}_{part}", "points", "higher", "quality", f"{name} {part} at that reference"))
    return figures


TASK = "lm_eval:"  # begins the groups that are tasks of lm-evaluation-harness (lm_eval:mmlu) and their figures (lm_eval:mmlu:acc)


class _Metrics(dict[str, Metric]):
    """Metrics by name; figures of lm_eval's tasks are told by their prefix, since only lm_eval has the list of tasks."""

    def __missing__(self, name: str) -> Metric:
        if not name.startswith(TASK):
            raise KeyError(name)
        return Metric(name, "points", "higher", "quality", "mean score of a task's examples, by lm_eval")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(TASK))


METRICS: dict[str, Metric] = _Metrics(
    (metric.name, metric) for metric in [
        *_rouge(),
        Metric("bleu", "points", "higher", "quality", "corpus BLEU as sacreBLEU computes it"),
        Metric("chrf", "points", "higher", "quality", "corpus chrF (6-grams of characters) as sacreBLEU computes it"),
        Metric("exact_match", "points", "higher", "quality", "share of outputs that are a reference"),
        Metric("cer", "points", "lower", "quality", "character error rate: edits over the references' characters"),
        Metric("perplexity", "1", "lower", "quality", "exp of the mean negative log-likelihood a token"),
        Metric("divergence", "nats", "lower", "quality", "KL divergence of the original's next-token distributions, a token's mean"),
        Metric("divergence_first", "nats", "lower", "quality", "divergence at the first token that is predicted of each text"),
        Metric("divergence_rest", "nats", "lower", "quality", "divergence at all others"),
        Metric("divergence_worst", "nats", "lower", "size", "divergence of the text that has most of it"),
        Metric("equal_top", "points", "higher", "quality", "share of tokens at which the likeliest one is the original's"),
        Metric("accuracy", "points", "higher", "quality", "share of right labels"),
        Metric("f1", "points", "higher", "quality", "macro-averaged F1 over the labels"),
        Metric("generated_tokens", "tokens", "neither", "quality", "mean length of an output"),
        Metric("latency_p50", "s", "lower", "speed", "whole generation, the median of a turn"),
        Metric("latency_p90", "s", "lower", "speed", "whole generation, the 90th percentile of a round"),
        Metric("latency_p99", "s", "lower", "speed", "whole generation, the 99th percentile of a round"),
        Metric("ttft", "s", "lower", "speed", "time to first token, the median of a turn"),
        Metric("tpot", "s", "lower", "speed", "time per output token after the first, the median of a turn"),
        Metric("tokens_per_second", "tokens/s", "higher", "speed", "output tokens of the batch over whole latency, the median of a turn"),
        Metric("examples_per_second", "1/s", "higher", "speed", "examples classified over whole latency, the median of a turn"),
        Metric("mbu", "1", "neither", "speed", "of a decode step: what it must read, over what the machine copies at best"),
        Metric("mfu", "1", "neither", "speed", "of prefill or a classification: what it must compute, over the machine's best"),
        Metric(
            "energy_per_token", "J", "lower", "speed", "GPU: what NVML counts for the device, its idle draw too, over tokens written"
        ),
        Metric("peak_load_bytes", "bytes", "lower", "memory", "peak while loading: RSS less the interpreter's, or GPU allocated"),
        Metric(
            "sampled_load_bytes",
            "bytes",
            "lower",
            "memory",
            "the same seen every 10 ms from outside: RSS less the interpreter's, or NVML",
        ),
        Metric(
            "peak_run_bytes", "bytes", "lower", "memory", "peak while running the grid: the same, tensors lying apart as on a GPU, no heap"
        ),
        Metric(
            "sampled_run_bytes", "bytes", "lower", "memory", "seen every 10 ms from outside: RSS less the interpreter's, with slack; NVML"
        ),
        Metric("forecast_run_bytes", "bytes", "neither", "size", "what config.json alone foretells of peak_run_bytes"),
        Metric("forecast_error", "%", "neither", "size", "forecast_run_bytes over peak_run_bytes, less one"),
        Metric("kv_cache_bytes", "bytes", "lower", "memory", "of peak_run_bytes: keys and values that a generation leaves"),
        Metric("activation_bytes", "bytes", "lower", "memory", "of peak_run_bytes: what comes and goes with a run: states, scores"),
        Metric("other_bytes", "bytes", "lower", "memory", "of peak_run_bytes: held at rest beside weights: objects, file pages, copies"),
        Metric("allocator_slack_bytes", "bytes", "lower", "memory", "beside peak_run_bytes: freed and not given back; GPU: reserved"),
        Metric("peak_reserved_bytes", "bytes", "lower", "memory", "GPU: peak of reserved memory while running"),
        Metric("process_gpu_bytes", "bytes", "lower", "memory", "GPU: what NVML says the process holds"),
        Metric("cuda_context_bytes", "bytes", "lower", "memory", "GPU: of process_gpu_bytes, what torch's allocator doesn't hold"),
        Metric(
            "compile_seconds", "s", "lower", "memory", "first runs of the grid's points less second ones, the longest of the rounds"
        ),
        Metric("weight_bytes", "bytes", "lower", "size", "all tensors that the model holds after its first step, kernels' own layouts too"),
        Metric("buffer_bytes", "bytes", "lower", "size", "of weight_bytes: positions, masks and the like"),
        Metric("file_bytes", "bytes", "lower", "size", "safetensors on disk"),
        Metric("parameters", "1", "lower", "size", "number of weights, packed ones counted unpacked"),
        Metric("bits_per_weight", "bits", "lower", "size", "weight_bytes times eight over parameters"),
    ]
)  # fmt: skip

KERNELS = {  # kinds of kernel in a decode step, and how a report calls them
    "matrix_products": "matrix products",
    "attention": "attention",
    "unpacking": "unpacking weights",
    "rounding": "rounding inputs",
    "other": "the rest",
    "overhead": "outside kernels",
}

GROUPS: dict[str, tuple[str, ...]] = {
    "rouge": tuple(metric.name for metric in _rouge()),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "exact_match": ("exact_match",),
    "cer": ("cer",),
    "perplexity": ("perplexity",),
    "divergence": ("divergence", "divergence_first", "divergence_rest", "divergence_worst", "equal_top"),
    "accuracy": ("accuracy",),
    "f1": ("f1",),
    "generated_tokens": ("generated_tokens",),
}
COMPARED = {"rouge", "bleu", "chrf", "exact_match", "cer"}  # groups that compare generated text with references
GENERATED = COMPARED | {"generated_tokens"}  # groups that need generated text
READ = {"perplexity", "divergence"}  # groups that need a text's likelihoods
CLASSIFIED = {"accuracy", "f1"}  # groups that need predicted labels


def named(label: str) -> str:
    """The metric that a label names: latency_p50 of `latency_p50 [batch 8, prompt 128]`."""
    return label.partition(" [")[0]
