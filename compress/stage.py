"""One stage, in a working process: load, apply the method, save, load again and check what the method promised."""

import gc
import json
import os
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from compress import account, experts, gptq, methods
from compress.border import answering
from compress.errors import BrokenPromise, CompressError, DeviceError, is_out_of_memory
from compress.export._check import check as check_export
from compress.files import whole_folder
from compress.hardware import pick_device
from compress.model.folder import file_bytes
from compress.model.loading import Bundle, load_model, load_tokenizer, parameter_bytes, skeleton
from compress.model.source import Source
from compress.process import Progress, serve
from compress.products import in_float32
from compress.requests import Make
from compress.results.stages import NOTES
from compress.structure import trial_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOOKED_AT = 4  # examples
# of a token's logits' mean square at the median token, by the fewest bits of a layer: several times what was seen in models that bear
# rounding (16 bits 0.0003; 8 bits 0.003, 0.07 with rounded inputs; 4 bits 0.03). With 2 bits anything may change
MOST_CHANGED = {16: 0.01, 8: 0.3, 4: 0.3, 3: 0.5}
ROUNDED = 2  # times what plain rounding changes, where that is more: 4 bits, a row at a time, change SmolLM2 by 0.6
UNSURE = 10  # times as much for a classifier, whose two or three logits may be close together on a few examples


def run(progress: Progress, request: Make) -> None:
    """Make an artifact. Raises what the method raises, and BrokenPromise for an artifact that isn't what the method promises."""
    family, name, shown, before = request.family, request.method, request.shown, request.source
    target, processes = request.target, request.processes
    settings = methods.find(family, name).Settings.model_validate(request.settings)
    method = methods.require(family, name, settings)
    device = pick_device(request.device)
    if device not in method.ABOUT.devices:
        raise DeviceError(f"{family}: {name} runs on {', '.join(method.ABOUT.devices)}, not on {device}")
    rank = 0 if processes == 1 else _join(device, processes)
    place, shared = (Path(folder) if folder else None for folder in (request.scratch, request.cache))
    context = methods.Context(
        device, progress, shown.examples, shown.max_tokens, shown.chat, request.models, place, shown.validation, shared,
        processes=processes, rank=rank,
    )  # fmt: skip
    progress(f"{family}: {name}", 0, 1)
    bare = skeleton(before)
    if method.ABOUT.experts:
        experts.part(bare)
    account.foresee(bare, settings, f"{family}: {name}")
    with in_float32(device):
        bundle = method.apply(Bundle(before, "cpu" if settings.sharded() else device), settings, context)
    if rank > 0:
        return
    counted = account.take(bare, settings, context, f"{family}: {name}")
    with whole_folder(Path(target)) as folder:
        bundle.save(folder)
        del bundle
        gc.collect()
        if method.ABOUT.smaller:
            _check_smaller(parameter_bytes(bare), file_bytes(folder), f"{family}: {name}")
        artifact = Source(str(folder), before.task)
        with in_float32(device):
            if family == "export":
                check_export(before, artifact, name, device, context)
            else:
                _check_logits(before, artifact, device, context, f"{family}: {name}", family == "quantize" and not method.ABOUT.trains)
        if counted is None and before.bits is None and family != "export":
            counted = account.compare(before, Source(str(folder), before.task))
        noted = {"layers": context.layers, "said": context.said, "curve": context.curve, "cut": context.cut}
        noted["account"] = counted and counted.model_dump()
        (folder / NOTES).write_text(json.dumps(noted, indent=1), encoding="utf-8")
    progress(f"{family}: {name}", 1, 1)


def _join(device: str, processes: int) -> int:
    """Join the other processes; returns this one's rank. On GPUs it takes one of its own, which is `cuda` from now on.

    Raises DeviceError where there are fewer GPUs than processes.
    """
    import torch

    rank, backend, own = int(os.environ["RANK"]), "gloo", None
    if device == "cuda":
        if (there := torch.cuda.device_count()) < processes:
            raise DeviceError(f"--processes {processes}: each takes a GPU of its own, and there are {there}; use fewer, or --device cpu")
        backend, own = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(own)
    # a long timeout: some waits are long, as for a teacher that writes, and the parent ends all processes when one of them dies
    torch.distributed.init_process_group(backend, timeout=timedelta(days=30), device_id=own)
    return rank


def _check_smaller(before: int, after: int, who: str) -> None:
    if after >= before:
        raise BrokenPromise(f"{who}: promised a smaller model, but {before:,} bytes of weights became {after:,} bytes on disk")


def _check_logits(
    before: Source, artifact: Source, device: str, context: methods.Context, who: str, rounds: bool
) -> None:  # fmt: skip
    """See that the artifact works as plain transformers loads it, and that rounding changed no more than it can.

    Raises BrokenPromise otherwise, with how much changed.
    """
    logits = _logits(artifact, device, context, who)
    if not all(part.isfinite().all() for part in logits):
        raise BrokenPromise(f"{who}: the result gives NaN or infinite logits; nothing was kept. A wider dtype (bfloat16) may help")
    bits = min((int(layer["bits"]) for layer in context.layers if layer["bits"] is not None), default=0)
    bound = MOST_CHANGED.get(bits) if rounds else None
    if bound is None:
        return
    bound *= UNSURE if before.task == "sequence-classification" else 1
    try:
        reference = _logits(before, device, context, who)
        if (changed := _changed(reference, logits)) > bound:
            bound = max(bound, ROUNDED * _changed(reference, _logits(before, device, context, who, rounded=True)))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        context.say("its logits weren't compared with those of the model before it, which doesn't fit in memory here")
        return
    if changed > bound:
        raise BrokenPromise(
            f"{who}: loaded by plain transformers, the result's logits differ from the model's by {changed:.2f} of their mean square at"
            f" the median token of {len(logits)} examples; {bits} bits change {bound:.2g} at most. Either its files aren't read as"
            " intended, or the model can't bear this rounding: try more bits or another method. Nothing was kept"
        )


def _changed(reference: "list[Tensor]", logits: "list[Tensor]") -> float:
    """How much logits changed at the median token, as a share of their mean square; attention sinks and the like may change much more."""
    import torch

    shares = [
        (part - other).square().sum(dim=-1) / part.square().sum(dim=-1).clamp(min=1e-30)
        for part, other in zip(reference, logits, strict=True)
    ]
    return float(torch.cat(shares).median())


def _logits(source: Source, device: str, context: methods.Context, who: str, rounded: bool = False) -> "list[Tensor]":
    """A model's logits, as plain transformers loads it, for a few of the stage's examples, or for some tokens where there are none.

    They are float32 (tokens, vocabulary), each token's less their mean, which makes no difference to the softmax.

    rounded   round its layers to nearest, in as many bits as the stage used, a row at a time

    Raises BrokenPromise where it can't be run.
    """
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    loaded, few = _loaded(source, device, context), replace(context, examples=context.examples[:LOOKED_AT], said=[], cut=[])
    if rounded:
        _round(loaded, context)
    rows = []
    with torch.no_grad():
        for inputs in _inputs(loaded, load_tokenizer(source), few):
            try:
                logits = loaded(**inputs).logits.float()
            except (NotImplementedError, AttributeError, TypeError, ValueError) as error:  # the module around a layer uses its weight
                first = next(iter(str(error).splitlines()), "")
                raise BrokenPromise(f"{who}: plain transformers can't run the result: {type(error).__name__}: {first[:200]}") from None
            rows.append((logits - logits.mean(dim=-1, keepdim=True)).flatten(0, -2).cpu())
    return rows


def _loaded(source: Source, device: str, context: methods.Context) -> "PreTrainedModel":
    """The model as transformers loads it; where a package for that isn't installed, with the numbers that its files hold."""
    if gptq.is_unread(source):
        context.say(f"its files were checked unpacked: {', '.join(gptq.READERS)}, by which transformers reads them, aren't installed here")
    with gptq.readable(source, Path(source.id).parent) as read:
        return load_model(read, device)


def _round(loaded: "PreTrainedModel", context: methods.Context) -> None:
    """Round the stage's layers to nearest in as many bits, a row at a time, in place; with 8 bits also their inputs, token by token."""
    from transformers.pytorch_utils import Conv1D

    experts.part(loaded)
    modules = dict(loaded.named_modules())
    for layer in context.layers:
        if layer["bits"] is not None and (module := modules.get(str(layer["name"]))) is not None:
            bits, weight = int(layer["bits"]), module.weight.data
            weight.copy_(_rounded(weight, bits, 0 if isinstance(module, Conv1D) else -1))
            if bits == 8:
                module.register_forward_pre_hook(lambda _, args: (_rounded(args[0], 8, -1), *args[1:]))


def _rounded(tensor: "Tensor", bits: int, dim: int) -> "Tensor":
    wide = tensor.float()
    step = wide.abs().amax(dim=dim, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 0.5)
    nearest: Tensor = (wide / step).round() * step
    return nearest.to(tensor.dtype)


def _inputs(loaded: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: methods.Context) -> "list[dict[str, Tensor]]":
    from compress.calibration.stream import encoded, padded

    if context.examples:
        with suppress(CompressError):
            return [padded(loaded, [(ids, answer)]) for _, ids, answer in encoded(loaded, tokenizer, context)]
    return [trial_inputs(loaded)]


if __name__ == "__main__":
    serve(answering({Make: run}))
