"""What the loss on the targets would change by without a weight, to first order: |weight * gradient|, example by example.

Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", with the magnitude taken of each weight's own change.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.calibration.stream import encoded, padded, without_cache
from compress.errors import BrokenPromise
from compress.methods import Context, Example
from compress.structure import label_number, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def changes(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: Context, add: Callable[[str, Tensor], None]) -> None:
    """add(name, |weight * gradient|) for every parameter and every calibration example, in float32.

    Raises DataError when there is nothing to learn from, BrokenPromise where the loss is NaN or infinite.
    """
    examples = encoded(model, tokenizer, context)
    with torch.enable_grad(), without_cache(model):
        for done, (example, ids, answer) in enumerate(examples):
            context.progress("scoring", done, len(examples))
            loss = _loss(model, example, ids, answer)
            if not torch.isfinite(loss):
                raise BrokenPromise(f"importance: taylor: the loss on example {example.id} is {float(loss)}; model.dtype: float32 may help")
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:  # tables of positions that no example reaches have none
                    add(name, (parameter.detach().float() * parameter.grad.float()).abs())
            model.zero_grad(set_to_none=True)


def _loss(model: "PreTrainedModel", example: Example, ids: list[int], answer: list[int]) -> Tensor:
    """Mean cross-entropy of the example's target, nats a token; of the whole text where it has none."""
    logits = model(**padded(model, [(ids, answer)])).logits[0].float()
    if not model.can_generate():
        targets = [label_number(labels_of(model.config), (example.references or [""])[0])]
        logits = logits[None]
    elif model.config.is_encoder_decoder:
        targets = answer
        logits = logits[: len(answer)]
    else:  # position n gives token n + 1
        targets = ids[-min(len(answer) or len(ids), len(ids) - 1) :]
        logits = logits[-len(targets) - 1 : -1]
    return cross_entropy(logits, torch.tensor(targets, device=logits.device))
