"""A model's structure, whatever its type: its linear layers, heads and stacks of blocks, its inputs and their longest length."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compress import architectures
from compress.errors import DataError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def linear_layers(model: "PreTrainedModel", ignore: list[str] | None) -> "tuple[dict[str, nn.Module], dict[str, nn.Module]]":
    """The linear layers to work on and those left out, by full name; GPT-2's Conv1D counts as linear, routers don't.

    ignore   None leaves out the heads (what maps the last hidden state to tokens or labels). A list replaces that. Each entry
             is a name or the end of one (`lm_head`, `fc1`), also of a module with layers inside (`experts`). It may be a pattern
             (`*.layers.0.*`) or a regular expression (`re:.*mlp.*`), too.

    Raises InputError for an entry that matches no linear layer, and where a layer that is kept shares the embedding's weights.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from compress.experts import routers

    whole = routers(model)
    layers = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and n not in whole}
    if ignore is None:
        left_out = {name for name in layers if is_head(model, name)}
    else:
        owners = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.ndim > 1}
        around = {outer for name in layers for outer in _around(name)}
        meant = {name for entry in ignore for name in match(entry, layers.keys() | owners | around, "ignore")}
        left_out = {name for name in layers if name in meant or not meant.isdisjoint(_around(name))}
    kept = {name: module for name, module in layers.items() if name not in left_out}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if shared := [name for name in kept if f"{name}.weight" in tied]:
        raise InputError(f"ignore: {', '.join(shared)} shares its weights with the embedding and can't be packed; list it under ignore too")
    return kept, {name: layers[name] for name in sorted(left_out)}


def match(entry: str, layers: Iterable[str], key: str) -> list[str]:
    """The layers that an entry of the setting `key` means.

    Raises InputError with the nearest names where it means none.
    """
    names = list(layers)
    if matches := [name for name in names if means(entry, name)]:
        return matches
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(entry, [*names, *ends], n=3, cutoff=0.4) or ends[:8]
    raise InputError(f"{key}: {entry!r} matches no linear layer of this model; near it are {', '.join(near)}")


def means(entry: str, name: str) -> bool:
    """Whether a pattern (`lm_head`, `*.layers.0.*`, `re:.*mlp.*`) means a layer of this full name."""
    if entry.startswith("re:"):
        try:
            return re.fullmatch(entry[3:], name) is not None
        except re.error as error:
            raise InputError(f"{entry!r} is not a regular expression: {error}") from None
    return name == entry or name.endswith(f".{entry}") or fnmatch.fnmatchcase(name, entry)


def within(entry: str, name: str) -> bool:
    """Whether a pattern means a layer of this full name, or a module that it is in."""
    return any(means(entry, part) for part in (name, *_around(name)))


def _around(name: str) -> list[str]:
    """The names of the modules that a layer is in."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def has_transposed_layers(model: "PreTrainedModel") -> bool:
    """Whether a model has GPT-2's Conv1D, a linear layer with its weight the other way round."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def block_stacks(model: "PreTrainedModel") -> "dict[str, nn.ModuleList]":
    """The lists of blocks in the order in which they are run.

    These are the outermost module lists with linear layers inside, Conv1D included. Their modules are all of one class or, as in hybrids,
    all of the class that transformers makes blocks of.
    """
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            same = len({type(block) for block in module}) == 1 or all(isinstance(block, GradientCheckpointingLayer) for block in module)
            if same and any(isinstance(part, nn.Linear | Conv1D) for part in module.modules()):
                stacks[name] = module
    return stacks


def packs_alike(model: "PreTrainedModel") -> bool:
    """Whether plain transformers reads packed weights of a model only where all layers are packed alike.

    An encoder-decoder's generation calls the encoder before the whole model, and layers of another packing are unpacked only by the latter.
    GPTBigCode and others look at their weights while they are made. The experts of a mixture are put together at loading.
    """
    from compress.experts import parted

    alike = bool(model.config.is_encoder_decoder) or architectures.of(model.config.model_type).alike or any(parted(model))
    return alike or not _begins_without_weights(model)


def _begins_without_weights(model: "PreTrainedModel") -> bool:
    """Whether transformers can initialise the model while its linear layers have no weight, as packed ones don't; tried without numbers."""
    import torch
    from torch import nn

    unfilled = bare(model, model.config)
    layers = [module for module in unfilled.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        del layer._parameters["weight"]
    try:
        with torch.no_grad():
            for module in unfilled.modules():
                if module in layers or any(part in layers for part in module.children()):
                    unfilled._init_weights(module)
    except AttributeError:
        return False
    return True


def bare(model: "PreTrainedModel", config: Any) -> "PreTrainedModel":
    """A model of the same class, made of a config, whose weights have shapes and no numbers."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        unfilled: PreTrainedModel = type(model)(config)
    return unfilled


def context_length(config: Any, tokenizer: Any = None) -> int | None:
    """The longest input in tokens that the positions of a model allow; None where they set no bound (T5).

    The tokenizer's own bound counts where it is lower.
    """
    architecture = architectures.of(config.model_type)
    if architecture.endless:
        return None
    if architecture.behind:
        usable: int = config.max_position_embeddings - config.pad_token_id - 1
        return min(usable, getattr(tokenizer, "model_max_length", usable))
    lengths = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    lengths += [getattr(tokenizer, "model_max_length", None)]  # a very large number where the tokenizer doesn't say
    return min((int(length) for length in lengths if length), default=None)


def decoder_inputs(model: "PreTrainedModel", labels: "Tensor") -> "Tensor":
    """The decoder's inputs to predict labels (examples, tokens) in an encoder-decoder: the labels moved by one, after a start token."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):  # mBART's begin with the language, which stands last in the labels
        inputs: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        return inputs
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted.masked_fill_(shifted == -100, model.config.pad_token_id)


def trial_inputs(model: "PreTrainedModel") -> "dict[str, Tensor]":
    """Inputs to see whether a model runs: tokens from all over the vocabulary, since the first ones are often special."""
    import torch

    config = model.config.get_text_config()
    size, end = config.vocab_size, getattr(config, "eos_token_id", None)
    ids = (2 + torch.arange(32, device=model.device) * max(size // 32, 1)).remainder(size)[None]
    if isinstance(end, int):
        ids[:, -1] = end  # where some classifiers look
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and model.can_generate():
        inputs["decoder_input_ids"] = ids[:, :8]
    return inputs


def size_cache_by_decoder(config: Any) -> None:
    """Add `decoder_layers` to a T5's config, by which transformers sizes the cache; else it takes the encoder's number of layers."""
    if hasattr(config, "num_decoder_layers"):
        config.decoder_layers = config.num_decoder_layers


def labels_of(config: Any) -> tuple[str, ...]:
    """A classifier's labels by name, in their order."""
    return tuple(str(config.id2label.get(number, number)) for number in range(config.num_labels))


def label_number(labels: Sequence[str], text: str) -> int:
    """The number of a classifier's label written as a number or by name. Raises DataError."""
    if text in labels:
        return labels.index(text)
    if text.isascii() and text.isdecimal() and int(text) < len(labels):
        return int(text)
    raise DataError(f"label {text!r} is none of the model's: numbers below {len(labels)}, or {', '.join(labels)}")


def is_head(model: "PreTrainedModel", name: str) -> bool:
    """Whether a layer maps the last hidden state to tokens or labels, by standing outside the base model or being the output embedding."""
    output = model.get_output_embeddings()
    if output is not None and model.get_submodule(name) is output:
        return True
    base = model.base_model_prefix
    return hasattr(model, base) and getattr(model, base) is not model and not name.startswith(f"{base}.")
