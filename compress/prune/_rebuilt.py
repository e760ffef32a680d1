"""A model built anew from a smaller config and cut weights: by construction what plain transformers loads from the saved files."""

from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def rebuilt(model: "PreTrainedModel", config: Any, state: "dict[str, Tensor]") -> "PreTrainedModel":
    """The model's class with this config and these weights, in evaluation mode on the model's device.

    Raises ModelError where the config does not describe the weights.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        new: PreTrainedModel = type(model)(config)
    try:
        new.load_state_dict(state, assign=True)  # takes the weights as they are: their dtype, and no second copy
    except RuntimeError as error:
        problem = " ".join(part.strip() for part in str(error).splitlines()[1:])  # the first names the class
        raise ModelError(f"{type(model).__name__}: its config can't describe what pruning leaves: {problem[:300]}") from None
    new.tie_weights()
    if model.can_generate():
        new.generation_config = model.generation_config
    return new.to(model.device).eval()
