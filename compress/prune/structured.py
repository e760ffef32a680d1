"""Structured: whole heads, feed-forward channels or hidden units go, so that the model is smaller and faster everywhere.

A unit is scored by all the weights that belong to it, in whichever layers. The score is their size, or how much the loss would change
without them, to first order (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning"). The lowest go, in every layer
equally many, since a config has one number for all. Heads that share keys and values go together; so do the heads that share T5's position
bias. Channels are cut in any type whose config has their number, heads where it has their size, too. Hidden units are cut in T5, BART,
Llama, Mistral, Qwen2 and 3, GPT-2, BERT and RoBERTa. Best followed by some training.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from compress import methods
from compress.architectures import CHANNELS, DIMENSIONS, HEADS, WIDTH
from compress.errors import BrokenPromise, InputError
from compress.methods import About, Context
from compress.model.loading import Bundle
from compress.prune._coupled import BOUND, Coupling, Group
from compress.structure import trial_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ABOUT = About(
    at_run_time="smaller matrices in fewer heads; what each step costs besides, at small sizes most of its time, stays", calibrated=True
)
TOLERANCE = 0.02  # of the parameters asked for
MOST_APART = 0.01  # of the logits' mean square; in 16 bits sums of other lengths part by a thousandth
Kept = dict[str, int]  # units by dimension


class Settings(methods.Settings):
    keep: float = Field(0.75, gt=0, lt=1, description="the share of all parameters, embeddings included, that is left")
    cut: list[Literal["channels", "heads", "width"]] = Field(
        ["channels", "heads"], min_length=1, description="what may be cut: feed-forward channels, attention heads, hidden units"
    )
    importance: Literal["magnitude", "taylor"] = Field(
        "magnitude", description="the norm of a unit's weights, or what the loss on the targets would change by without it"
    )
    multiple: int = Field(8, ge=1, description="channels and width are kept in multiples of this; hardware is fast with 8 and more")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with fewer units, and a config that says so.

    Raises InputError where the share can't be reached, and ModelError for an architecture that isn't known. Raises DataError where taylor
    has nothing to learn from, and BrokenPromise where scores are not finite.
    """
    from compress.prune._rebuilt import rebuilt

    model = bundle.model
    coupling = Coupling(model)
    kept = _choice(coupling, settings, _allowed(coupling, settings, context))
    indices = {}
    for group, scores in _scores(bundle, coupling, settings, context).items():
        dimension, where = group
        if kept[dimension] == coupling.sizes[dimension]:
            continue
        if not scores.isfinite().all():
            raise BrokenPromise(f"{where or 'the model'}: the scores of its {dimension} are inf or NaN; model.dtype: float32 may help")
        indices[group] = scores.argsort(descending=True, stable=True)[: kept[dimension]].sort().values
    state = {name: coupling.cut(name, weight, indices) for name, weight in model.state_dict().items()}
    _same_scale(model, state, kept[WIDTH] / coupling.sizes[WIDTH])
    config = copy.deepcopy(model.config)
    for key, value in coupling.described(kept).items():
        setattr(config, key, value)
    new = rebuilt(model, config, state)
    _tell(model, new, coupling, kept, settings, context)
    if kept[WIDTH] == coupling.sizes[WIDTH]:
        _check(model, new, coupling, indices)
    return bundle.holding(new)


def _allowed(coupling: Coupling, settings: Settings, context: Context) -> set[str]:
    """The dimensions that are cut. Where the config has no head size, heads go with the width and stay with it.

    Raises InputError where nothing of what is asked for can be cut.
    """
    asked: set[str] = set(settings.cut)
    kind, whole = coupling.config.model_type, dict(coupling.whole)
    if coupling.bound and WIDTH in asked - whole.keys() and HEADS not in asked:
        context.say(f"{kind}: heads go with the width, since its config can't say one without the other")
        return asked | {HEADS}
    if coupling.bound and WIDTH not in asked - whole.keys():
        whole.setdefault(HEADS, BOUND)
    stay = [dimension for dimension in (CHANNELS, HEADS, WIDTH) if dimension in asked & whole.keys()]
    if asked <= whole.keys():
        ways = [dimension for dimension in (CHANNELS, HEADS, WIDTH) if dimension not in whole]
        ways += ["heads with width"] if coupling.bound and WIDTH not in coupling.whole else []
        why = "; ".join(f"{dimension}: {kind}: {whole[dimension]}" for dimension in stay)
        raise InputError(f"cut: {why}; allowed are {', and '.join(ways) or 'none here: take another method'}")
    for dimension in stay:
        more = "; cut: [channels, heads, width] cuts both" if dimension == HEADS and coupling.bound and WIDTH not in coupling.whole else ""
        context.say(f"{kind}: {whole[dimension]}, so all {dimension} stay{more}")
    return asked - whole.keys()


def _choice(coupling: Coupling, settings: Settings, allowed: set[str]) -> Kept:
    """How many units of each dimension are kept: of all that meet the share, those that are cut most alike.

    Raises InputError where none does.
    """
    sizes, whole = coupling.sizes, coupling.count(coupling.sizes)
    target = settings.keep * whole
    options = [(kept, coupling.count(kept)) for kept in _options(coupling, settings, allowed)]
    if met := [kept for kept, count in options if abs(count - target) <= TOLERANCE * target]:
        shares = [[kept[dimension] / sizes[dimension] for dimension in allowed] for kept in met]
        return met[min(range(len(met)), key=lambda n: max(shares[n]) - min(shares[n]))]
    reached = sorted({count / whole for _, count in options} | {1.0})
    least, where = reached[0], ", ".join(f"{d} {sizes[d]:,}" for d in DIMENSIONS if d in allowed)
    if target < least * whole:
        more = "" if WIDTH in allowed | coupling.whole.keys() else "; cut: [channels, heads, width] reaches further"
        raise InputError(
            f"keep: {settings.keep:g} of {whole:,} parameters can't be reached by cutting {where}: with as little of them as can be,"
            f" {math.ceil(least * 1000) / 1000:g} is left{more}"
        )
    near = sorted(sorted(reached, key=lambda share: abs(share - settings.keep))[:2])
    raise InputError(
        f"keep: {settings.keep:g} can't be met within {TOLERANCE:.0%} by cutting {where} in multiples of {settings.multiple};"
        f" near it are {' and '.join(f'{share:.3f}' for share in near)}. A smaller multiple or more to cut reaches closer"
    )


def _options(coupling: Coupling, settings: Settings, allowed: set[str]) -> Iterator[Kept]:
    """Every smaller shape that the config can describe. Channels change the count evenly, so only the two numbers nearest the share count.

    Raises InputError where a dimension is smaller than `multiple`.
    """
    sizes, multiple = coupling.sizes, settings.multiple
    target = settings.keep * coupling.count(sizes)

    def stepped(dimension: str) -> list[int]:
        if dimension not in allowed:
            return [sizes[dimension]]
        if multiple > sizes[dimension]:
            raise InputError(f"multiple: {multiple} is more than the {sizes[dimension]} {dimension} that there are")
        return list(range(multiple, sizes[dimension] + 1, multiple))

    heads = range(1, sizes[HEADS] + 1) if HEADS in allowed else [sizes[HEADS]]
    if coupling.bound and WIDTH in allowed:
        outer = [(count, sizes[WIDTH] // sizes[HEADS] * count) for count in heads]
    else:
        outer = list(itertools.product(heads, stepped(WIDTH)))
    channels = stepped(CHANNELS)
    for count, width in outer:
        if not coupling.describable({WIDTH: width, HEADS: count, CHANNELS: channels[-1]}):
            continue
        low, high = (coupling.count({WIDTH: width, HEADS: count, CHANNELS: end}) for end in (channels[0], channels[-1]))
        place = 0 if low == high else (target - low) / (high - low) * (len(channels) - 1)
        nearest = {min(max(round_to(place), 0), len(channels) - 1) for round_to in (math.floor, math.ceil)}
        for index in sorted(nearest):
            if (kept := {WIDTH: width, HEADS: count, CHANNELS: channels[index]}) != sizes:
                yield kept


def _scores(bundle: Bundle, coupling: Coupling, settings: Settings, context: Context) -> "dict[Group, Tensor]":
    """How much each unit of each group matters, (units,) float32."""
    from compress.prune._taylor import changes

    model = bundle.model
    totals: dict[Group, Tensor] = {}

    def add(name: str, values: "Tensor") -> None:
        for group, sums in coupling.by_unit(name, values).items():
            totals[group] = totals[group] + sums if group in totals else sums

    if settings.importance == "taylor":
        changes(model, bundle.tokenizer, context, add)
        return totals
    parameters = list(model.named_parameters())
    for done, (name, parameter) in enumerate(parameters):
        context.progress("scoring", done, len(parameters))
        add(name, parameter.detach().float().square())
    return {group: sums.sqrt() for group, sums in totals.items()}


def _same_scale(model: "PreTrainedModel", state: "dict[str, Tensor]", ratio: float) -> None:
    """Keep the scale of what a model multiplies by the root of its width: T5's logits, BART's token embeddings."""
    config = model.config
    if ratio == 1:
        return
    divided = model.can_generate() and getattr(config, "scale_decoder_outputs", False)
    for name, weight in state.items():
        scaled_logits = divided and name.endswith("decoder.final_layer_norm.weight")
        # a norm stands behind the sum of tokens and positions, so the positions may give way
        scaled_tokens = getattr(config, "scale_embedding", False) and name.endswith("embed_positions.weight")
        if scaled_logits or scaled_tokens:
            state[name] = weight * math.sqrt(ratio)


def _check(before: "PreTrainedModel", after: "PreTrainedModel", coupling: Coupling, kept: "dict[Group, Tensor]") -> None:
    """Check that the smaller model computes what the model does with zeros in place of the units that go. These zeros stay in `before`.

    Raises BrokenPromise where it doesn't: then something in it runs over units that stay and units that go.
    """
    import torch

    inputs = trial_inputs(before)
    with torch.no_grad():
        smaller = after(**inputs).logits.float()
        for name, weight in before.state_dict().items():
            coupling.clear(name, weight, kept)
        whole = before(**inputs).logits.float()
    if not whole.isfinite().all():
        raise BrokenPromise(f"{coupling.config.model_type}: its logits are inf or NaN; model.dtype: float32 may help")
    share = float((smaller - whole).square().sum() / whole.square().sum().clamp(min=1e-30))
    if not share <= MOST_APART:
        cut = " and ".join(sorted({dimension for dimension, _ in kept}))
        raise BrokenPromise(
            f"{coupling.config.model_type}: without some of its {cut} its logits differ from those with zeros in their place, by"
            f" {share:.2g} of their mean square. Something in it runs over all {cut}; leave {cut} out of cut"
        )


def _tell(
    before: "PreTrainedModel", after: "PreTrainedModel", coupling: Coupling, kept: Kept, settings: Settings, context: Context
) -> None:
    """Say what was reached, and note every layer's new shape."""
    from compress.prune._dense import bits
    from compress.structure import linear_layers

    whole, names = coupling.count(coupling.sizes), {WIDTH: "width", HEADS: "heads", CHANNELS: "feed-forward channels"}
    new = coupling.described(kept)
    cuts = []
    for dimension in (CHANNELS, HEADS, WIDTH):
        if kept[dimension] < coupling.sizes[dimension]:
            shapes = {f"{coupling.size(key):,} -> {new[key]:,}": key for key in coupling.keys[dimension]}
            told = [f"{shape} ({key})" for shape, key in shapes.items()] if len(shapes) > 1 else list(shapes)
            cuts.append(f"{names[dimension]} {', '.join(told)}")
        elif dimension in settings.cut:
            cuts.append(f"{names[dimension]} unchanged")
    share = coupling.count(kept) / whole
    context.say(f"kept {share:.1%} of {whole:,} parameters (asked: {settings.keep:.1%}): {', '.join(cuts)}")
    layers, heads = linear_layers(before, None)
    for name, layer in {**layers, **heads}.items():
        weight = cast("Tensor", layer.weight)
        old_shape, new_shape = weight.shape, cast("Tensor", after.get_submodule(name).weight).shape
        if old_shape == new_shape:
            context.leave_out(name, "its shape did not change")
        else:
            context.remarks[name] = f"{' x '.join(map(str, old_shape))} became {' x '.join(map(str, new_shape))}"
            context.note(name, bits(weight))
