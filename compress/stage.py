"""One stage, in a working process: load, apply the method, save, load again and look whether it kept its promises."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress import methods, model
from compress.errors import BrokenPromise, DeviceError
from compress.process import Progress, serve
from compress.results import whole_folder


def run(progress: Progress, source: dict[str, Any], stage: dict[str, Any], target: str, device: str) -> dict[str, Any]:
    """Make the artifact of one stage in the folder `target`, which appears whole or not at all.

    Returns {"layers": [{name, kind, bits}]}, read from the artifact.
    """
    family, name, settings = stage["family"], stage["method"], stage["settings"]
    method = methods.require(family, name)
    device = model.pick_device(device)
    if device not in method.ABOUT.devices:
        raise DeviceError(f"{family}: {name} runs on {', '.join(method.ABOUT.devices)}, not on {device}")
    before = model.Source(**source)
    context = methods.Context(device=device, progress=progress)
    progress(f"{family}: {name}", 0, 1)
    bundle = method.apply(model.Bundle(before, device), method.Settings.model_validate(settings), context)
    with whole_folder(Path(target)) as folder:
        bundle.save(folder)
        bytes_before = model.weight_bytes(model.load_model(before, device)) if method.ABOUT.smaller else None
        del bundle
        gc.collect()
        _check_promises(model.Source(str(folder), before.task), device, f"{family}: {name}", bytes_before)
    progress(f"{family}: {name}", 1, 1)
    return {}


def _check_promises(artifact: model.Source, device: str, who: str, bytes_before: int | None) -> None:
    import torch

    again = model.load_model(replace(artifact, dtype="auto"), device)
    ids = torch.arange(2, 18, device=device).remainder(again.config.get_text_config().vocab_size)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if again.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :8]
    with torch.inference_mode():
        logits = again(**inputs).logits
    if not torch.isfinite(logits).all():
        raise BrokenPromise(f"{who}: the result gives NaN or infinite logits; nothing was kept. A wider dtype (bfloat16) may help")
    bytes_after = model.weight_bytes(again)
    if bytes_before is not None and bytes_after >= bytes_before:
        raise BrokenPromise(f"{who}: promised a smaller model, but {bytes_before:,} bytes of weights became {bytes_after:,}")


if __name__ == "__main__":
    serve({"run": run})
