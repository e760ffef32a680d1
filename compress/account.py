"""What became of every weight of a model in a stage. None is passed over in silence, whatever a method looked at."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from compress.errors import BrokenPromise, is_out_of_memory
from compress.experts import routers
from compress.methods import ASKED, HEAD, LEFT_OUT, Context, LayerSettings, Settings
from compress.model.loading import mapped
from compress.model.source import Source
from compress.results.stages import Account
from compress.structure import is_head, linear_layers, within

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LEAST = 0.5  # of the weights that could have been worked on; with fewer, the model is not what the recipe says
Place = Literal["worked", "heads", "asked", "left_out"]


def foresee(model: "PreTrainedModel", settings: Settings, stage: str) -> None:
    """See, before any work, whether a method for linear layers has enough to work on; the model needs no weights.

    Raises BrokenPromise where it has not, InputError for an entry of `ignore` that matches nothing.
    """
    if isinstance(settings, LayerSettings):
        layers, ignored = linear_layers(model, settings.ignore)
        noted: dict[str, Place] = dict.fromkeys(layers, "worked")
        noted |= dict.fromkeys(ignored, _place(settings.why_ignored))
        account, unsaid = _sorted(model, settings, noted)
        kinds = " and ".join(sorted({type(owner).__name__ for owner in unsaid.values()}))
        _require_enough(account, f"{stage} would work", f"are parameters of {kinds}, and it works on linear layers")


def take(model: "PreTrainedModel", settings: Settings, context: Context, stage: str) -> Account | None:
    """Sort the original model's parameters, for which it needs no weights, by what the method noted about its layers.

    A matrix that the method didn't mention is noted as left out. None where no layer was noted: such methods work on the whole model.

    Raises BrokenPromise where less than half of what could be worked on was.
    """
    if not context.layers:
        return None
    remarks = {str(layer["name"]): None if layer["bits"] is not None else str(layer["remark"]) for layer in context.layers}
    noted = {name: "worked" if remark is None else _place(remark) for name, remark in remarks.items()}
    account, unsaid = _sorted(model, settings, noted)
    for name, owner in unsaid.items():
        context.leave_out(name, _why_unsaid(owner, stage))
    reasons = dict.fromkeys(str(layer["remark"]).removeprefix(LEFT_OUT) for layer in context.layers if layer["bits"] is None)
    why = "; ".join(reason for reason in reasons if reason not in (HEAD, *ASKED))
    _require_enough(account, f"{stage} worked", f"were left out: {why}")
    return account


def compare(before: Source, after: Source) -> Account | None:
    """The account of a method that notes no layers, since it trains weights or removes whole parts.

    Whatever isn't in the new model unchanged has been worked on. Matrices that are in it unchanged were meant to stay. None where the new
    model is of another type, or where memory can't hold the models.
    """
    from torch.nn import Embedding

    try:
        result = mapped(after)
        kind, dtype, left = type(result), result.dtype, {_digest(parameter) for parameter in result.parameters()}
        del result
        model = mapped(before)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    if type(model) is not kind:
        return None
    sizes, leading = Counter[str](), routers(model)
    for name, parameter in model.named_parameters():  # a shared one once
        owner = name.rpartition(".")[0]
        if _digest(parameter.to(dtype)) not in left:
            place = "worked"
        elif parameter.ndim < 2:
            place = "vectors"
        elif owner in leading:
            place = "routers"
        elif isinstance(model.get_submodule(owner), Embedding):
            place = "embeddings"
        else:
            place = "heads" if is_head(model, owner) else "asked"
        sizes[place] += parameter.numel()
    return Account(**sizes)


def _digest(parameter: "Tensor") -> tuple[tuple[int, ...], bytes]:
    """A tensor's shape and numbers, in few bytes."""
    import torch

    numbers = parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data
    return tuple(parameter.shape), hashlib.blake2b(numbers, digest_size=16).digest()


def _sorted(model: "PreTrainedModel", settings: Settings, noted: Mapping[str, Place]) -> "tuple[Account, dict[str, nn.Module]]":
    """The account by what was noted of each layer, and the matrices of which nothing was noted, each with its module."""
    from torch.nn import Embedding

    sizes, unsaid, leading = Counter[str](), {}, routers(model)
    for name, parameter in model.named_parameters():  # a shared one once
        module = model.get_submodule(owner := name.rpartition(".")[0])
        if parameter.ndim < 2:
            place = "vectors"
        elif owner in leading:
            place = "routers"
        elif owner in noted:
            place = noted[owner]
        elif isinstance(module, Embedding):
            place = "embeddings"
        elif any(within(entry, name) for entry in getattr(settings, "ignore", None) or []):
            place = "asked"
        elif is_head(model, owner):
            place = "heads"
        else:
            place, unsaid[name] = "left_out", module
        sizes[place] += parameter.numel()
    return Account(**sizes), unsaid


def _place(remark: str) -> Place:
    reason = remark.removeprefix(LEFT_OUT)
    return "heads" if reason == HEAD else "asked" if reason in ASKED else "left_out"


def _why_unsaid(owner: "nn.Module", stage: str) -> str:
    from torch.nn import Linear

    if isinstance(owner, Linear):
        return f"{stage} passed it over"
    return f"it is a parameter of {type(owner).__name__}, and {stage} works on linear layers"


def _require_enough(account: Account, stage_did: str, others: str) -> None:
    if account.share < LEAST:
        raise BrokenPromise(
            f"{stage_did} on {account.share:.0%} of the {account.worked + account.left_out:,} weights that are no embeddings, heads,"
            f" norms or biases; the others {others}. Nothing was kept; list under ignore what is to stay as it is"
        )
