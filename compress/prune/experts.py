"""Experts: every layer of a mixture loses the experts that add least to its outputs.

`by: activation`: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression". An expert's score is the mean of
its router weight times the norm of its output, over the calibration tokens that are routed to it. An expert that no token reaches scores 0.
`by: frequency`: how many tokens are routed to it. The router's rows go with the experts, and it chooses among those that are left. Every
layer loses as many, since a config holds one number. Best followed by some training.
"""

import copy
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import methods
from compress.errors import InputError, ModelError
from compress.methods import About, Context
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from compress.experts import Experts

ABOUT = About(at_run_time="each token goes to as many experts as before, so a step takes as long; weights take less", calibrated=True)
NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # the key of their number, as configs name it


class Settings(methods.Settings):
    drop: int = Field(ge=1, description="how many experts of every layer go")
    by: Literal["activation", "frequency"] = Field(
        "activation", description="which go: those whose weighted outputs are shortest on the train split, or those that are chosen least"
    )


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with fewer experts, and a config that says so.

    Raises ModelError for a model without experts or whose config doesn't say how many there are. Raises InputError where too few would be
    left, and DataError when there is nothing to measure on.
    """
    from compress.prune._rebuilt import rebuilt

    model = bundle.model
    key, number = _number(model)
    left = number - settings.drop
    config = copy.deepcopy(model.config)
    if left < (least := _least(config)):
        raise InputError(
            f"drop: {settings.drop} of {number} experts would leave {left}, and the model needs {least}; at most {number - least}"
        )
    groups = getattr(config.get_text_config(), "n_group", None) or 1  # tokens are routed to groups first, and these stay
    if settings.drop % groups or (groups > 1 and left < 2 * groups):
        raise InputError(f"drop: {settings.drop} of {number} experts: each of the {groups} groups has to lose as many and keep two")
    scores = _scores(bundle, settings.by, context)
    state = dict(model.state_dict())
    for path, score in scores.items():
        size = number // groups
        each = (sorted(range(start, start + size), key=score.__getitem__)[settings.drop // groups :] for start in range(0, number, size))
        kept = sorted(index for group in each for index in group)
        gone = ", ".join(f"{index} ({score[index]:.3g})" for index in range(number) if index not in kept)
        context.say(f"experts of {path}, {number} -> {left}: {gone} went, of scores from {min(score):.3g} to {max(score):.3g}")
        for name in _beside(model, path, number):
            state[name] = state[name][kept].clone()
    setattr(config.get_text_config(), key, left)
    return bundle.holding(rebuilt(model, config, state))


def _number(model: "PreTrainedModel") -> tuple[str, int]:
    """The config's key for the number of a layer's experts, and the number."""
    from compress.experts import layers_of

    config, counts = model.config.get_text_config(), {len(fused.down_proj) for _, fused in layers_of(model)}  # type: ignore[arg-type]
    if not counts:
        raise ModelError(f"{type(model).__name__} has no experts, or none that transformers holds together")
    key = next((key for key in NUMBERS if counts == {getattr(config, key, None)}), None)
    if key is None:
        raise ModelError(f"{config.model_type}: its config has no {', '.join(NUMBERS)} that is the number of its experts, {max(counts)}")
    return key, counts.pop()


def _least(config: Any) -> int:
    """The fewest experts that may be left: as many as a token is routed to."""
    text = config.get_text_config()
    chosen = next((value for key in ("num_experts_per_tok", "moe_topk", "top_k_experts") if (value := getattr(text, key, None))), 1)
    return int(chosen)


def _beside(model: "PreTrainedModel", path: str, number: int) -> list[str]:
    """The tensors that have a row for each expert of a layer: the experts' own, and the router's."""
    from compress.experts import routers

    around = path.rpartition(".")[0]
    leading = tuple(f"{name}." for name in routers(model) if name.startswith(f"{around}."))
    return [
        name
        for name, tensor in model.state_dict().items()
        if name.startswith((f"{path}.", *leading)) and tensor.ndim and len(tensor) == number
    ]


def _scores(bundle: Bundle, by: str, context: Context) -> dict[str, list[float]]:
    """The scores of each layer's experts, by the layer's name. The model is left as it was."""
    import torch

    from compress import experts
    from compress.calibration.stream import batches, without_cache

    model = bundle.model
    experts.part(model)
    watched = {path: _Watched(mixture) for path, mixture in experts.parted(model)}
    with torch.no_grad(), without_cache(model):
        examples = batches(model, bundle.tokenizer, context)
        for done, inputs in enumerate(examples):
            context.progress("measuring each expert", done, len(examples))
            experts.leave_padding_out(model, inputs["attention_mask"].bool())
            model(**inputs)
    context.progress("measuring each expert", len(examples), len(examples))
    scores = {path: layer.scores(by) for path, layer in watched.items()}
    experts.fuse(model)
    return scores


class _Watched:
    """Counts the tokens of each expert of a layer, and sums the norms of its weighted outputs."""

    def __init__(self, mixture: "Experts"):
        self._mixture = mixture
        children = dict(mixture.named_children())
        self._tokens, self._lengths = [0] * len(children), [0.0] * len(children)
        self._chosen: tuple[Tensor, Tensor] | None = None
        mixture.register_forward_pre_hook(self._note_choice)
        for name, expert in children.items():
            expert.register_forward_hook(lambda _, args, out, index=int(name): self._note_output(index, out))

    def scores(self, by: str) -> list[float]:
        if by == "frequency":
            return [float(count) for count in self._tokens]
        return [length / max(count, 1) for length, count in zip(self._lengths, self._tokens, strict=True)]

    def _note_choice(self, _: "nn.Module", args: "tuple[Tensor, ...]") -> None:
        self._chosen = self._mixture.chosen(args[1]), args[2]

    def _note_output(self, index: int, out: "Tensor") -> None:
        assert self._chosen is not None
        chosen, weights = self._chosen
        self._tokens[index] += len(out)
        self._lengths[index] += float((weights[chosen == index].float() * out.float().norm(dim=-1)).sum())
