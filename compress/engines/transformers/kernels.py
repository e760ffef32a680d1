"""Where the time of a decode step goes, by kind of kernel, as torch's profiler sees it.

Each operator's own time counts for the kind that its name tells. Where that tells none, it counts for the kind of its caller: a copy
inside `dequantize_4bit` is unpacking. What lies outside all operators is overhead: on a CPU the interpreter and the framework, on a GPU
the gaps between kernels, which wait for their launch.

Profiling costs time for each operator, which falls to its caller. So as many steps run unprofiled before, and the difference is taken out,
in equal parts for each operator. The shares are then those of a step without a profiler.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria

from compress.metrics import KERNELS

STEPS, FEW_STEPS, ENOUGH_S = 8, 3, 0.5  # run, and as many profiled; fewer where steps are long, since every operator is read back
RULES = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (
            r"int8_mm_dequant|vectorwise_quant|double_quant|choose_qparams|(?<!de)quantize_(affine|per|blockwise|4bit)|fake_quantize"
            r"|^_?round$|^aten::round$|kint8vectorquant",
            "rounding",
        ),
        (r"dequant|unpack|bitwise_right_shift", "unpacking"),
        (r"attention|flash|fmha|softmax|bmm", "attention"),
        (r"gemm|gemv|linear|matmul|(^|::|_)(add)?m[mv](_out)?$|int4pack_mm|scaled_mm|cutlass|xmma|nvjet", "matrix_products"),
    )
)


def kind_of(name: str) -> str | None:
    """The kind that an operator's or a kernel's name tells; None where it tells none.

    Batched products (`bmm`) are attention: transformers multiplies with weights by `linear`.
    """
    return next((kind for pattern, kind in RULES if pattern.search(name.lower())), None)


def enough(step_seconds: float) -> int:
    """How many steps are profiled where one takes so long."""
    return max(FEW_STEPS, min(STEPS, int(ENOUGH_S / step_seconds)))


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Called after each token: from the first on it times `steps` steps, then it profiles as many."""

    def __init__(self, device: str, steps: int):
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.profiler = profile(activities=activities)
        self.seconds = self.watched_seconds = 0.0
        self.begin: Callable[[], None] = lambda: None  # called when the first token is there, before the steps
        self._device, self._steps, self._calls, self._start = device, steps, 0, 0.0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def tick(self) -> None:
        """A step has ended."""
        self._calls += 1
        if self._calls == 1:
            self.begin()
        if self._calls not in (1, 1 + self._steps, 1 + 2 * self._steps):
            return
        if self._device == "cuda":
            torch.cuda.synchronize()
        took = (time.perf_counter() - self._start) / self._steps
        if self._calls == 1 + self._steps:
            self.seconds = took
            self.profiler.start()
        elif self._calls > 1:
            self.watched_seconds = took
            self.profiler.stop()
        self._start = time.perf_counter()


def profiled(run: Callable[[Watch], object], device: str, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and the share of it for every kind of kernel; shares sum to 1.

    run    runs twice as many steps as `steps` and one before, calling the watch after each
    """
    watch = Watch(device, steps)
    run(watch)
    events: Any = watch.profiler.events()  # type: ignore[no-untyped-call]
    spent = on_gpu(events) if device == "cuda" else on_cpu(events, max(0.0, steps * (watch.watched_seconds - watch.seconds)))
    return watch.seconds, shares(spent, steps * min(watch.seconds, watch.watched_seconds))


def shares(spent: dict[str, float], whole: float) -> dict[str, float]:
    """Seconds by kind as shares of the whole; what is left of it is overhead."""
    whole = max(whole, sum(spent.values()))
    by_kind = {kind: spent.get(kind, 0.0) / whole for kind in KERNELS if kind != "overhead"}
    return {**by_kind, "overhead": 1 - sum(by_kind.values())}


def on_cpu(events: Iterable[Any], excess: float) -> dict[str, float]:
    """Seconds by kind from a profile of the CPU.

    excess   seconds that the profiler itself took, in all
    """
    operators = [event for event in events if event.device_type.name == "CPU" and not event.is_async]
    each = excess / max(1, len(operators))
    spent: dict[str, float] = defaultdict(float)
    for operator in operators:
        own = operator.self_cpu_time_total / 1e6 - each * len(operator.cpu_children)
        spent[_inherited(operator) or "other"] += max(0.0, own)
    return dict(spent)


def on_gpu(events: Iterable[Any]) -> dict[str, float]:
    """Seconds by kind from a profile of a GPU: of kernels by their own names, else by the operator that launched them."""
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            spent[kind_of(event.name) or "other"] += event.time_range.elapsed_us() / 1e6
        for kernel in event.kernels:
            if kind_of(kernel.name) is None and (kind := _inherited(event)):
                spent["other"] -= kernel.duration / 1e6
                spent[kind] += kernel.duration / 1e6
    return dict(spent)


def _inherited(operator: Any) -> str | None:
    """The kind of an operator, or of its nearest caller whose name tells one."""
    while operator is not None:
        if kind := kind_of(operator.name):
            return kind
        operator = operator.cpu_parent
    return None
