"""Where the time of a step of distillation goes, and what the teacher holds.

    python reports/distillation/step.py [RECIPE] [--steps 60] [--set stages.1.top_k=64]

Runs the recipe's stages before its distillation, then a few steps of that with the forward passes and the backward pass timed. Prints the
share of each in the whole time of a step. The rest is the batch's making, the loss, clipping, the optimiser and the trainer. Memory: the
largest amount that the process has held, and how many of the teacher's tensors require or have a gradient.
"""

import argparse
import json
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.modules import module as hooks

from compress import data, methods, pipeline, recipe
from compress.distill import _pair
from compress.model.loading import Bundle
from compress.model.source import Source, locate

spent: dict[str, float] = defaultdict(float)
began: list[float] = []


def before(module: torch.nn.Module, *_: object) -> None:
    began.append(time.perf_counter())


def after(module: torch.nn.Module, *_: object) -> None:
    start = began.pop()
    if not began:  # the whole model, not a part of it
        spent["student forward" if torch.is_grad_enabled() else "teacher forward"] += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart-distill")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = recipe.load(arguments.recipe, arguments.set)
    *stages, last = loaded.stages
    settings = last.settings.model_copy(update={"steps": arguments.steps, "epochs": None})
    with tempfile.TemporaryDirectory() as folder:
        source = Source(locate(loaded.model.id, loaded.folder), loaded.model.task, loaded.model.dtype)
        shortened = loaded.model_copy()
        shortened._stages = tuple(stages)
        records = pipeline._stages(shortened, source, Path(folder), "cpu", Path(folder) / "log", methods.quiet)
        student_source = Source(records[-1].artifact, source.task) if records else source
        examples = data.examples(loaded.data, loaded.folder, "train", settings.samples, settings.seed)
        times: list[float] = []
        teachers: list[torch.nn.Module] = []
        context = methods.Context(
            "cpu", lambda what, *_: times.append(time.perf_counter()) if what.startswith("training") else None, examples,
            settings.max_tokens, models={"original": source}, cache=Path(folder) / "teachers",
        )  # fmt: skip
        frozen, backward = _pair.frozen, torch.Tensor.backward

        def timed(loss: torch.Tensor, *rest: object, **more: object) -> None:
            start = time.perf_counter()
            backward(loss, *rest, **more)  # type: ignore[arg-type]
            spent["backward"] += time.perf_counter() - start

        _pair.frozen = lambda bundle: teachers.append(frozen(bundle)) or teachers[-1]  # type: ignore[assignment, func-returns-value]
        torch.Tensor.backward = timed  # type: ignore[method-assign, assignment]
        handles = [hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after, always_call=True)]
        methods.find(last.family, last.method).apply(Bundle(student_source, "cpu"), settings, context)
        for handle in handles:
            handle.remove()
    whole = (times[-1] - times[0]) / (len(times) - 1)
    step = {name: seconds / arguments.steps for name, seconds in spent.items() if name != "teacher forward" or settings.top_k is None}
    rest = 1 - sum(step.values()) / whole
    held = sum(1 for teacher in teachers for p in teacher.parameters() if p.requires_grad or p.grad is not None)
    print(json.dumps({
        "recipe": loaded.name, "batch_size": settings.batch_size, "top_k": settings.top_k, "ms a step": round(1000 * whole, 1),
        **{f"% {name}": round(100 * seconds / whole, 1) for name, seconds in sorted(step.items())}, "% rest": round(100 * rest, 1),
        "teacher's tensors with gradients": held, "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
