"""The process that looks at a model: what its layers hold, how near zero that is, how long each takes in a forward pass."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress import bnb, experts, held
from compress.border import answering
from compress.engines.transformers.timing import prompts
from compress.errors import InputError, ModelError
from compress.hardware import pick_device
from compress.model.loading import Bundle, parameter_count, task_of, weights_in
from compress.process import Progress, serve
from compress.requests import Inspect
from compress.structure import context_length, is_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASSES = 7  # timed with clocks on every layer, and as many without
TOKENS = 128  # by default, if the model's context has room
CHUNK = 1 << 24  # weights at a time; their float64 copies stay small beside a model
Row = dict[str, Any]


def inspect(progress: Progress, request: Inspect) -> dict[str, Any]:
    """Look at a model. Returns an `Inspection` as plain data, but for the model's name as people wrote it."""
    source, batch_size = request.source, request.batch_size
    source = replace(source, task=source.task or task_of(source))
    progress("loading", 0, 1)
    bundle = Bundle(source, pick_device(request.device))
    model = bundle.model
    tokens = _length(bundle, request.tokens)
    rows = _holdings(model)
    total = held.extent([*model.parameters(), *model.buffers()])
    rows["the rest"] = {"kind": "rest", "parameters": 0, "bytes": total - sum(row["bytes"] for row in rows.values())}
    whole, seconds = _times(model, list(rows)[:-1], _inputs(bundle, batch_size, tokens), bundle.device, progress)
    for number, (name, row) in enumerate(rows.items()):
        progress("looking at weights", number, len(rows))
        row["seconds"] = seconds[name]
        if row["kind"] != "rest" and "remark" not in row:  # after the passes: some packed layers are unpacked in their first one
            row.update(_near_zero(model.get_submodule(name)))
    for share, figure in (("parameter_share", "parameters"), ("byte_share", "bytes"), ("time_share", "seconds")):
        summed = sum(row[figure] for row in rows.values())
        for row in rows.values():
            row[share] = row[figure] / summed
    progress("looking at weights", len(rows), len(rows))
    return {
        "task": source.task, "device": bundle.device, "dtype": _short(model.dtype), "batch_size": batch_size, "tokens": tokens,
        "seconds": whole, "parameters": parameter_count(model), "bytes": total,
        "parts": [{"name": name, **row} for name, row in rows.items()],
    }  # fmt: skip


def _length(bundle: Bundle, tokens: int | None) -> int:
    """How many tokens an input has: as many as asked for, by default 128, or all that fit. Raises InputError for more than fit."""
    room = context_length(bundle.model.config, bundle.tokenizer)
    if tokens is None:
        return TOKENS if room is None else min(TOKENS, room)
    if room is not None and tokens > room:
        raise InputError(f"--tokens {tokens}: the model's context holds {room} tokens at most")
    return tokens


def _inputs(bundle: Bundle, batch_size: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens; an encoder-decoder that generates gets as many on either side."""
    model = bundle.model
    model.config.pad_token_id = bundle.tokenizer.pad_token_id  # decoder-only classifiers look for the last real token by it
    inputs = prompts(model, batch_size, tokens)
    if model.config.is_encoder_decoder and model.can_generate():
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _holdings(model: "PreTrainedModel") -> dict[str, Row]:
    """Every module with parameters of its own: kind, dtype, parameters, bytes. What two modules share is the first one's."""
    rows: dict[str, Row] = {}
    owners: dict[int, str] = {}
    places: set[tuple[int, int]] = set()
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            raise ModelError(
                f"{name}: {type(module).__name__} holds its weights packed in a way that can't be looked into;"
                " inspect the model that it was made of"
            )
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        new = {leaf: parameter for leaf, parameter in own.items() if id(parameter) not in owners}
        storages = held.storages([*own.values(), *module.buffers(recurse=False)])
        weight = own.get("weight", next(iter(own.values())))
        rows[name] = {
            "kind": _kind(model, name, module), "dtype": _short(weight.dtype),
            "parameters": sum(weights_in(module, leaf, parameter) for leaf, parameter in new.items()),
            "bytes": sum(size for place, size in storages.items() if place not in places),
        }  # fmt: skip
        if id(weight) in owners:
            rows[name]["remark"] = f"its weights are those of {owners[id(weight)]}, and counted there"
        owners.update((id(parameter), name) for parameter in new.values())
        places.update(storages)
    return rows


def _kind(model: "PreTrainedModel", name: str, module: nn.Module) -> str:
    if isinstance(module, nn.Linear | Conv1D):
        return "head" if is_head(model, name) else "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if experts.holds(module):
        return "experts"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _times(
    model: "PreTrainedModel", names: list[str], inputs: dict[str, Tensor], device: str, progress: Progress
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Seconds of a forward pass, and those spent in each of the modules named and in `the rest`; medians over passes.

    A module that is inside another of them is taken from it. Passes with and without clocks take turns, since clocks cost a little too.
    """
    mark, between = _clock(device)
    whole, layers = [], []
    with torch.no_grad():
        model(**inputs)
        for number in range(PASSES):
            progress("timing", number, PASSES)
            start = mark()
            model(**inputs)
            end = mark()
            whole.append(between(start, end))
            with _clocks(model, names, mark) as visits:
                start = mark()
                model(**inputs)
                end = mark()
            layers.append(_spent(visits, between, between(start, end)))
    progress("timing", PASSES, PASSES)
    return statistics.median(whole), {name: statistics.median(spent.get(name, 0.0) for spent in layers) for name in [*names, "the rest"]}


def _clock(device: str) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What notes a moment, and the seconds between two: events on a GPU, so that nothing waits for the host, else a monotonic clock."""
    if device != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return mark, between


@contextmanager
def _clocks(model: "PreTrainedModel", names: list[str], mark: Callable[[], Any]) -> "Iterator[list[list[Any]]]":
    """Hooks that note every visit to the modules: name, the visit it was made in, start, end."""
    visits: list[list[Any]] = []
    inside: list[int] = []

    def enter(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            visits.append([name, inside[-1] if inside else None, None, None])
            inside.append(len(visits) - 1)
            visits[-1][2] = mark()

        return note

    def leave(*_: Any) -> None:
        end = mark()
        visits[inside.pop()][3] = end

    modules = [(name, model.get_submodule(name)) for name in names]
    hooks = [
        hook for name, module in modules for hook in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave))
    ]
    try:
        yield visits
    finally:
        for hook in hooks:
            hook.remove()


def _spent(visits: list[list[Any]], between: Callable[[Any, Any], float], whole: float) -> dict[str, float]:
    """Seconds in each module less those in modules inside it, and what is left of the whole as the rest."""
    spent: dict[str, float] = {}
    rest = whole
    for name, outer, start, end in visits:
        seconds = between(start, end)
        spent[name] = spent.get(name, 0.0) + seconds
        if outer is None:
            rest -= seconds
        else:
            spent[visits[outer][0]] -= seconds
    return {**spent, "the rest": rest}


def _near_zero(module: nn.Module) -> Row:
    """How many weights a module's matrix has, their rms, and the shares that are zero or near it; a remark where these can't be had."""
    if hasattr(module, "weight_packed"):
        return {"remark": "its weights are packed in a way that can't be looked into"}
    weights = _unpacked(module)
    count, square, strange = sum(weight.numel() for weight in weights), 0.0, 0
    if not count:  # a bias on its own
        return {}
    for part in _chunks(weights):
        square += float(part.square().sum())
        strange += int((~part.isfinite()).sum())
    if strange:
        return {"remark": f"{strange:,} of its weights are NaN or infinite"}
    rms = (square / count) ** 0.5
    below = torch.zeros(4, dtype=torch.long)
    for part in _chunks(weights):
        size = part.abs()
        zero = size == 0  # of a layer that is zero altogether none is below its rms
        below += torch.stack([zero.sum(), *(((size < bound * rms) | zero).sum() for bound in (0.01, 0.1, 0.5))]).cpu()
    shares = dict(zip(("zero", "below_hundredth", "below_tenth", "below_half"), (below.double() / count).tolist(), strict=True))
    return {"weights": count, "rms": rms, **shares}


def _chunks(weights: list[Tensor]) -> Iterator[Tensor]:
    """All entries in float64, a piece at a time."""
    return (part.double() for weight in weights for part in torch.split(weight.reshape(-1), CHUNK))


def _unpacked(module: nn.Module) -> list[Tensor]:
    """A layer's weight as plain numbers, unpacked where bitsandbytes or torchao hold it packed; without one, its matrices (experts)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return [parameter.detach() for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    with torch.no_grad():
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            return [bnb.unpacked(module)]
        if hasattr(weight, "__tensor_flatten__"):
            return [weight.dequantize()]
        return [weight.detach()]


def _short(dtype: torch.dtype) -> str:
    """float16"""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    serve(answering({Inspect: inspect}))
