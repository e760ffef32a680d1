"""Experts of a mixture as linear layers, one by one, so that what works on matrices works on them.

transformers holds all experts of a layer as two parameters of three dimensions (experts, rows, columns). So code that
looks for linear layers misses most of a mixture. `part` replaces the parameters by linear layers that compute the same, under the names
that checkpoints and servers use; `fuse` puts the parameters back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import BrokenPromise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UPWARD, DOWN = ("gate_proj", "up_proj"), ("down_proj",)  # as checkpoints name them by default


@dataclass(frozen=True)
class Slice:
    """Where a layer's tensor lies in the parameter of all experts: its full name, the expert, the rows, whether it is transposed."""

    name: str
    expert: int
    rows: slice
    transposed: bool

    def of(self, whole: Tensor) -> Tensor:
        """The part of the parameter, (rows, columns) or, of a bias, (rows,); shares its memory."""
        part = whole[self.expert]
        return (part.t() if self.transposed else part)[self.rows]


class Expert(nn.Module):
    """One expert: the layers that lead upward (where there are two, gate and value), the activation, the layer back down."""

    def __init__(self, upward: dict[str, nn.Linear], down: tuple[str, nn.Linear], fused: nn.Module):
        super().__init__()
        for name, layer in [*upward.items(), down]:
            self.add_module(name, layer)
        self._upward, self._down, self._fused = tuple(upward), down[0], (fused,)  # in a tuple it is no part of this module

    @property
    def inner(self) -> tuple[str, ...]:
        """The names of the layers that share the expert's input."""
        return self._upward

    @property
    def outer(self) -> str:
        """The name of the layer back down."""
        return self._down

    def forward(self, states: Tensor) -> Tensor:
        wide = [getattr(self, name)(states) for name in self._upward]
        fused: Any = self._fused[0]
        joined = wide[0] if len(wide) == 1 else torch.cat(wide, dim=-1)
        out: Tensor = getattr(self, self._down)(fused._apply_gate(joined) if fused.has_gate else fused.act_fn(joined))
        return out


class Experts(nn.Module):
    """Stands in the place of a layer's experts. Its parts are named by their numbers.

    real    which of its input tokens are no padding (tokens,); only those are computed. None computes all
    """

    def __init__(self, experts: list[Expert], fused: nn.Module, origin: dict[str, Slice]):
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self._fused, self._origin = (fused,), origin
        self.real: Tensor | None = None

    @property
    def origin(self) -> dict[str, Slice]:
        """Where each tensor comes from, by its name inside this module."""
        return self._origin

    @property
    def fused(self) -> nn.Module:
        """The module in whose place this one stands."""
        return self._fused[0]

    def layers(self) -> list[str]:
        """The names of all layers inside."""
        return [name for turn in self.turns() for group in turn for name in group]

    def unpacked(self) -> list[str]:
        """The names of those that are still linear layers."""
        return [name for name in self.layers() if isinstance(self.get_submodule(name), nn.Linear)]

    def turns(self) -> list[list[list[str]]]:
        """The layers by name, those that share an input together: all experts' upward layers first, then the layers back down."""
        experts = [(number, expert) for number, expert in self.named_children() if isinstance(expert, Expert)]
        return [
            [[f"{number}.{name}" for name in expert.inner] for number, expert in experts],
            [[f"{number}.{expert.outer}"] for number, expert in experts],
        ]

    def chosen(self, top_k_index: Tensor) -> Tensor:
        """The numbers of each token's experts, (tokens, experts a token), -1 where it is padding."""
        if self.real is None or len(self.real) != len(top_k_index):
            return top_k_index
        return top_k_index.masked_fill(~self.real.to(top_k_index.device)[:, None], -1)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts: states (tokens, width), for each token the numbers and the weights of its experts."""
        out, chosen = torch.zeros_like(hidden_states), self.chosen(top_k_index)
        for number, expert in self.named_children():
            tokens, place = torch.where(chosen == int(number))
            if len(tokens):
                states = expert(hidden_states[tokens]) * top_k_weights[tokens, place, None]
                out.index_add_(0, tokens, states.to(out.dtype))
        return out


def part(model: "PreTrainedModel") -> None:
    """Replace experts that are held together by linear layers, in place; their weights share the parameters' memory."""
    upward, down = names(model)
    for path, fused in list(layers_of(model)):
        model.set_submodule(path, _parted(path, fused, upward, down))


def fuse(model: nn.Module) -> None:
    """Replace parted experts by parameters again, with what their layers hold now, in place; packed ones stay apart.

    Raises BrokenPromise where only some experts of a layer are packed, since no reader can put these together.
    """
    for path, experts in list(parted(model)):
        if not (unpacked := experts.unpacked()):
            continue
        if len(unpacked) < len(experts.layers()):
            raise BrokenPromise(
                f"{path}.{unpacked[0]} can't be packed and others of its layer were; a layer's experts can be read only all packed or none."
                f" Nothing was kept; list {path} under ignore"
            )
        fused, tensors = experts.fused, dict(experts.named_parameters())
        for leaf, held in list(fused.named_parameters(recurse=False)):
            like = next(tensors[name] for name, at in experts.origin.items() if at.name == f"{path}.{leaf}")
            whole = torch.empty(held.shape, dtype=like.dtype, device=like.device)
            for name, at in experts.origin.items():
                if at.name == f"{path}.{leaf}":
                    at.of(whole).copy_(tensors[name].data)
                    tensors[name].data = like.new_empty(0)  # one layer's experts at a time are there twice
            setattr(fused, leaf, nn.Parameter(whole, requires_grad=held.requires_grad))
        model.set_submodule(path, fused)


def leave_padding_out(model: nn.Module, real: Tensor) -> None:
    """Have parted experts compute only the tokens that are real, (rows, tokens) bool."""
    for _, mixture in parted(model):
        mixture.real = real.reshape(-1)


def parted(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The parted experts of each layer, by full name."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Experts))


def names(model: "PreTrainedModel") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What checkpoints of this model type call an expert's layers, upward and down, or a default where they hold no experts one by one."""
    return _checkpoint_names(model) or (UPWARD, DOWN)


def readable(model: "PreTrainedModel") -> bool:
    """Whether plain transformers puts experts together that a checkpoint holds one by one, packed or not."""
    return _checkpoint_names(model) is not None


def holds(module: nn.Module) -> bool:
    """Whether a module itself holds all experts of a layer, in the layout that transformers' own kernels know."""
    down = module._parameters.get("down_proj")
    standard = getattr(module, "has_gate", None) is not None and not getattr(module, "has_post_expert_norm", False)
    return standard and down is not None and down.ndim == 3


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold all experts of a layer, by full name."""
    return ((path, module) for path, module in model.named_modules() if holds(module))


def held_together(model: nn.Module) -> bool:
    """Whether a model has experts that stand in parameters of three dimensions."""
    return any(layers_of(model))


def routers(model: nn.Module) -> set[str]:
    """The full names of the layers that decide which expert gets a token, or how much of one.

    These are modules beside the experts whose matrix has a row for each expert, or a single row, and the linear layers in what transformers
    calls a router.
    """
    leading = {
        f"{path}.{name}" if name else path
        for path, module in model.named_modules()
        if "Router" in type(module).__name__
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    for path, experts in [*parted(model), *layers_of(model)]:
        beside = path.rpartition(".")[0]
        number = len(experts._modules) if isinstance(experts, Experts) else len(experts.down_proj)  # type: ignore[arg-type]
        for name, module in model.get_submodule(beside).named_children():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and len(weight) in (1, number):
                leading.add(f"{beside}.{name}")
            if name in ("gate", "router"):
                leading |= {f"{beside}.{name}.{inner}" for inner, part in module.named_modules() if inner and isinstance(part, nn.Linear)}
    return leading


def _parted(path: str, fused: Any, upward: tuple[str, ...], down: tuple[str, ...]) -> Experts:
    wide = "gate_up_proj" if fused.has_gate else "up_proj"
    if not fused.has_gate:
        upward = upward[-1:]
    elif not fused.is_concatenated:
        upward = (wide,)  # alternating rows of gate and value stay so
    origin, experts = dict[str, Slice](), []
    for number in range(len(fused.down_proj)):
        layers: dict[str, nn.Linear] = {}
        for leaf, parts in ((wide, upward), ("down_proj", down)):
            rows = getattr(fused, leaf).shape[2 if fused.is_transposed else 1] // len(parts)
            for index, name in enumerate(parts):
                at = Slice(f"{path}.{leaf}", number, slice(index * rows, (index + 1) * rows), fused.is_transposed)
                origin[f"{number}.{name}.weight"] = at
                layers[name] = _linear(at.of(getattr(fused, leaf).data))
                if fused.has_bias:
                    at = Slice(f"{path}.{leaf}_bias", number, at.rows, False)
                    origin[f"{number}.{name}.bias"] = at
                    layers[name].bias = nn.Parameter(at.of(getattr(fused, f"{leaf}_bias").data))
        last = layers.pop(down[0])
        experts.append(Expert(layers, (down[0], last), fused))
    for leaf, held in list(fused.named_parameters(recurse=False)):  # the parts have the memory now
        fused.register_parameter(leaf, nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=held.requires_grad))
    mixture = Experts(experts, fused, origin)
    mixture.train(fused.training)
    return mixture


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def renamings(model: "PreTrainedModel") -> list[Callable[[str], str]] | None:
    """How transformers renames a checkpoint's tensors; None where it makes other tensors of some of them, experts aside."""
    renames: list[Callable[[str], str]] = []
    for conversion in _conversions(model):
        if hasattr(conversion, "operations"):
            if _leaf(conversion) is None:
                return None
        else:
            renames.append(partial(_renamed, conversion))
    return renames


def _renamed(conversion: Any, name: str) -> str:
    return str(conversion.rename_source_key(name)[0])


def _checkpoint_names(model: "PreTrainedModel") -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """An expert's layers by transformers' own table of conversions; None where checkpoints hold the experts together, too."""
    layer_names: dict[str, tuple[str, ...]] = {}
    for conversion in _conversions(model):
        if (leaf := _leaf(conversion)) is not None:
            sources = [str(source).partition("experts.*.")[2].removesuffix("$") for source in conversion.source_patterns]
            layer_names[leaf] = tuple(name.removesuffix(".weight") for name in sources)
    upward, down = layer_names.get("gate_up_proj") or layer_names.get("up_proj"), layer_names.get("down_proj")
    return (upward, down) if upward and down else None


def _leaf(conversion: Any) -> str | None:
    """Which parameter of all experts a conversion puts together from the weights of single experts; None for other conversions."""
    leaf = str(conversion.target_patterns[0]).rpartition("experts.")[2]
    apart = all("experts.*." in source and source.removesuffix("$").endswith(".weight") for source in map(str, conversion.source_patterns))
    return leaf if apart and leaf in ("gate_up_proj", "up_proj", "down_proj") else None


def _conversions(model: "PreTrainedModel") -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model.config.get_text_config().model_type) or []
