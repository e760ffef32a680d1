"""Which rows and columns of which weights belong to one head, one feed-forward channel or one unit of the hidden size.

transformers itself tells: a model made of the same config with twice the size has twice the rows or columns where units of it are counted.
Where a config binds the heads to the hidden size, neither changes without the other. Which axis counts which then stands in the type's own
file, if it has one. torch-pruning finds such groups by tracing, but hangs on grouped-query attention and does not know GPT-2's Conv1D
(1.6.1). The groups that it does find are what the tests compare these with.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from compress import architectures
from compress.architectures import CHANNELS, HEADS, WIDTH, Architecture, Axes, Axis
from compress.errors import ModelError
from compress.structure import bare

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

KEYS = {  # of a config, by what they are the size of; of several that it has, all keep their proportion
    WIDTH: ("d_model", "hidden_size", "n_embd", "dim"),
    HEADS: (
        "num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
    ),
    CHANNELS: (
        "d_ff", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim",
    ),
}  # fmt: skip
BOUND = "its config can't describe fewer heads of the same size at the same width"
HEAD_SIZE = "head_dim"  # which T5's d_kv answers to, too
Group = tuple[str, str]  # a dimension, and the part of the model that shares one choice of its units


class Coupling:
    """What belongs together in one model.

    keys    the config's, by the dimension that they are the size of.
    sizes   units of each dimension; a unit of the heads is a group where queries share a key and value head.
    axes    what the axes of every weight count, by its full name; tied weights stand under each of their names.
    whole   the dimensions that can't be cut, and why.
    bound   whether heads times head size is the width, and the config has no head size of its own.

    Raises ModelError for a mixture of experts.
    """

    def __init__(self, model: "PreTrainedModel"):
        from compress import experts

        self.config, self._kind = model.config, model.config.model_type
        if experts.held_together(model):
            raise ModelError(f"{self._kind}: structured pruning doesn't cut a mixture's experts; prune: experts takes whole ones away")
        if self.config.get_text_config() is not self.config:
            raise ModelError(f"{self._kind}: its sizes stand in a text_config of their own, which structured pruning doesn't change")
        self._shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        written, architecture = self.config.to_dict(), architectures.of(self._kind)
        self.keys = {d: tuple(key for key in keys if _is_size(written, key, d)) for d, keys in KEYS.items()}
        self.whole: dict[str, str] = {}
        heads = self._probed(model, HEADS, self.keys[HEADS])
        lengths = {self.size(key) * self._head_size for key in self.keys[HEADS]}
        self.bound = not any(axis and self._shapes[name][n] in lengths for name, axes in heads.items() for n, axis in enumerate(axes))
        if architecture.layers is not None:
            self.axes, self.whole = {name: _written_axes(model, name, architecture.layers) for name in self._shapes}, {}
        else:
            self.axes = self._derived_axes(model, architecture, {} if self.bound else heads)
        self.sizes = {dimension: math.gcd(*map(self.size, keys)) if keys else 1 for dimension, keys in self.keys.items()}
        self._shared = any("relative_attention_bias" in name for name in self.axes)
        self._terms: Counter[Axes] = Counter()  # parameters by what their axes count; shared ones once
        for name, parameter in model.named_parameters():
            self._terms[self.axes[name]] += parameter.numel()

    def size(self, key: str) -> int:
        """A size by its key in the config; the feed-forward's may be left to its default there, which is four times the width."""
        value = getattr(self.config, key)
        return int(4 * self.config.hidden_size if value is None else value)

    def count(self, kept: Mapping[str, int]) -> int:
        """The model's parameters with so many units of each dimension."""
        total = 0
        for axes, number in self._terms.items():
            here = [axis.dimension for axis in axes if axis]
            total += number * math.prod(kept[d] for d in here) // math.prod(self.sizes[d] for d in here)
        return total

    def describable(self, kept: Mapping[str, int]) -> bool:
        """Whether the config's own class accepts these numbers; Llama's needs a width that its heads divide, whatever their size."""
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
        sizes = {key: self.size(key) * kept[d] // self.sizes[d] for d, keys in self.keys.items() for key in keys}
        if not self.bound:  # else it would be the new width by the new number of heads
            sizes[HEAD_SIZE] = self._head_size
        return sizes

    def group(self, name: str, dimension: str) -> Group:
        """The group that a weight's dimension belongs to: the whole model shares its width, a block its channels, an attention its heads.

        T5's position biases are added in the first block and handed on, so all self-attention of a stack shares its heads.
        """
        block = re.match(r"(.*?)\.\d+\.", name)
        if dimension == WIDTH or block is None:
            return dimension, ""
        if dimension == HEADS and re.search("EncDecAttention|encoder_attn|cross_attn", name):
            return dimension, f"{block[0]}cross attention"
        return dimension, block[1] if dimension == HEADS and self._shared else block[0][:-1]

    def by_unit(self, name: str, values: "Tensor") -> "dict[Group, Tensor]":
        """A weight's values summed over everything but the units of one dimension, (units,), by the group that they count for."""
        sums_by_group: dict[Group, Tensor] = {}
        for number, axis in enumerate(self.axes[name]):
            if axis:
                parts = values.movedim(number, 0).reshape(axis.copies, self.sizes[axis.dimension], -1)
                group, sums = self.group(name, axis.dimension), parts.sum(dim=(0, 2))
                sums_by_group[group] = sums_by_group[group] + sums if group in sums_by_group else sums
        return sums_by_group

    def cut(self, name: str, weight: "Tensor", kept: "Mapping[Group, Tensor]") -> "Tensor":
        """A weight with the units (sorted numbers) that are kept of each group; groups that aren't named stay whole."""
        for number, axis in enumerate(self.axes[name]):
            if axis and (group := self.group(name, axis.dimension)) in kept:
                weight = (
                    self._by_unit(weight, number, axis).index_select(number + 1, kept[group].to(weight.device)).flatten(number, number + 2)
                )
        return weight

    def clear(self, name: str, weight: "Tensor", kept: "Mapping[Group, Tensor]") -> None:
        """The same weight whole with zeros in place of the units that go, in place."""
        import torch

        for number, axis in enumerate(self.axes[name]):
            if axis and (group := self.group(name, axis.dimension)) in kept:
                goes = torch.ones(self.sizes[axis.dimension], dtype=torch.bool)
                goes[kept[group].cpu()] = False
                self._by_unit(weight, number, axis).index_fill_(number + 1, goes.nonzero()[:, 0].to(weight.device), 0)

    def _by_unit(self, weight: "Tensor", number: int, axis: Axis) -> "Tensor":
        """A view of a weight with three axes in place of one: copies, units, what each unit has."""
        return weight.view(*weight.shape[:number], axis.copies, self.sizes[axis.dimension], -1, *weight.shape[number + 1 :])

    @property
    def _head_size(self) -> int:
        return int(getattr(self.config, HEAD_SIZE, None) or self.config.hidden_size // self.config.num_attention_heads)

    def _derived_axes(self, model: "PreTrainedModel", architecture: Architecture, heads: dict[str, Axes]) -> dict[str, Axes]:
        """The axes of a type that has none written down; what can't be derived stays whole."""
        parts = {key: self._probed(model, CHANNELS, (key,)) for key in self.keys[CHANNELS]}
        parts = {key: part for key, part in parts.items() if any(map(any, part.values()))}  # others have no say in this type
        self.keys[CHANNELS] = tuple(parts)
        if not parts:
            self.whole.setdefault(CHANNELS, "its config has no size of the feed-forward that can be changed alone")
        norms = [name for name, axes in heads.items() if len(axes) == 1 and any(axes) and "norm" in name.rpartition(".")[0].lower()]
        if self.bound:
            self.whole.setdefault(HEADS, BOUND)
        elif not any(len(axes) == 2 and axes[1] for axes in heads.values()):
            self.whole[HEADS], heads = "the layer that takes what they give has a size of its own", {}
        elif norms:
            self.whole[HEADS], heads = f"{norms[0]} runs over all of them", {}
        if architecture.wide and not self.bound:
            parts[WIDTH] = self._probed(model, WIDTH, self.keys[WIDTH])
        else:
            self.whole[WIDTH] = "what else depends on its hidden size isn't known here"
        parts[HEADS] = heads

        def counted(name: str, number: int) -> Axis | None:
            return next((axis for part in parts.values() if name in part and (axis := part[name][number]) is not None), None)

        return {name: tuple(counted(name, number) for number in range(len(shape))) for name, shape in self._shapes.items()}

    def _probed(self, model: "PreTrainedModel", dimension: str, keys: tuple[str, ...]) -> dict[str, Axes]:
        """The axes that count a dimension: those that are twice as long in a model of twice its size. Why it stays whole is noted."""
        if not keys:
            self.whole[dimension] = f"its config has no number of {dimension}"
            return {}
        sizes = {key: 2 * self.size(key) for key in keys}
        bases = [self.size(key) for key in keys]
        if dimension != CHANNELS:
            sizes[HEAD_SIZE] = self._head_size
        if dimension == HEADS:
            bases += [size * self._head_size for size in bases]
        other = _shapes_of(model, sizes)
        if other is None or other.keys() != self._shapes.keys():
            self.whole[dimension] = f"no model can be made of its config with other {' and '.join(keys)}"
            return {}
        axes_by_weight: dict[str, Axes] = {}
        for name, shape in self._shapes.items():
            axes: list[Axis | None] = []
            for now, then in zip(shape, other[name], strict=True):
                base = max((base for base in bases if now % base == 0), default=None)
                if then == now:
                    axes.append(None)
                elif then != 2 * now or base is None:
                    self.whole[dimension] = BOUND if dimension == HEADS else f"{name} doesn't grow in proportion"
                    return {}
                elif dimension == HEADS and now > base and len({self.size(key) for key in keys}) > 1:
                    self.whole[dimension] = f"{name} holds queries with keys and values, of which there are fewer"
                    return {}
                else:
                    axes.append(Axis(dimension, now // base))
            axes_by_weight[name] = tuple(axes)
        return axes_by_weight


def _is_size(written: dict[str, Any], key: str, dimension: str) -> bool:
    """Whether a config holds a size by this key; the feed-forward's may be left to its default."""
    value = written.get(key, 0)
    return dimension == CHANNELS if value is None else isinstance(value, int) and value > 0


def _shapes_of(model: "PreTrainedModel", sizes: dict[str, int]) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the weights of a model made of the same config with other sizes; None where none can be made."""
    config = copy.deepcopy(model.config)
    try:
        for key, value in sizes.items():
            with suppress(AttributeError) if key == HEAD_SIZE else nullcontext():  # Falcon's follows from others
                setattr(config, key, value)
        other = bare(model, config)
    except Exception:  # whatever a type finds wrong with a config that nobody wrote
        return None
    return {name: tuple(weight.shape) for name, weight in other.state_dict().items()}


def _written_axes(model: "PreTrainedModel", name: str, layers: Mapping[str, Axes]) -> Axes:
    """The axes of a weight as a type's own file has them."""
    from transformers.pytorch_utils import Conv1D

    owner, _, leaf = name.rpartition(".")
    for end, axes in layers.items():
        if re.search(rf"(^|\.)({end})$", owner) and leaf in ("weight", "bias"):
            if leaf == "bias":
                return axes[:1]
            return axes[::-1] if isinstance(model.get_submodule(owner), Conv1D) else axes
    if name not in dict(model.named_parameters()):
        return (None,) * int(model.get_buffer(name).ndim)
    raise ModelError(f"{name}: structured pruning doesn't know this weight of {type(model).__name__}, so it can't cut around it")
