"""Which rows and columns of which weights belong to one head, one feed-forward channel or one unit of the hidden size.

For each architecture a table says what the outputs and inputs of every kind of layer count; all else (what is scored together, cut
together and how many parameters are left) follows from it. torch-pruning finds such tables by tracing, but it hangs on grouped-query
attention and does not know GPT-2's Conv1D (1.6.1), so the tables are written out; what it does find is what the tests compare them with.
A layer that is in none is refused.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WIDTH, HEADS, CHANNELS = "width", "heads", "channels"
DIMENSIONS = (WIDTH, HEADS, CHANNELS)
FUSED = "heads * 3"  # queries of all heads, then keys, then values
Axes = tuple[str | None, ...]  # what each axis of a weight counts; None for tokens, positions and labels
Group = tuple[str, str]  # a dimension, and the part of the model that shares one choice of its units


@dataclass(frozen=True)
class Family:
    """Architectures whose layers go by the same names.

    types   their `model_type`
    keys    by dimension, the config keys that hold its size; of several, all keep their proportion
    layers  the end of a layer's name (a regular expression; the first that fits counts): its outputs and inputs
    bound   the config has no head size of its own: heads times head size is the width
    biased  the self-attention of a stack shares one position bias with a column per head
    """

    types: tuple[str, ...]
    keys: dict[str, tuple[str, ...]]
    layers: dict[str, Axes]
    bound: bool = False
    biased: bool = False


FAMILIES = (
    Family(
        types=("t5", "mt5"),
        keys={WIDTH: ("d_model",), HEADS: ("num_heads",), CHANNELS: ("d_ff",)},
        layers={
            "shared|embed_tokens|lm_head|classification_head.out_proj": (None, WIDTH),
            "classification_head.dense": (WIDTH, WIDTH),
            "[qkv]": (HEADS, WIDTH),
            "o": (WIDTH, HEADS),
            "relative_attention_bias": (None, HEADS),
            "wi|wi_[01]": (CHANNELS, WIDTH),
            "wo": (WIDTH, CHANNELS),
            "layer_norm|final_layer_norm": (WIDTH,),
        },
        biased=True,
    ),
    Family(
        types=("bart",),
        keys={
            WIDTH: ("d_model",),
            HEADS: ("encoder_attention_heads", "decoder_attention_heads"),
            CHANNELS: ("encoder_ffn_dim", "decoder_ffn_dim"),
        },
        layers={
            "shared|embed_tokens|embed_positions|lm_head|classification_head.out_proj": (None, WIDTH),
            "classification_head.dense": (WIDTH, WIDTH),
            "[qkv]_proj": (HEADS, WIDTH),
            "out_proj": (WIDTH, HEADS),
            "fc1": (CHANNELS, WIDTH),
            "fc2": (WIDTH, CHANNELS),
            "layernorm_embedding|self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm": (WIDTH,),
        },
        bound=True,
    ),
    Family(
        types=("llama", "mistral", "qwen2", "qwen3"),
        # grouped queries: a key and value head with all the query heads that it serves is one unit
        keys={WIDTH: ("hidden_size",), HEADS: ("num_attention_heads", "num_key_value_heads"), CHANNELS: ("intermediate_size",)},
        layers={
            "embed_tokens|lm_head|score": (None, WIDTH),
            "[qkv]_proj": (HEADS, WIDTH),
            "o_proj": (WIDTH, HEADS),
            "[qk]_norm": (None,),
            "gate_proj|up_proj": (CHANNELS, WIDTH),
            "down_proj": (WIDTH, CHANNELS),
            "norm|input_layernorm|post_attention_layernorm": (WIDTH,),
        },
    ),
    Family(
        types=("gpt2",),
        keys={WIDTH: ("n_embd",), HEADS: ("n_head",), CHANNELS: ("n_inner",)},
        layers={
            "wte|wpe|lm_head|score": (None, WIDTH),
            "attn.c_attn": (FUSED, WIDTH),
            "attn.c_proj": (WIDTH, HEADS),
            "c_fc": (CHANNELS, WIDTH),
            "mlp.c_proj": (WIDTH, CHANNELS),
            "ln_[12f]": (WIDTH,),
        },
        bound=True,
    ),
    Family(
        types=("bert", "roberta"),
        keys={WIDTH: ("hidden_size",), HEADS: ("num_attention_heads",), CHANNELS: ("intermediate_size",)},
        layers={
            "word_embeddings|position_embeddings|token_type_embeddings|classifier|classifier.out_proj": (None, WIDTH),
            "pooler.dense|classifier.dense": (WIDTH, WIDTH),
            "query|key|value": (HEADS, WIDTH),
            "attention.output.dense": (WIDTH, HEADS),
            "intermediate.dense": (CHANNELS, WIDTH),
            "output.dense": (WIDTH, CHANNELS),
            "LayerNorm": (WIDTH,),
        },
        bound=True,
    ),
)


class Coupling:
    """What belongs together in one model.

    axes    of every weight by its full name, tied ones under each of their names
    sizes   units of each dimension; a unit of the heads is a group where queries share a key and value head
    """

    def __init__(self, model: "PreTrainedModel"):
        kind = model.config.model_type
        family = next((family for family in FAMILIES if kind in family.types), None)
        if family is None:
            known = ", ".join(kind for family in FAMILIES for kind in family.types)
            raise ModelError(f"{kind}: structured pruning doesn't know how its layers hang together; it knows {known}")
        self.family = family
        self.config = model.config
        self.axes = {
            f"{owner}.{leaf}" if owner else leaf: self._axes(model, owner, leaf)
            for owner, module in model.named_modules()
            for leaf in module._parameters
            if module._parameters[leaf] is not None
        }
        self.sizes = {dimension: math.gcd(*(self.size(key) for key in keys)) for dimension, keys in family.keys.items()}
        self._terms: Counter[Axes] = Counter()  # parameters by what their axes count; shared ones once
        for name, parameter in model.named_parameters():
            self._terms[self.axes[name]] += parameter.numel()

    def size(self, key: str) -> int:
        """A size by its key in the config; GPT-2's n_inner may be left to its default there."""
        value = getattr(self.config, key)
        return int(4 * self.config.n_embd if value is None else value)

    def count(self, kept: Mapping[str, int]) -> int:
        """The model's parameters with so many units of each dimension."""
        total = 0
        for axes, number in self._terms.items():
            here = [dimension_of(axis) for axis in axes if axis]
            total += number * math.prod(kept[d] for d in here) // math.prod(self.sizes[d] for d in here)
        return total

    def describable(self, kept: Mapping[str, int]) -> bool:
        """Whether the config's own class lets it say so; Llama's wants a width that its heads divide, whatever their size."""
        from huggingface_hub.errors import StrictDataclassError

        config = copy.copy(self.config)
        try:
            for key, value in self.described(kept).items():
                setattr(config, key, value)
            config.validate()
        except StrictDataclassError:
            return False
        return True

    def described(self, kept: Mapping[str, int]) -> dict[str, int]:
        """The config's keys with so many units of each dimension."""
        said = {key: self.size(key) * kept[d] // self.sizes[d] for d, keys in self.family.keys.items() for key in keys}
        if not self.family.bound and "num_key_value_heads" in said:  # else it would be the new width by the new number of heads
            said["head_dim"] = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        return said

    def group(self, name: str, dimension: str) -> Group:
        """With what a weight shares the choice of units: the whole model its width, a block its channels, an attention its heads.

        Position biases are added in the first block and handed on, so all self-attention of a stack of T5 shares its heads.
        """
        block = re.match(r"(.*?)\.\d+\.", name)
        if dimension == WIDTH or block is None:
            return dimension, ""
        if dimension == HEADS and re.search("EncDecAttention|encoder_attn", name):
            return dimension, f"{block[0]}cross attention"
        return dimension, block[1] if dimension == HEADS and self.family.biased else block[0][:-1]

    def by_unit(self, name: str, values: "Tensor") -> "dict[Group, Tensor]":
        """A weight's values summed over everything but the units of one dimension, (units,), by the group that they count for."""
        found: dict[Group, Tensor] = {}
        for number, axis in enumerate(self.axes[name]):
            if axis:
                dimension = dimension_of(axis)
                parts = values.movedim(number, 0).reshape(_copies(axis), self.sizes[dimension], -1)
                group, sums = self.group(name, dimension), parts.sum(dim=(0, 2))
                found[group] = found[group] + sums if group in found else sums
        return found

    def cut(self, name: str, weight: "Tensor", kept: "Mapping[Group, Tensor]") -> "Tensor":
        """A weight with the units (sorted numbers) that are kept of each group; groups that aren't named stay whole."""
        for number, axis in enumerate(self.axes[name]):
            if axis and (group := self.group(name, dimension_of(axis))) in kept:
                units = (_copies(axis), self.sizes[dimension_of(axis)], -1)
                parts = weight.reshape(*weight.shape[:number], *units, *weight.shape[number + 1 :])
                weight = parts.index_select(number + 1, kept[group].to(weight.device)).flatten(number, number + 2)
        return weight

    def _axes(self, model: "PreTrainedModel", owner: str, leaf: str) -> Axes:
        from transformers.pytorch_utils import Conv1D

        for end, axes in self.family.layers.items():
            if re.search(rf"(^|\.)({end})$", owner) and leaf in ("weight", "bias"):
                if leaf == "bias":
                    return axes[:1]
                return axes[::-1] if isinstance(model.get_submodule(owner), Conv1D) else axes
        raise ModelError(
            f"{owner}.{leaf}: structured pruning doesn't know this weight of {type(model).__name__}, so it can't cut around it"
        )


def dimension_of(axis: str) -> str:
    """The dimension that an axis runs through."""
    return HEADS if axis == FUSED else axis


def _copies(axis: str) -> int:
    """How many times an axis runs through its dimension."""
    return 3 if axis == FUSED else 1
