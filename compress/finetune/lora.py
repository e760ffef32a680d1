"""Small factors beside the linear layers are trained on the targets of the train split and merged into the weights, to save memory.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": W + alpha / rank * B A, by peft. The weights themselves stay as they
are loaded, without gradients or states of the optimiser. Where pruning set a weight to zero, B A counts as zero there, while training and
when merged. The result is an ordinary model.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from compress.finetune._settings import TUNED
from compress.methods import Context, TuneSettings
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ABOUT = replace(TUNED, packages=("peft",), extra="lora")
ADAPTER = "default"


class Settings(TuneSettings):
    learning_rate: float = Field(1e-3, gt=0, description="the highest, which the warmup ends at")
    rank: int = Field(16, ge=1, description="columns of B and rows of A")
    alpha: float = Field(32, gt=0, description="B A is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of A's input")
    targets: list[str] | None = Field(None, min_length=1, description="the layers with factors; null takes all linear ones but the heads")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The same model with the trained factors merged into its weights.

    Raises InputError for targets that there aren't and a rank that is larger than a layer. Raises DataError where there is too little to
    learn from, and RunError where the loss is no longer a number.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from compress import experts
    from compress.structure import has_transposed_layers
    from compress.training.loop import train
    from compress.training.material import read
    from compress.training.weights import in_float32, pruned

    model = bundle.model
    experts.part(model)
    names = _targets(model, settings)
    material = read(model, bundle.tokenizer, context)
    zeros = {name: weight == 0 for name, weight in pruned(model).items() if name in names} if settings.keep_zeros else {}
    with in_float32(model) if model.dtype == torch.float16 else nullcontext():  # gradients of float16 vanish
        torch.manual_seed(settings.seed)  # A starts at random, B at zero
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names,
            fan_in_fan_out=has_transposed_layers(model),
        )  # fmt: skip
        with _of_no_known_type(model):
            wrapped = get_peft_model(model, config, ADAPTER)
        for name, zero in zeros.items():
            _keep(model.get_submodule(name), zero)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train(model, material, settings, settings.seed, context, stopping=settings.early_stopping)
        tied = model.config.tie_word_embeddings
        merged = wrapped.merge_and_unload()
        merged.config.tie_word_embeddings = tied  # peft looks at an encoder's embedding, and the head may share the decoder's
    experts.fuse(merged)
    context.say(f"factors of rank {settings.rank} on {len(names)} layers: {count:,} weights were trained")
    return bundle.holding(merged.requires_grad_(True))


@contextmanager
def _of_no_known_type(model: "PreTrainedModel") -> Iterator[None]:
    """peft turns targets in mixtures, by their model type, into parameters that hold all experts together; here these are apart."""
    model.config.model_type = "apart"
    try:
        yield
    finally:
        del model.config.model_type  # the class's own is there again


def _targets(model: "PreTrainedModel", settings: Settings) -> list[str]:
    """The names of the layers that get factors. Raises InputError, BrokenPromise where there are no linear layers."""
    from compress.errors import BrokenPromise, InputError
    from compress.structure import linear_layers, match

    free, heads = linear_layers(model, None)
    layers: dict[str, Any] = {**free, **heads}
    names = list(free) if settings.targets is None else sorted({n for entry in settings.targets for n in match(entry, layers, "targets")})
    if not names:
        raise BrokenPromise(f"{type(model).__name__} has no linear layers to train")
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name in names:
        rows, columns = layers[name].weight.shape
        if settings.rank > min(rows, columns):
            raise InputError(f"rank: {settings.rank} is larger than {name}, which is {rows} x {columns}; at most {min(rows, columns)}")
        if f"{name}.weight" in tied:
            raise InputError(f"targets: {name} shares its weights with the embedding, which factors would change too; leave it out")
    return names


def _keep(layer: Any, zero: "Tensor") -> None:
    """Let a layer with factors be W + mask * (B A), in its forward pass as in merging, which asks it for B A.

    zero   where the weight is to stay zero, in the weight's shape
    """
    from torch.utils.checkpoint import checkpoint

    whole, transposed = layer.get_delta_weight, layer.fan_in_fan_out

    def kept(adapter: str) -> "Tensor":
        delta: Tensor = whole(adapter)
        return delta.masked_fill(zero, 0)

    def changed(states: "Tensor") -> "Tensor":
        delta = kept(ADAPTER)
        shown: Tensor = layer.lora_dropout[ADAPTER](states.to(delta.dtype))
        return shown @ (delta if transposed else delta.t())

    def forward(states: "Tensor") -> "Tensor":
        out: Tensor = layer.base_layer(states)
        # computed again in the backward pass, so that B A of only one layer at a time is in memory
        return out.add(checkpoint(changed, states, use_reentrant=False).to(out.dtype))

    layer.get_delta_weight, layer.forward = kept, forward
