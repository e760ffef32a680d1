"""What became of every weight of a model in a stage: none is passed over in silence, whatever a method looked at."""

from collections import Counter
from typing import TYPE_CHECKING, Literal

from compress.architecture import is_head, means
from compress.errors import BrokenPromise
from compress.methods import ASKED, HEAD, LEFT_OUT, Context, Settings
from compress.results import Account

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 0.5  # of the weights that could have been worked on; with less done it is another model's recipe


Place = Literal["worked", "heads", "embeddings", "vectors", "asked", "left_out"]


def take(model: "PreTrainedModel", settings: Settings, context: Context, stage: str) -> Account | None:
    """Sort the parameters of the model as it came, which needs no weights, by what the method noted of its layers.

    A matrix of which it said nothing is noted as left out. None where no layer was noted at all: such methods work on the whole model.

    Raises BrokenPromise where less than half of what could be worked on was.
    """
    from torch.nn import Embedding

    if not context.layers:
        return None
    noted = {str(layer["name"]): layer for layer in context.layers}
    sizes = Counter[str]()
    for name, parameter in model.named_parameters():  # a shared one once
        owner = name.rpartition(".")[0]
        layer = noted.get(owner) or noted.get(name)
        if parameter.ndim < 2:
            place: Place = "vectors"
        elif layer is not None:
            place = "worked" if layer["bits"] is not None else _why_left_out(layer["remark"])
        elif isinstance(model.get_submodule(owner), Embedding):
            place = "embeddings"
        elif any(means(entry, part) for entry in getattr(settings, "ignore", None) or [] for part in (name, owner)):
            place = "asked"
        else:
            place = "heads" if is_head(model, owner) else "left_out"
            if place == "left_out":
                kind = type(model.get_submodule(owner)).__name__
                context.leave_out(name, f"it is a parameter of {kind}, and {stage} works on linear layers")
        sizes[place] += parameter.numel()
    account = Account(**sizes)
    if account.share < LEAST:
        reasons = dict.fromkeys(str(layer["remark"]).removeprefix(LEFT_OUT) for layer in context.layers if layer["bits"] is None)
        why = "; ".join(reason for reason in reasons if reason not in (HEAD, *ASKED))
        raise BrokenPromise(
            f"{stage}: worked on {account.share:.0%} of the {account.worked + account.left_out:,} weights that are no embeddings, heads,"
            f" norms or biases; the others were left out because {why}. Nothing was kept; name under ignore what shall stay as it is"
        )
    return account


def _why_left_out(remark: str) -> Place:
    reason = remark.removeprefix(LEFT_OUT)
    return "heads" if reason == HEAD else "asked" if reason in ASKED else "left_out"
