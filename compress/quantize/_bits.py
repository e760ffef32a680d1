"""How many bits each layer gets: the same for all, by patterns, or as many as it needs.

`bits: auto` chooses so that the predicted rise of the loss is least and the mean over all weights is at most `average_bits`. Moving a
layer's output by d raises the loss by half of d^T F d (F: the Fisher information at that output). Rounding errors of different weights
are as good as independent. So of the layer's Kronecker factors (Martens and Grosse 2015) the diagonals remain:

    rise = 1/2 * sum over i, j of (W_ij - rounded W_ij)^2 * E[g_i^2] * E[x_j^2]

x are the layer's inputs and g the gradients at its outputs, with targets drawn from the model's own predictions. One pass forward and
backward over the calibration examples gives both; the whole model is in memory while it lasts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from compress import experts
from compress.architectures.gpt2 import as_linear
from compress.errors import BrokenPromise, ModelError
from compress.methods import Context, LayerSettings
from compress.model.loading import Bundle, load_model, skeleton
from compress.quantize._grid import PER_ROW, WIDTHS, GridSettings, Kind, fit, group_columns
from compress.structure import block_stacks, has_transposed_layers, linear_layers, match, packs_alike

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Sized = TypeVar("Sized", bound=GridSettings)


def sized(bundle: Bundle, settings: Sized, context: Context, apart: bool = True) -> Sized:
    """The settings with the group size that the model's layers get, which the report tells. A mixture's grid is one that its reader knows.

    apart   whether experts are worked on, each by itself

    Raises InputError for a pattern that matches no layer, ModelError for a mixture that could not be read again.
    """
    model = skeleton(bundle.source)
    if apart:
        experts.part(model)
        settings = _for_experts(model, settings, context)
    layers, weights = linear_layers(model, settings.ignore)[0], Counter[int]()
    inside = [name for name in layers if any(name.startswith(f"{stack}.") for stack in block_stacks(model))]
    if isinstance(settings.bits, dict):
        inside = sorted({name for pattern in settings.bits for name in match(pattern, inside, "bits")})
    side = 0 if has_transposed_layers(model) else 1
    for name in inside:
        weight: Tensor = layers[name].weight  # type: ignore[assignment]
        weights[weight.shape[side]] += weight.numel()
    if not weights:
        return settings
    for sentence in settings.about_shapes(weights):
        context.say(sentence)
    return settings.sized(weights)


def _for_experts(model: "PreTrainedModel", settings: Sized, context: Context) -> Sized:
    """The settings for storing a mixture's experts, where they are worked on: one by one, without zero points.

    Raises ModelError where they can't.
    """
    layers = linear_layers(model, settings.ignore)[0]
    inside = [f"{path}.{name}" for path, mixture in experts.parted(model) for name in mixture.layers()]
    if not any(name in layers for name in inside):
        return settings
    kind, way_out = type(model).__name__, "name experts under ignore ('*.experts.*') to work on the rest"
    if not experts.readable(model):
        raise ModelError(f"{kind}: plain transformers reads packed experts one by one, and this type's only together; {way_out}")
    if settings.format != "compressed-tensors":
        raise ModelError(f"{kind}: format: {settings.format}: its files hold no experts; use compressed-tensors, or {way_out}")
    if settings.symmetric is False:
        raise ModelError(f"{kind}: symmetric: false: plain transformers reads no zero points of experts; leave symmetric out, or {way_out}")
    if settings.symmetric is None:
        context.say("symmetric is true: plain transformers reads no zero points of experts")
    return settings.model_copy(update={"symmetric": True})


def plan(
    bundle: Bundle, model: "PreTrainedModel", settings: LayerSettings, context: Context, layers: "dict[str, nn.Linear]"
) -> dict[str, Kind]:
    """The kind of grid that each layer gets, by name; layers that no pattern names are left out and noted.

    A group size that doesn't divide a layer's columns gives it a scale a row, which is noted too. So are bits that can't be stored as such.

    Raises InputError for a pattern that matches no layer, BrokenPromise where the loss can't be computed or differentiated.
    """
    if not isinstance(settings, GridSettings):
        return dict.fromkeys(layers, Kind(8, True, 0))
    widths = _widths(bundle, settings, context, layers)
    for name in layers:
        if name not in widths:
            context.leave_out(name, "no pattern of bits names it")
    kinds = {}
    alike = packs_alike(model)
    for name, bits in widths.items():
        columns = layers[name].in_features
        size = group_columns(columns, settings.group_size)
        kinds[name] = Kind(bits, bool(settings.symmetric), 0 if size == columns else size)
        odd = []
        if alike and bits < max(widths.values()):
            odd.append(f"stored in {max(widths.values())} bits: plain transformers reads one width for all layers of such a model")
        if settings.group_size not in (PER_ROW, size):
            odd.append(f"group_size {settings.group_size} does not divide its {columns} columns; it has a scale a row")
        if odd:
            context.remarks[name] = "; ".join(odd)
    return kinds


def _widths(bundle: Bundle, settings: GridSettings, context: Context, layers: "dict[str, nn.Linear]") -> dict[str, int]:
    """Bits by layer name."""
    if settings.bits == "auto":
        rises = sensitivity(bundle, settings, context, layers)
        return allocate(rises, {name: layer.weight.numel() for name, layer in layers.items()}, settings.average_bits or 4.0)
    if isinstance(settings.bits, int):
        return dict.fromkeys(layers, settings.bits)
    widths: dict[str, int] = {}
    for pattern, bits in settings.bits.items():
        for name in match(pattern, layers, "bits"):
            widths.setdefault(name, bits)  # the first pattern that matches counts
    return widths


def allocate(rises: dict[str, dict[int, float]], sizes: dict[str, int], average: float) -> dict[str, int]:
    """The bits with the least sum of rises whose mean over all weights is at most `average`. A multiple-choice knapsack, solved exactly.

    rises   layer: bits: predicted rise of the loss
    sizes   layer: number of weights
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(name, bits) for name in rises for bits in WIDTHS]
    cost = np.array([rises[name][bits] for name, bits in choices])
    one_each = np.array([[float(name == layer) for name, _ in choices] for layer in rises])
    share = np.array([sizes[name] * bits for name, bits in choices]) / sum(sizes.values())
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(share[None], 0, average * (1 + 1e-9))]
    scaled = cost * (1e6 / max(cost.max(), 1e-30))  # the solver's tolerances are absolute ones
    solution = milp(scaled, constraints=limits, integrality=np.ones(len(choices)), bounds=Bounds(0, 1))
    return {name: bits for (name, bits), taken in zip(choices, solution.x, strict=True) if taken > 0.5}


def sensitivity(bundle: Bundle, settings: GridSettings, context: Context, layers: "Iterable[str]") -> dict[str, dict[int, float]]:
    """By how much the loss (nats a token) rises, as predicted, when one layer alone is rounded to 2, 3, 4 or 8 bits."""
    import torch

    from compress.calibration.stream import batches, without_cache

    model = as_linear(load_model(bundle.source, bundle.device)).requires_grad_(False)
    experts.part(model)
    modules = {name: model.get_submodule(name) for name in layers}
    generator = torch.Generator(bundle.device).manual_seed(0)
    examples, tokens = batches(model, bundle.tokenizer, context), 0
    with without_cache(model), _squares(model, modules) as (at_input, at_output):
        for done, inputs in enumerate(examples):
            context.progress("measuring each layer's sensitivity", done, len(examples))
            logits: Tensor = model(**inputs).logits.float()
            logits = logits.reshape(-1, logits.shape[-1])
            mask = inputs["decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"].reshape(-1).bool()
            logits = logits[mask] if len(mask) == len(logits) else logits
            if not torch.isfinite(logits).all():
                raise BrokenPromise(f"bits: auto: {type(model).__name__} gives NaN or infinite logits on the calibration data")
            drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            tokens += len(logits)
    if not at_output:
        raise BrokenPromise(f"bits: auto: no gradient reached the layers of {type(model).__name__}")
    context.progress("measuring each layer's sensitivity", len(examples), len(examples))
    rises: dict[str, dict[int, float]] = {}
    for name, module in modules.items():
        weight = module.weight.data.float()
        size = at_output[name][:, None] / tokens * at_input[name]
        rises[name] = {b: float(((fit(weight, settings, b).rounded(weight) - weight).square() * size).sum()) / 2 for b in WIDTHS}
    return rises


@contextmanager
def _squares(model: Any, modules: "dict[str, nn.Module]") -> "Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]":
    """By layer, as they come: mean squares of the inputs (columns,), sums over tokens of the squared gradients at the outputs (rows,)."""
    at_input: dict[str, Tensor] = {}
    at_output: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: "nn.Module", args: "tuple[Tensor, ...]", out: "Tensor") -> None:
            rows = args[0].detach().float().reshape(-1, args[0].shape[-1])
            before, count[name] = count.get(name, 0), count.get(name, 0) + len(rows)
            at_input[name] = (at_input.get(name, 0) * before + rows.square().sum(dim=0)) / count[name]

            def backward(gradient: "Tensor") -> None:
                rows = gradient.float().reshape(-1, gradient.shape[-1])
                at_output[name] = at_output.get(name, 0) + rows.square().sum(dim=0)

            out.register_hook(backward)  # type: ignore[no-untyped-call]

        return hook

    def start(module: "nn.Module", args: "tuple[Tensor, ...]") -> None:
        args[0].requires_grad_()

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    for blocks in block_stacks(model).values():  # no parameter needs a gradient; the hidden states do, from the first block on
        handles.append(blocks[0].register_forward_pre_hook(start))
    try:
        yield at_input, at_output
    finally:
        for handle in handles:
            handle.remove()
