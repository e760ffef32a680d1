"""One stage, in a working process: load, apply the method, save, load again and look whether it kept its promises."""

import gc
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from compress import account, experts, methods, model
from compress.errors import BrokenPromise, DeviceError
from compress.methods import Example
from compress.process import Progress, serve
from compress.products import in_float32
from compress.results import NOTES, whole_folder


def run(
    progress: Progress, source: dict[str, Any], stage: dict[str, Any], shown: dict[str, Any], target: str, device: str,
    scratch: str | None = None, cache: str | None = None, models: dict[str, dict[str, Any]] | None = None, processes: int = 1,
) -> None:  # fmt: skip
    """Make the artifact of one stage in the folder `target`, which appears whole or not at all.

    shown     what the method may see: examples, validation, max_tokens, chat
    scratch   where it may leave checkpoints; not made before it does
    cache     where it may leave what other stages can use; not made before it does
    models    what it may load besides the source: `original`, the recipe's model as it came, and those that its settings name
    processes so many are asked for this same stage, to do it together; the first makes the artifact
    """
    family, name = stage["family"], stage["method"]
    settings = methods.find(family, name).Settings.model_validate(stage["settings"])
    method = methods.require(family, name, settings)
    device = model.pick_device(device)
    if device not in method.ABOUT.devices:
        raise DeviceError(f"{family}: {name} runs on {', '.join(method.ABOUT.devices)}, not on {device}")
    rank = 0 if processes == 1 else _join(device, processes)
    before = model.Source(**source)
    seen, watched = ([Example(**row) for row in shown.get(kind, [])] for kind in ("examples", "validation"))
    others = {role: model.Source(**other) for role, other in (models or {}).items()}
    place, shared = (Path(folder) if folder else None for folder in (scratch, cache))
    context = methods.Context(
        device, progress, seen, shown["max_tokens"], shown["chat"], others, place, watched, shared, processes=processes, rank=rank
    )
    progress(f"{family}: {name}", 0, 1)
    bare = model.skeleton(before)
    if method.ABOUT.experts:
        experts.part(bare)
    account.foresee(bare, settings, f"{family}: {name}")
    with in_float32(device):
        bundle = method.apply(model.Bundle(before, "cpu" if settings.sharded() else device), settings, context)
    if rank > 0:
        return
    counted = account.take(bare, settings, context, f"{family}: {name}")
    with whole_folder(Path(target)) as folder:
        bundle.save(folder)
        noted = {"layers": context.layers, "said": context.said, "curve": context.curve, "cut": context.cut}
        noted["account"] = counted and counted.model_dump()
        (folder / NOTES).write_text(json.dumps(noted, indent=1), encoding="utf-8")
        del bundle
        gc.collect()
        if method.ABOUT.smaller:
            _check_smaller(model.parameter_bytes(bare), model.file_bytes(folder), f"{family}: {name}")
        with in_float32(device):
            _check_logits(model.Source(str(folder), before.task), device, f"{family}: {name}")
    progress(f"{family}: {name}", 1, 1)


def _join(device: str, processes: int) -> int:
    """Find the other processes; gives which of them this one is. On GPUs it takes one of its own, which is `cuda` from now on.

    Raises DeviceError where there are fewer GPUs than processes.
    """
    import torch

    rank, backend, own = int(os.environ["RANK"]), "gloo", None
    if device == "cuda":
        if (there := torch.cuda.device_count()) < processes:
            raise DeviceError(f"--processes {processes}: each takes a GPU of its own, and here are {there}; use fewer, or --device cpu")
        backend, own = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(own)
    # the parent ends all when one ends, so that nobody waits for nothing; and some waits are long, as for a teacher that writes
    torch.distributed.init_process_group(backend, timeout=timedelta(days=30), device_id=own)
    return rank


def _check_smaller(before: int, after: int, who: str) -> None:
    if after >= before:
        raise BrokenPromise(f"{who}: promised a smaller model, but {before:,} bytes of weights became {after:,} bytes on disk")


def _check_logits(artifact: model.Source, device: str, who: str) -> None:
    import torch

    again = model.load_model(artifact, device)
    ids = torch.arange(2, 34, device=device).remainder(again.config.get_text_config().vocab_size)[None]
    if isinstance(again.config.eos_token_id, int):
        ids[:, -1] = again.config.eos_token_id  # where some classifiers look
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if again.config.is_encoder_decoder and again.can_generate():
        inputs["decoder_input_ids"] = ids[:, :8]
    with torch.inference_mode():
        logits = again(**inputs).logits
    if not torch.isfinite(logits).all():
        raise BrokenPromise(f"{who}: the result gives NaN or infinite logits; nothing was kept. A wider dtype (bfloat16) may help")


if __name__ == "__main__":
    serve({"run": run})
